"""Augmentation on the device: colour jitter and noise, random erasing, mixup and CutMix.

The host draws the parameters as a function of (seed, epoch, image index). The device applies them
without synchronising with the host, in the order of torchvision's references: jitter, noise,
normalisation, erasing, mixing.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alexnet_ddp import rng
from alexnet_ddp.config import RandomAugmentConfig
from alexnet_ddp.config.data import IMAGENET_MEAN, IMAGENET_STD

# (mean, standard deviation) of red, green and blue in [0, 1]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)

_JITTERS = ("brightness", "contrast", "saturation", "hue")  # applied in this order
# The defaults of torchvision's RandomErasing.
_ERASED_AREA = (0.02, 0.33)  # fraction of the image
_ERASED_RATIO = (0.3, 3.3)  # height / width, log-uniform
_ERASE_TRIES = 10


class Partners(NamedTuple):
    """The images that n images are mixed with.

    The partner of an image is the one before it in the global batch, or itself if that one is bad.
    """

    rows: np.ndarray  # int64 [n], rows of the m decoded images
    labels: np.ndarray  # int64 [n]


@dataclass(frozen=True)
class Mixing:
    """How the n images of a batch are mixed with their partners. Tensors on the device."""

    rows: Tensor  # int64 [n]
    labels: Tensor  # int64 [n]
    weight: Tensor  # float32 [n], weight of an image's own pixels outside of its box
    boxes: Tensor  # int32 [n, 4], left, top, right, bottom: replaced by the partner; empty in mixup
    share: Tensor  # float32 [n], weight of an image's own label in the loss


@dataclass(frozen=True)
class Effects:
    """The effects on m decoded images, the first n of which are the batch.

    Tensors are on the device; None means that an effect is off.
    """

    colour: Tensor | None = None  # float32 [m, 3], to add to RGB in [0, 1]
    # The active ones of _JITTERS: float32 [m], factors, or turns for the hue.
    jitter: dict[str, Tensor] = field(default_factory=dict)
    erased: Tensor | None = None  # int32 [m, 4]: left, top, right, bottom; boxes may be empty
    mixing: Mixing | None = None
    normalisation: Normalisation = IMAGENET


# Functions that run on the host


def draw_jitter(cfg: RandomAugmentConfig, key: int, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Draw the parameters of torchvision's ColorJitter, by name: float32 [n] each.

    Brightness, contrast and saturation are factors around 1, the hue is in turns around 0.
    """
    u = 2 * rng.uniforms(key, indices, len(_JITTERS)) - 1
    reach = {name: getattr(cfg, name) for name in _JITTERS}
    drawn = {
        name: (name != "hue") + reach[name] * u[:, k]
        for k, name in enumerate(_JITTERS)
        if reach[name]
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def draw_erased(probability: float, key: int, indices: np.ndarray, size: int) -> np.ndarray:
    """Draw boxes as torchvision's RandomErasing (Zhong 2020): up to ten tries, the first that fits.

    Returns int32 [n, 4]: left, top, right, bottom in pixels; empty boxes for images that stay.
    """
    u = rng.uniforms(key, indices, 2 * _ERASE_TRIES + 3)
    low, high = _ERASED_AREA
    area = (low + (high - low) * u[:, :_ERASE_TRIES]) * size**2
    low, high = np.log(_ERASED_RATIO)
    ratio = np.exp(low + (high - low) * u[:, _ERASE_TRIES : 2 * _ERASE_TRIES])
    sides = np.sqrt(np.stack([area / ratio, area * ratio], axis=2))  # width, height
    sides = np.rint(sides).astype(np.int64)
    fits = (sides < size).all(axis=2)
    sides = sides[np.arange(len(u)), fits.argmax(1)]
    sides[(u[:, -1] >= probability) | ~fits.any(1)] = 0
    corners = (u[:, -3:-1] * (size - sides + 1)).astype(np.int64)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.int32)


