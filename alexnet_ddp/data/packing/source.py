"""What there is to pack: N images by name, label and place, in the order (class, file name) of the index.

The one rule: a name says class and file, never where the source lies, so the same images give the same plan as a folder
or as an archive.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_ddp.data import imagenet, scan
from alexnet_ddp.data.index import SampleIndex, index_folder
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.data.tars import ArchiveStore, Member, tar_members
from alexnet_ddp.errors import DataError

WHOLE = -1  # as an offset: the file is the image


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a split."""

    root: str  # absolute, or a URL
    classes: list[str]  # sorted
    class_names: list[str]  # for people, in the order of the classes
    labels: np.ndarray  # int32 [N]
    names: list[str]  # [N]: CLASS/FILE
    files: list[str]  # relative to root
    file_of: np.ndarray  # int32 [N]: position in files
    offsets: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N], in bytes

    def __len__(self) -> int:
        return len(self.names)


def splits_of(root: str) -> list[str]:
    """Which of train and val `root` holds. Raises DataError where it has neither, or is not there."""
    storage = Storage(absolute(root))
    if not storage.exists():
        raise DataError(f"source ({root}) is not there; give the directory or the URL of the images")
    found = [split for split in ("train", "val") if _kind(storage, split)]
    if not found:
        rule = f"{imagenet.TRAIN}, train/CLASS/* or train-*.tar in WebDataset layout"
        raise DataError(f"source ({root}) holds no images that can be packed; it must have {rule}")
    return found


def open_source(root: str, split: str) -> Source:
    """List the images of `split`. Raises DataError."""
    storage = Storage(absolute(root))
    kind = _kind(storage, split)
    if kind == "archive":
        return _archive(Path(storage.root), split)
    if kind == "folder":
        return _folder(storage, split) if storage.is_local else _remote_folder(storage, split)
    if kind == "tars":
        return _tars(storage, split)
    raise DataError(f"source ({root}) holds no {split} images; give the splits that it has: split=train or split=val")


def _kind(storage: Storage, split: str) -> str | None:
    needed = {"train": [imagenet.TRAIN], "val": [imagenet.VAL, imagenet.DEVKIT]}[split]
    if storage.is_local and all(storage.exists(name) for name in needed):
        return "archive"
    if _tar_names(storage, split):
        return "tars"
    return "folder" if storage.exists(split) else None


def _tar_names(storage: Storage, split: str) -> list[str]:
    return [name for name in storage.names() if re.fullmatch(rf"{split}-.*\.tar", name)]


def _archive(root: Path, split: str) -> Source:
    index, class_names = imagenet.open_archive(root, split)
    store = index.store
    assert isinstance(store, ArchiveStore)
    file = os.path.basename(store.path)
    plain = [store.name(i).rsplit(":", 1)[1].rsplit("/", 1)[-1] for i in range(len(index))]
    names = [f"{index.classes[label]}/{name}" for label, name in zip(index.labels.tolist(), plain)]
    one = np.zeros(len(index), np.int32)
    return Source(
        str(root), index.classes, class_names, index.labels, names, [file], one, store.offsets, store.sizes
    )  # fmt: skip


def _folder(storage: Storage, split: str) -> Source:
    index: SampleIndex = index_folder(Path(storage.root), split)
    paths = [index.store.path(i) for i in range(len(index))]
    return _of_files(storage.root, split, index.classes, index.labels, paths)


def _remote_folder(storage: Storage, split: str) -> Source:
    ignored = scan.Ignored()
    paths = [
        path
        for path in storage.tree(split)
        if "/" in path and not path.startswith(".") and ignored.accepts(path.rsplit("/", 1)[1], split)
    ]
    if not paths:
        raise DataError(f"{storage.path(split)} holds no CLASS/* images; lay them out as {split}/CLASS/*")
    of = [path.split("/", 1)[0] for path in paths]
    classes = sorted(set(of))
    label = {name: i for i, name in enumerate(classes)}
    order = sorted(range(len(paths)), key=lambda i: (of[i], _walk_key(paths[i])))
    labels = np.array([label[of[i]] for i in order], np.int32)
    return _of_files(storage.root, split, classes, labels, [paths[i] for i in order])


def _walk_key(path: str) -> tuple[str, str]:
    folder, name = path.rsplit("/", 1)
    return folder, name


def _of_files(root: str, split: str, classes: list[str], labels: np.ndarray, paths: list[str]) -> Source:
    n = len(paths)
    whole, unknown = np.full(n, WHOLE, np.int64), np.zeros(n, np.int64)
    files = [f"{split}/{path}" for path in paths]
    return Source(root, classes, classes, labels, paths, files, np.arange(n, dtype=np.int32), whole, unknown)


def _tars(storage: Storage, split: str) -> Source:
    """WebDataset tars: KEY.cls holds the label as a number, KEY.jpg (or another suffix) the image."""
    if not storage.is_local:
        raise DataError(f"source ({storage.root}) has tars at a URL, which cannot be packed; copy them here first")
    files, rows = _tar_names(storage, split), []
    for k, file in enumerate(scan.watched(files, len(files), f"indexing {split}-*.tar")):
        rows += [(label, f"{file.removesuffix('.tar')}/{name}", k, offset, size)
                 for label, name, offset, size in _samples(Path(storage.path(file)))]  # fmt: skip
    labels = [row[0] for row in rows]
    if not rows:
        raise DataError(f"{storage.path(files[0])} holds no pair of KEY.cls and an image; it is no WebDataset tar")
    count = _num_classes(storage, max(labels) + 1)
    width = len(str(count - 1))
    classes = [f"class{c:0{width}d}" for c in range(count)]
    rows.sort(key=lambda row: (row[0], row[1]))
    return Source(
        storage.root,
        classes,
        classes,
        np.array([row[0] for row in rows], np.int32),
        [f"{classes[row[0]]}/{row[1]}" for row in rows],
        files,
        np.array([row[2] for row in rows], np.int32),
        np.array([row[3] for row in rows], np.int64),
        np.array([row[4] for row in rows], np.int64),
    )


def _samples(tar: Path) -> list[tuple[int, str, int, int]]:
    """(label, name, offset, size in bytes) of each pair in a WebDataset tar."""
    labels: dict[str, int] = {}
    images: dict[str, Member] = {}
    fd = os.open(tar, os.O_RDONLY)
    try:
        for member in tar_members(fd, tar, 0, os.fstat(fd).st_size, may_be_cut=True):
            folder, _, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            key = f"{folder}/{key}" if folder else key
            if suffix == "cls":
                labels[key] = _label(os.pread(fd, member.size, member.offset), f"{tar}:{member.name}")
            elif f".{suffix}".lower().endswith(scan.SUFFIXES):
                images[key] = member
    finally:
        os.close(fd)
    alone = sorted(labels.keys() ^ images.keys())
    if alone:
        raise DataError(f"{tar} holds {scan.listed(alone)} without both an image and a label; mend or remove the tar")
    return [(labels[key], member.name, member.offset, member.size) for key, member in images.items()]


def _label(text: bytes, where: str) -> int:
    if not text.strip().isdigit():
        raise DataError(f"{where} must hold the label as a number, got {text[:20]!r}")
    return int(text)


def _num_classes(storage: Storage, at_least: int) -> int:
    """Of all splits: the labels of one may stop before the other's."""
    found = [at_least]
    for split in ("train", "val"):
        for file in _tar_names(storage, split):
            found.append(1 + max((label for label, *_ in _samples(Path(storage.path(file)))), default=0))
    return max(found)
