"""Draws the augmentation of training images as a function of (seed, epoch, image index).

Parameters are drawn for many images at once and depend on their sizes only. In the loader's
threads, decode.py applies crop and flip, and policy.py its operations; on the device, effects.py
applies the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config import (
    AlexNet2012AugmentConfig,
    AugmentConfig,
    BasicAugmentConfig,
    ConfigError,
    NoAugmentConfig,
    RandomAugmentConfig,
)
from alexnet_ddp.config.plugins import PluginAugmentConfig
from alexnet_ddp.data.policy import Operation, draw_operations
from alexnet_ddp.plugins import AUGMENTS, check_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from alexnet_ddp.data.effects import Effects, Partners

_ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to a centre crop

# Principal components of ImageNet's RGB values in [0, 1], from fb.resnet.torch, imagenet.lua.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


# left, top, width, height of n boxes: int64 [n] each, in pixels.
Boxes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Views:
    """Crop boxes and flips of n images.

    Boxes are in pixels of the original image. Resizing one to a square may change its aspect ratio.
    """

    left: np.ndarray  # int64 [n], as the next three
    top: np.ndarray
    width: np.ndarray
    height: np.ndarray
    flip: np.ndarray  # bool [n]


@dataclass(frozen=True)
class Augment:
    """The augmentation of a run. Raises ConfigError for an unknown plugin or wrong arguments."""

    cfg: RandomAugmentConfig
    seed: int
    image_size: int
    eval_resize: int
    # (eigenvalues [3], eigenvectors [3, 3] as columns) of the RGB values; None: those of ImageNet.
    colour_basis: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cfg, PluginAugmentConfig):
            option, function = f"augment.name ({self.cfg.name})", AUGMENTS.get(self.cfg.name)
            check_arguments(option, function, None, None, **self.cfg.args)

    def views(
        self, epoch: int, indices: np.ndarray, widths: np.ndarray, heights: np.ndarray
    ) -> Views:
        """The views of images `indices` in `epoch`. All arrays are int64 [n]; sizes in pixels."""
        u = rng.uniforms(rng.fold(self.seed, rng.CROP, epoch), indices, 2 * _ATTEMPTS + 3)
        flip = u[:, -1] < self.cfg.flip
        match self.cfg:
            case BasicAugmentConfig():
                boxes = random_resized_boxes(self.cfg, u, widths, heights)
            case AlexNet2012AugmentConfig():
                boxes = self._square_boxes(u, widths, heights)
        return Views(*boxes, flip)

    def colour(self, epoch: int, indices: np.ndarray) -> np.ndarray | None:
        """float32 [n, 3] to add to RGB in [0, 1]; None if off. Krizhevsky 2012, section 4.1."""
        if not isinstance(self.cfg, AlexNet2012AugmentConfig) or not self.cfg.colour_sigma:
            return None
        sigma = self.cfg.colour_sigma
        alpha = sigma * rng.normals(rng.fold(self.seed, rng.COLOUR, epoch), indices, 3)
        values, vectors = self.colour_basis or (_EIGENVALUES, _EIGENVECTORS)
        return (alpha * values @ vectors.T).astype(np.float32)

    def operations(self, epoch: int, indices: np.ndarray, size: int) -> list[list[Operation]]:
        """The policy's operations for each image. size: height = width after the crop, pixels."""
        return draw_operations(self.cfg, rng.fold(self.seed, rng.POLICY, epoch), indices, size)

    def finish(self, image: np.ndarray, epoch: int, index: int) -> None:
        """Apply a plugin's function to a cropped training image, uint8 [size, size, 3], in place.

        Raises ConfigError if its result is not like the image.
        """
        if not isinstance(self.cfg, PluginAugmentConfig):
            return
        random = np.random.default_rng([self.seed, rng.PLUGIN, epoch, index])
        made = AUGMENTS.get(self.cfg.name)(image, random, **self.cfg.args)
        if made is None:
            return
        if not isinstance(made, np.ndarray) or made.shape != image.shape or made.dtype != np.uint8:
            rule = f"must return a uint8 array of the shape {image.shape}, or None"
            raise ConfigError(f"augment.name ({self.cfg.name}) {rule}; correct the plugin")
        image[...] = made

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.cfg.mixup_alpha > 0 or self.cfg.cutmix_alpha > 0

    def effects(
        self,
        epoch: int,
        indices: np.ndarray,
        size: int,
        partners: "Partners | None",
        copy: Callable[[np.ndarray], "Tensor"],
    ) -> "Effects":
        """Draw what effects.py applies to a batch.

        indices: int64 [m], the decoded images. size: height = width in pixels.
        partners: the images that the first n of them are mixed with; None if mixing is off.
        copy: copies an array to the device.
        """
        from alexnet_ddp.data import effects  # imports torch

        mixing = erased = None
        if partners is not None:
            key = rng.fold(self.seed, rng.MIX, epoch)
            drawn = effects.draw_mixing(self.cfg, key, indices[: len(partners.rows)], size)
            mixing = effects.Mixing(*(copy(values) for values in (*partners, *drawn)))
        if self.cfg.erase:
            key = rng.fold(self.seed, rng.ERASE, epoch)
            erased = copy(effects.draw_erased(self.cfg.erase, key, indices, size))
        colour = self.colour(epoch, indices)
        jitter = effects.draw_jitter(self.cfg, rng.fold(self.seed, rng.JITTER, epoch), indices)
        return effects.Effects(
            colour=None if colour is None else copy(colour),
            jitter={name: copy(values) for name, values in jitter.items()},
            erased=erased,
            mixing=mixing,
        )

    def _square_boxes(self, u: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> Boxes:
        """Boxes of a random crop of `image_size` from the central square of `eval_resize` pixels.

        In pixels of the original image, as left, top, width, height: int64 [n] each.
        """
        short = np.minimum(widths, heights)
        side = np.maximum(1, np.rint(short * self.image_size / self.eval_resize).astype(np.int64))
        left = (widths - short) // 2 + _randint(u[:, 0], short - side + 1)
        top = (heights - short) // 2 + _randint(u[:, 1], short - side + 1)
        return left, top, side, side


def build_augment(
    cfg: AugmentConfig,
    seed: int,
    image_size: int,
    eval_resize: int,
    colour_basis: tuple[np.ndarray, np.ndarray] | None = None,
) -> Augment | None:
    """The augmentation of `cfg`; None for augment=none, which uses the evaluation's transform.

    colour_basis: principal components of the colours of the data set, see Augment.
    """
    if isinstance(cfg, NoAugmentConfig):
        return None
    assert isinstance(cfg, RandomAugmentConfig)  # every other choice is one
    return Augment(cfg, seed, image_size, eval_resize, colour_basis)


def random_resized_boxes(
    cfg: BasicAugmentConfig, u: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> Boxes:
    """Boxes distributed as those of torchvision's RandomResizedCrop (Szegedy 2015, section 6).

    u: float64 [n, 2 * _ATTEMPTS + 2 or more], uniform in [0, 1).
    widths, heights: int64 [n], pixels.
    Draws up to ten areas and aspect ratios and uses the first box that fits; if none fits, the
    largest central box with an allowed aspect ratio.
    Returns left, top, width, height: int64 [n] each, pixels.
    """
    n = np.arange(len(widths))
    area = (cfg.min_scale + (cfg.max_scale - cfg.min_scale) * u[:, :_ATTEMPTS]) * (
        widths * heights
    )[:, None]
    ratio = np.exp(np.log(cfg.max_ratio) * (2 * u[:, _ATTEMPTS : 2 * _ATTEMPTS] - 1))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    found, first = fits.any(1), fits.argmax(1)
    central_w = np.minimum(widths, np.rint(heights * cfg.max_ratio).astype(np.int64))
    central_h = np.minimum(heights, np.rint(widths * cfg.max_ratio).astype(np.int64))
    w = np.where(found, w[n, first], central_w)
    h = np.where(found, h[n, first], central_h)
    left = np.where(found, _randint(u[:, 2 * _ATTEMPTS], widths - w + 1), (widths - w) // 2)
    top = np.where(found, _randint(u[:, 2 * _ATTEMPTS + 1], heights - h + 1), (heights - h) // 2)
    return left, top, w, h


def _randint(u: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Integers in [0, bound) from uniforms in [0, 1)."""
    return (u * bound).astype(np.int64)
