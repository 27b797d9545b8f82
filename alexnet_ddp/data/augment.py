"""What happens to a training image: a crop box, a flip, a colour shift, ..., as functions of (seed, epoch, index).

Everything is drawn for many images at once from their sizes alone. decode.py applies crop and flip, policy.py its
operations, both in the loader's threads; effects.py the rest, on the device.
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
from alexnet_ddp.plugins import AUGMENTS

if TYPE_CHECKING:
    from torch import Tensor

    from alexnet_ddp.data.effects import Effects, Partners

_ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to a centre crop

# Principal components of ImageNet's RGB values in [0, 1]: fb.resnet.torch, datasets/imagenet.lua.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


@dataclass(frozen=True)
class Views:
    """How n images are seen. Boxes are in pixels of the whole image, and may be resized without regard to aspect."""

    left: np.ndarray  # int64 [n]
    top: np.ndarray
    width: np.ndarray
    height: np.ndarray
    flip: np.ndarray  # bool [n]


@dataclass(frozen=True)
class Augment:
    """The augmentation of a run."""

    cfg: RandomAugmentConfig
    seed: int
    image_size: int
    eval_resize: int
    colour_basis: tuple[np.ndarray, np.ndarray] | None = (
        None  # eigenvalues, eigenvectors as columns; None: ImageNet's
    )

    def views(
        self, epoch: int, indices: np.ndarray, widths: np.ndarray, heights: np.ndarray
    ) -> Views:
        """The views of images `indices` (int64 [n]), whose sizes are given in pixels, in `epoch`."""
        u = rng.uniforms(rng.fold(self.seed, rng.CROP, epoch), indices, 2 * _ATTEMPTS + 3)
        flip = u[:, -1] < self.cfg.flip
        match self.cfg:
            case BasicAugmentConfig():
                boxes = random_resized_boxes(self.cfg, u, widths, heights)
            case AlexNet2012AugmentConfig():
                boxes = self._square_boxes(u, widths, heights)
        return Views(*boxes, flip)

    def colour(self, epoch: int, indices: np.ndarray) -> np.ndarray | None:
        """float32 [n, 3] to add to RGB in [0, 1], or None. Krizhevsky 2012, section 4.1."""
        sigma = getattr(self.cfg, "colour_sigma", 0.0)
        if not sigma:
            return None
        alpha = sigma * rng.normals(rng.fold(self.seed, rng.COLOUR, epoch), indices, 3)
        values, vectors = self.colour_basis or (_EIGENVALUES, _EIGENVECTORS)
        return (alpha * values @ vectors.T).astype(np.float32)

    def operations(self, epoch: int, indices: np.ndarray, size: int) -> list[list[Operation]]:
        """What the policy does to each image, once it is `size` pixels wide and high."""
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
        """Whether images are mixed with others."""
        return self.cfg.mixup_alpha > 0 or self.cfg.cutmix_alpha > 0

    def effects(
        self,
        epoch: int,
        indices: np.ndarray,
        size: int,
        partners: "Partners | None",
        copy: Callable[[np.ndarray], "Tensor"],
    ) -> "Effects":
        """Of the images `indices`, int64 [m], the first n of which are mixed with `partners`. copy: to the device."""
        from alexnet_ddp.data.effects import (
            Effects,
            Mixing,
            draw_erased,
            draw_jitter,
            draw_mixing,
        )  # needs torch

        jitter, erase, mix = (
            rng.fold(self.seed, use, epoch) for use in (rng.JITTER, rng.ERASE, rng.MIX)
        )
        colour, mixing = self.colour(epoch, indices), None
        if partners is not None:
            drawn = draw_mixing(self.cfg, mix, indices[: len(partners.rows)], size)
            mixing = Mixing(*(copy(values) for values in (*partners, *drawn)))
        return Effects(
            colour=None if colour is None else copy(colour),
            jitter={
                name: copy(values)
                for name, values in draw_jitter(self.cfg, jitter, indices).items()
            },
            erased=copy(draw_erased(self.cfg.erase, erase, indices, size))
            if self.cfg.erase
            else None,
            mixing=mixing,
        )

    def _square_boxes(
        self, u: np.ndarray, widths: np.ndarray, heights: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """A random image_size crop of the central square of eval_resize pixels, in the pixels of the image."""
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
    """None: images are seen as the evaluation sees them. colour_basis: the principal axes of the data set's colours."""
    return (
        None
        if isinstance(cfg, NoAugmentConfig)
        else Augment(cfg, seed, image_size, eval_resize, colour_basis)
    )


def random_resized_boxes(
    cfg: BasicAugmentConfig, u: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> tuple[np.ndarray, ...]:
    """left, top, width, height, int64 [n] each, distributed as torchvision's RandomResizedCrop.get_params.

    Up to ten tries of an area and an aspect ratio, the first that fits; else the largest central crop whose aspect
    ratio is allowed. Szegedy 2015, section 6.
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
