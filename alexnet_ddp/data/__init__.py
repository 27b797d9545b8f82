"""Bytes on disk -> a batch on the device.

index.py, scan.py, imagenet.py and demo.py say what there is; sampler.py which image comes when and to whom; augment.py
what happens to it; decode.py turns its bytes into pixels; loader.py does so ahead of the step. This file joins them.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alexnet_ddp import rng
from alexnet_ddp.config import (
    DataConfig,
    DemoConfig,
    FolderConfig,
    ImageNetConfig,
    OnBadImage,
    ShardsConfig,
    SyntheticConfig,
)
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.decode import BadImage, centre_into, crop_into, size_of
from alexnet_ddp.data.demo import ensure_demo
from alexnet_ddp.data.imagenet import open_imagenet
from alexnet_ddp.data.index import SampleIndex, check_same_classes, index_folder
from alexnet_ddp.data.loader import Batch, Fill, Loader
from alexnet_ddp.data.shards import open_shards
from alexnet_ddp.errors import DataError

__all__ = ["Batch", "ImageSets", "Loader", "SyntheticStore", "build_loader", "open_data"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSets:
    """What a run trains on and what it is evaluated on; `class_names` are for people, in the order of the labels."""

    train: SampleIndex
    val: SampleIndex
    class_names: list[str]


@dataclass(frozen=True)
class SyntheticStore:
    """Images that are nowhere: `pixels` is noise, and image i is a window of it that begins where its hash says."""

    pixels: np.ndarray  # uint8 [image bytes + 4096]

    def take(self, positions: np.ndarray) -> "SyntheticStore":
        return self

    def name(self, i: int) -> str:
        return f"synthetic image {i}"

    def fill(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[int]:
        starts = rng.hash32(rng.fold(rng.SYNTHETIC), indices.astype(np.int32)) & 0xFFF
        for slot, start in zip(slots, starts):
            slot[...] = self.pixels[start : start + slot.size].reshape(slot.shape)
        return []


def open_data(cfg: DataConfig, may_make: bool = False) -> ImageSets:
    """Find the images that `cfg` names; make the built-in ones where `may_make`. Raises DataError.

    May write files, a cache at least: see first_on_node.
    """
    match cfg:
        case DemoConfig():
            if may_make:
                ensure_demo(Path(cfg.root))
            train, val, names = _open_folder(Path(cfg.root))
        case FolderConfig():
            train, val, names = _open_folder(Path(cfg.root))
        case ImageNetConfig():
            train, val, names = open_imagenet(Path(cfg.root))
        case ShardsConfig():
            train, val, names = open_shards(cfg.root)
        case SyntheticConfig():
            train, val = _synthetic(cfg, cfg.num_train), _synthetic(cfg, cfg.num_val)
            names = train.classes
        case _:
            raise TypeError(f"no data for {type(cfg).__name__}")
    check_same_classes(train, val)
    return ImageSets(train.subset(cfg.limit_train), val.subset(cfg.limit_val), names)


def build_loader(
    cfg: DataConfig, index: SampleIndex, augment: Augment | None, num_threads: int, device: torch.device
) -> Loader:
    """A loader of `index`; augment=None shows the images as the evaluation sees them."""
    fill: Fill = getattr(index.store, "fill", None) or ImageFill(index, augment, cfg)
    colour = augment.colour if augment else _no_colour
    return Loader(fill, index.labels, colour, cfg.image_size, cfg.num_threads or num_threads, device)


@dataclass(frozen=True)
class ImageFill:
    """Fills slots of a batch with decoded images. Bad ones raise DataError, or are skipped, as the user chose."""

    index: SampleIndex
    augment: Augment | None
    cfg: DataConfig

    def __call__(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[int]:
        """Positions that could not be filled. slots: uint8 [n, size, size, 3]; indices: int64 [n]."""
        bad: list[int] = []
        if self.augment is None:
            for k, i in enumerate(indices):
                self._guard(bad, k, i, lambda k=k, i=i: centre_into(slots[k], self.index.read(i), self.cfg.eval_resize))
            return bad
        data = [self._guard(bad, k, i, lambda i=i: self._read(i)) for k, i in enumerate(indices)]
        sizes = np.array([(1, 1) if item is None else item[1] for item in data], dtype=np.int64)
        views = self.augment.views(epoch, indices, sizes[:, 0], sizes[:, 1])
        boxes = np.stack([views.left, views.top, views.width, views.height], axis=1).tolist()
        for k, i in enumerate(indices):
            if data[k] is not None:
                self._guard(bad, k, i, lambda k=k: crop_into(slots[k], data[k][0], boxes[k], views.flip[k]))
        return bad

    def _read(self, i: int) -> tuple[bytes, tuple[int, int]]:
        data = self.index.read(i)
        return data, size_of(data)

    def _guard(self, bad: list[int], k: int, i: int, action: Callable[[], object]) -> object:
        """action(); where image i turns out to be bad, note position k or raise."""
        try:
            return action()
        except (BadImage, DataError) as error:
            reason = str(error) if isinstance(error, DataError) else f"{self.index.name(i)}: {error}"
            if self.cfg.on_bad_image is not OnBadImage.skip:
                remedy = "remove or mend it, or leave it out with data.on_bad_image=skip"
                raise DataError(reason if isinstance(error, DataError) else f"{reason}; {remedy}") from None
            log.warning("skipped %s", reason)
            bad.append(k)
            return None


def _open_folder(root: Path) -> tuple[SampleIndex, SampleIndex, list[str]]:
    train, val = index_folder(root, "train"), index_folder(root, "val")
    return train, val, train.classes


def _synthetic(cfg: SyntheticConfig, n: int) -> SampleIndex:
    count = np.arange(cfg.image_size**2 * 3 + 4096, dtype=np.int32)
    pixels = (rng.hash32(rng.fold(rng.SYNTHETIC), count) & 0xFF).astype(np.uint8)
    width = len(str(cfg.num_classes - 1))
    classes = [f"class{c:0{width}d}" for c in range(cfg.num_classes)]
    labels = np.sort(np.arange(n, dtype=np.int32) % cfg.num_classes)
    return SampleIndex(classes, labels, SyntheticStore(pixels))


def _no_colour(epoch: int, indices: np.ndarray) -> None:
    return None
