"""Synthetic images: noise that needs no disk, to measure everything except reading and decoding."""

import errno
from dataclasses import dataclass

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config import SyntheticConfig
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.source import Skipped


@dataclass(frozen=True)
class SyntheticStore:
    """Image i is a window of the noise in `pixels`, at an offset given by the hash of i."""

    pixels: np.ndarray  # uint8 [image bytes + 4096]

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    @property
    def sizes(self) -> np.ndarray:
        """Empty: the images have no files, and image i is the same in all synthetic data."""
        return np.zeros(0, np.int64)

    def take(self, positions: np.ndarray) -> "SyntheticStore":
        """All of them: an image depends on its position alone."""
        return self

    def read(self, i: int) -> bytes:
        raise OSError(errno.ENOTSUP, "synthetic images have no encoded bytes")

    def name(self, i: int) -> str:
        return f"synthetic image {i}"

    def dimensions(self, indices: np.ndarray) -> None:
        return None

    def will_need(self, indices: np.ndarray) -> None:
        """Does nothing: the images are in memory."""

    def fill(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[Skipped]:
        """Write images `indices` to `slots`, uint8 [n, size, size, 3]; see fill.Fill."""
        starts = rng.hash32(rng.fold(rng.SYNTHETIC), indices.astype(np.int32)) & 0xFFF
        for slot, start in zip(slots, starts):
            slot[...] = self.pixels[start : start + slot.size].reshape(slot.shape)
        return []


def synthetic_images(cfg: SyntheticConfig, n: int) -> SampleIndex:
    """An index of `n` synthetic images of cfg.num_classes classes."""
    count = np.arange(cfg.image_size**2 * 3 + 4096, dtype=np.int32)
    pixels = (rng.hash32(rng.fold(rng.SYNTHETIC), count) & 0xFF).astype(np.uint8)
    width = len(str(cfg.num_classes - 1))
    classes = [f"class{c:0{width}d}" for c in range(cfg.num_classes)]
    labels = np.sort(np.arange(n, dtype=np.int32) % cfg.num_classes)
    return SampleIndex(classes, labels, SyntheticStore(pixels))
