"""Where images come from: ImageNet's archives, a folder for each class, shards of ours, or other WebDataset tars."""

import logging
import os
from pathlib import Path

import numpy as np

from alexnet_ddp.data.sources import imagenet, scan
from alexnet_ddp.data.sources.classes import BY_NAME, ClassOrder
from alexnet_ddp.data.sources.index import SampleIndex, index_folder
from alexnet_ddp.data.sources.shard_index import read_index
from alexnet_ddp.data.sources.tars import ArchiveStore
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.prepare.listing import WHOLE, Source
from alexnet_ddp.prepare.packed import shards_source, tar_names, tars_source
from alexnet_ddp.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def splits_of(root: str) -> list[str]:
    """Which of train and val `root` holds. Raises DataError where it has neither, or is not there."""
    storage = Storage(absolute(root))
    if not storage.exists():
        raise DataError(
            f"source ({root}) is not there; give the directory or the URL of the images"
        )
    found = [split for split in ("train", "val") if _kind(storage, split)]
    if not found:
        rule = f"{imagenet.TRAIN}, train/CLASS/* or train-*.tar in WebDataset layout"
        raise DataError(f"source ({root}) holds no images that can be packed; it must have {rule}")
    return found


def open_source(root: str, split: str, order: ClassOrder = BY_NAME) -> Source:
    """List the images of `split`. Raises DataError, or ConfigError if `order` would be ignored."""
    storage = Storage(absolute(root))
    kind = _kind(storage, split)
    if kind == "archive":
        return _archive(Path(storage.root), split, order)
    if kind == "folder":
        return (
            _folder(storage, split, order)
            if storage.is_local
            else _remote_folder(storage, split, order)
        )
    if kind and order != BY_NAME:
        rule = f"would be ignored: the {kind} of source ({root}) hold the labels; leave it out"
        raise ConfigError(f"class_order ({order.choice}) {rule}")
    if kind == "shards":
        return shards_source(storage, split)
    if kind == "tars":
        return tars_source(storage, split)
    raise DataError(
        f"source ({root}) holds no {split} images; give the splits that it has: split=train or split=val"
    )


def _kind(storage: Storage, split: str) -> str | None:
    if storage.is_local and storage.exists({"train": imagenet.TRAIN, "val": imagenet.VAL}[split]):
        if split == "val" and not storage.exists(imagenet.DEVKIT):
            raise DataError(
                f"{storage.root} lacks {imagenet.DEVKIT}, which holds the labels of {imagenet.VAL}; add it"
            )
        return "archive"
    if storage.exists(split):
        return "folder"
    index = read_index(storage)
    if index is not None:
        return "shards" if split in index.splits else None
    return "tars" if tar_names(storage, split) else None


def _archive(root: Path, split: str, order: ClassOrder) -> Source:
    index, plain, class_names = imagenet.open_archive(root, split, order)
    store = index.store
    assert isinstance(store, ArchiveStore)
    names = [f"{index.classes[label]}/{name}" for label, name in zip(index.labels.tolist(), plain)]
    one = np.zeros(len(index), np.int32)
    files = [os.path.basename(store.path)]
    return Source(
        str(root),
        index.classes,
        class_names,
        index.labels,
        names,
        files,
        one,
        store.offsets,
        store.sizes,
    )


def _folder(storage: Storage, split: str, order: ClassOrder) -> Source:
    index: SampleIndex = index_folder(Path(storage.root), split, order)
    paths = [index.store.path(i) for i in range(len(index))]
    return _of_files(storage.root, split, index.classes, index.labels, paths, index.store.sizes)


def _remote_folder(storage: Storage, split: str, order: ClassOrder) -> Source:
    """As index_folder, but by one listing of the store."""
    ignored = scan.Ignored()
    sizes = storage.tree_sizes(split)
    paths = [path for path in sizes if _is_image(path, split, ignored)]
    for note in ignored.notes():
        log.warning(note)
    if not paths:
        raise DataError(
            f"{storage.path(split)} holds no CLASS/* images; lay them out as {split}/CLASS/*"
        )
    of = [path.split("/", 1)[0] for path in paths]
    classes = order.arrange(list(set(of)), storage.path(split))
    label = {name: i for i, name in enumerate(classes)}
    places = sorted(range(len(paths)), key=lambda i: (label[of[i]], *paths[i].rsplit("/", 1)))
    labels = np.array([label[of[i]] for i in places], np.int32)
    paths = [paths[i] for i in places]
    return _of_files(
        storage.root,
        split,
        classes,
        labels,
        paths,
        np.array([sizes[path] for path in paths], np.int64),
    )


def _is_image(path: str, split: str, ignored: scan.Ignored) -> bool:
    *folders, name = path.split("/")
    if any(folder.startswith(".") for folder in folders):
        ignored.add("hidden", f"{split}/{path}")
    elif ignored.accepts(name, "/".join((split, *folders))):
        if folders:
            return True
        ignored.add("outside of the class folders", f"{split}/{path}")
    return False


def _of_files(
    root: str,
    split: str,
    classes: list[str],
    labels: np.ndarray,
    paths: list[str],
    sizes: np.ndarray,
) -> Source:
    n = len(paths)
    whole, files = np.full(n, WHOLE, np.int64), [f"{split}/{path}" for path in paths]
    return Source(
        root, classes, classes, labels, paths, files, np.arange(n, dtype=np.int32), whole, sizes
    )