def draw_mixing(
    cfg: RandomAugmentConfig, key: int, indices: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw (weight, boxes, share) of a Mixing for images `indices`, int64 [n].

    mixup (Zhang 2018): weight = share ~ Beta(a, a), and an empty box. CutMix (Yun 2019): a box with
    1 - Beta(a, a) of the area, with a uniform centre, clipped at the edges; share is the remaining
    fraction of the image. If both are on, each is used for half of the images.
    """
    from scipy.special import betaincinv  # slow to import

    u = rng.uniforms(key, indices, 4)
    is_cut = u[:, 0] < bool(cfg.cutmix_alpha) / (bool(cfg.cutmix_alpha) + bool(cfg.mixup_alpha))
    alpha = np.where(is_cut, cfg.cutmix_alpha, cfg.mixup_alpha)
    own = betaincinv(alpha, alpha, u[:, 1])
    half = np.where(is_cut, 0.5 * np.sqrt(1 - own) * size, 0).astype(np.int64)[:, None]
    centre = (u[:, 2:] * size).astype(np.int64)
    boxes = np.concatenate([centre - half, centre + half], axis=1).clip(0, size)
    weight = np.where(is_cut, 1, own)
    share = weight * (1 - np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / size**2)
    return weight.astype(np.float32), boxes.astype(np.int32), share.astype(np.float32)


def partner_rows(slots: np.ndarray, num_images: int) -> np.ndarray:
    """The row of each image's partner among the decoded images: int64 [n].

    slots: int64 [m], ascending: which of num_images + 1 slots could be decoded. The last slot
    contains the image before the others in the global batch.
    """
    row = np.full(num_images + 1, -1)
    row[slots] = np.arange(len(slots))
    own = slots[slots < num_images]
    before = row[own - 1]  # slot -1 is the last one
    return np.where(before < 0, row[own], before)


# Functions that run on the device


def apply_effects(images: Tensor, effects: Effects) -> Tensor:
    """Apply `effects` to uint8 [m, size, size, 3] images and normalise them.

    Returns float32 [n, 3, size, size], channels last in memory.
    """
    for name, amount in effects.jitter.items():
        images = _jitter(images.float(), name, amount[:, None, None, None])
    x = _normalised(images, effects.colour, effects.normalisation)
    if effects.erased is not None:
        x.masked_fill_(_inside(effects.erased, x.shape[1])[..., None], 0)
    if effects.mixing is not None:
        x = _mix(x, effects.mixing)
    return x.permute(0, 3, 1, 2)


def to_pixels(x: Tensor, normalisation: Normalisation) -> np.ndarray:
    """The inverse of the normalisation: uint8 [n, size, size, 3] of float [n, 3, size, size].

    Values outside of the range of an image are clipped. Waits for the device.
    """
    mean, std = _on_device(normalisation, x.device)
    pixels = 255 * (x.permute(0, 2, 3, 1) * std + mean)
    return pixels.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def normalise(
    images: Tensor, colour: Tensor | None, normalisation: Normalisation = IMAGENET
) -> Tensor:
    """Normalise uint8 [n, size, size, 3] images; colour: float32 [n, 3] to add to RGB in [0, 1].

    Returns float32 [n, 3, size, size], channels last in memory.
    """
    return _normalised(images, colour, normalisation).permute(0, 3, 1, 2)


def _normalised(images: Tensor, colour: Tensor | None, normalisation: Normalisation) -> Tensor:
    mean, std = _on_device(normalisation, images.device)
    shift = -mean / std if colour is None else (colour - mean) / std
    # By rows of width * 3 values: a CPU is several times slower with three constants in turn.
    width = images.shape[2]
    x = images.flatten(2).float().mul_((1 / (255 * std)).repeat(width))
    shift = shift.repeat(width) if colour is None else shift.repeat(1, width)[:, None]
    return x.add_(shift).view(images.shape)


@lru_cache
def _on_device(normalisation: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on `device`; cached, because a copy per step would block."""
    mean, std = normalisation
    with torch.inference_mode(False):
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def _mix(x: Tensor, mixing: Mixing) -> Tensor:
    weight = torch.where(_inside(mixing.boxes, x.shape[1]), 0, mixing.weight[:, None, None])
    return torch.lerp(x[mixing.rows], x[: len(mixing.rows)], weight[..., None])


def _inside(boxes: Tensor, size: int) -> Tensor:
    """bool [n, size, size]: the pixels inside `boxes`, int32 [n, 4]."""
    at = torch.arange(size, device=boxes.device)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    return ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None, :]


def _jitter(x: Tensor, name: str, amount: Tensor) -> Tensor:
    """torchvision's adjust_{name} for float [n, size, size, 3] images in [0, 255]."""
    match name:
        case "brightness":
            other: Tensor | float = 0.0
        case "contrast":
            other = _grey(x).mean((1, 2), keepdim=True)
        case "saturation":
            other = _grey(x)
        case "hue":
            return _turn_hue(x, amount)
    return (x * amount + other * (1 - amount)).clamp_(0, 255)


def _grey(x: Tensor) -> Tensor:
    r, g, b = x.split(1, dim=3)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Add `turns` to the hue.

    In HSV with H in sixths of the circle, each RGB channel is a trapezoidal function of H, shifted
    by two sixths from the previous channel.
    """
    r, g, b = x.split(1, dim=3)
    value = x.amax(3, keepdim=True)
    chroma = value - x.amin(3, keepdim=True)
    per_sixth = chroma.clamp_min(1e-9)  # avoids 0 / 0 for grey, which has no hue
    of_g_or_b = torch.where(value == g, 2 + (b - r) / per_sixth, 4 + (r - g) / per_sixth)
    hue = torch.where(value == r, (g - b) / per_sixth, of_g_or_b) + 6 * turns
    position = torch.cat([hue + 5, hue + 3, hue + 1], dim=3) % 6
    return value - chroma * torch.minimum(position, 4 - position).clamp_(0, 1)
