"""What a run trains on, and what it is evaluated on: any `data=` choice becomes two indices."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config import (
    DataConfig,
    DemoConfig,
    FolderConfig,
    ImageNetConfig,
    ShardsConfig,
    SyntheticConfig,
)
from alexnet_ddp.config.plugins import PluginDataConfig
from alexnet_ddp.data.fill import Skipped
from alexnet_ddp.data.sources.classes import (
    BY_NAME,
    NAME,
    ClassOrder,
    numeric_order_note,
    read_order,
    same_looking,
)
from alexnet_ddp.data.sources.index import SampleIndex, check_same_classes, index_folder
from alexnet_ddp.data.sources.scan import listed
from alexnet_ddp.data.sources.shards import open_shards
from alexnet_ddp.data.storage import Storage, absolute

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSets:
    """What a run trains on and what it is evaluated on; `class_names` are for people, in the order of the labels."""

    train: SampleIndex
    val: SampleIndex
    class_names: list[str]
    colour_basis: tuple[np.ndarray, np.ndarray] | None = (
        None  # of the training images, where it is known
    )


@dataclass(frozen=True)
class SyntheticStore:
    """Images that are nowhere: `pixels` is noise, and image i is a window of it that begins where its hash says."""

    pixels: np.ndarray  # uint8 [image bytes + 4096]

    @property
    def sizes(self) -> np.ndarray:
        """None has a size in bytes: image i is the same in all synthetic data."""
        return np.zeros(0, np.int64)

    def take(self, positions: np.ndarray) -> "SyntheticStore":
        return self

    def name(self, i: int) -> str:
        return f"synthetic image {i}"

    def fill(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[Skipped]:
        starts = rng.hash32(rng.fold(rng.SYNTHETIC), indices.astype(np.int32)) & 0xFFF
        for slot, start in zip(slots, starts):
            slot[...] = self.pixels[start : start + slot.size].reshape(slot.shape)
        return []


def open_data(
    cfg: DataConfig, may_make: bool = False, trained: list[str] | None = None
) -> ImageSets:
    """Find the images that `cfg` names; make the built-in ones if `may_make`. Raises DataError.

    trained: the classes of a run in the order of its labels. Folders and archives that have these classes get this
    order instead of data.class_order, whose file may be gone.
    May write files, a cache at least: see first_on_node. Imports what a choice needs where it is chosen: a start is
    mostly imports.
    """
    basis = None
    match cfg:
        case DemoConfig():
            from alexnet_ddp.data.sources.demo import ensure_demo

            if may_make:
                ensure_demo(Path(cfg.root))
            train, val, names = _open_folder(Path(cfg.root), BY_NAME)
        case FolderConfig():
            train, val, names = _open_folder(Path(cfg.root), _order(cfg.class_order, trained))
        case ImageNetConfig():
            from alexnet_ddp.data.sources.imagenet import open_imagenet

            train, val, names = open_imagenet(Path(cfg.root), _order(cfg.class_order, trained))
        case ShardsConfig():
            train, val, names = open_shards(cfg)
            basis = colour_basis(Storage(absolute(cfg.root)))
        case PluginDataConfig():
            from alexnet_ddp.data.sources.plugin import open_plugin

            train, val = open_plugin(cfg, "train"), open_plugin(cfg, "val")
            names = train.classes
        case SyntheticConfig():
            train, val = _synthetic(cfg, cfg.num_train), _synthetic(cfg, cfg.num_val)
            names = train.classes
        case _:
            raise TypeError(f"no data for {type(cfg).__name__}")
    check_same_classes(train, val)
    _warn_of_names(train.classes, trained is None and getattr(cfg, "class_order", NAME) == NAME)
    return ImageSets(train.subset(cfg.limit_train), val.subset(cfg.limit_val), names, basis)


def _order(choice: str, trained: list[str] | None) -> ClassOrder:
    return (
        read_order(choice)
        if trained is None
        else ClassOrder(names=tuple(trained), is_binding=False)
    )


def _warn_of_names(classes: list[str], by_name: bool) -> None:
    note = numeric_order_note(classes) if by_name else None
    if note:
        log.warning(
            "%s; for that order give data.class_order=numeric (to prepare: class_order=numeric)",
            note,
        )
    twins = same_looking(classes)
    if twins:
        log.warning(
            "several classes are named %s, in different Unicode forms: are they one class?",
            listed(twins),
        )


def _open_folder(root: Path, order: ClassOrder) -> tuple[SampleIndex, SampleIndex, list[str]]:
    train, val = index_folder(root, "train", order), index_folder(root, "val", order)
    return train, val, train.classes


def _synthetic(cfg: SyntheticConfig, n: int) -> SampleIndex:
    count = np.arange(cfg.image_size**2 * 3 + 4096, dtype=np.int32)
    pixels = (rng.hash32(rng.fold(rng.SYNTHETIC), count) & 0xFF).astype(np.uint8)
    width = len(str(cfg.num_classes - 1))
    classes = [f"class{c:0{width}d}" for c in range(cfg.num_classes)]
    labels = np.sort(np.arange(n, dtype=np.int32) % cfg.num_classes)
    return SampleIndex(classes, labels, SyntheticStore(pixels))


def colour_basis(root: Storage) -> tuple[np.ndarray, np.ndarray] | None:
    """(eigenvalues [3], eigenvectors [3, 3] as columns) of the RGB values in [0, 1] of the packed training images."""
    try:
        found = json.loads(root.read("train.stats.json"))
        return np.array(found["eigenvalues"]), np.array(found["eigenvectors"])
    except (OSError, ValueError, KeyError) as error:
        log.warning(
            "%s cannot be read (%s): colour noise is ImageNet's",
            root.path("train.stats.json"),
            error,
        )
        return None
