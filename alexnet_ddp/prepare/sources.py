"""Lists the images to pack: ImageNet archives, class folders, shards, tars, or tables.

A name consists of class and file, without the location of the source: the same images give the
same plan as a folder or as an archive.
"""

import hashlib
import io
import logging
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from alexnet_ddp.data.sources import imagenet, scan
from alexnet_ddp.data.sources.classes import BY_NAME, ClassOrder
from alexnet_ddp.data.sources.index import FileStore, index_classes, index_folder
from alexnet_ddp.data.sources.shard_index import INDEX, check_file, check_split, read_index
from alexnet_ddp.data.sources.split import choose_val
from alexnet_ddp.data.sources.tars import ArchiveStore, Member, tar_members
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.prepare.tables import copies_of, copy_images, read_table, table_files
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.printing import listed

log = logging.getLogger(__name__)

WHOLE = -1  # an offset: the file is the image
_MAX_CLASSES = 1_000_000  # a larger label is damage


@dataclass(frozen=True, eq=False)
class Source:
    """The N images of a split, in the order (class, file name) of the index."""

    root: str  # absolute, or a URL
    classes: list[str]  # in the order of the labels
    class_names: list[str]  # readable names, in the order of the labels
    labels: np.ndarray  # int32 [N]
    names: list[str]  # [N]: CLASS/FILE
    files: list[str]  # relative to root
    file_of: np.ndarray  # int32 [N]: position in files
    offsets: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N], in bytes; 0 if unknown
    # Writes `files`, if they are copies, before a shard is written.
    copy: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Source":
        """Return the images at the positions `rows`, of the same files and classes."""
        return replace(
            self,
            labels=self.labels[rows],
            names=[self.names[i] for i in rows.tolist()],
            file_of=self.file_of[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
        )


def splits_of(root: str) -> list[str]:
    """Return the splits of `root`. Raises DataError if it has none, or does not exist."""
    storage = _existing(root)
    found = [split for split in ("train", "val") if _kind(storage, split)]
    if not found:
        rule = (
            f"{imagenet.TRAIN}, train/CLASS/*, train-*.tar in WebDataset layout, or train-*.parquet"
        )
        remedy = "val_fraction=0.15 divides CLASS/*"
        raise DataError(
            f"source ({root}) contains no images to pack; it must have {rule}; {remedy}"
        )
    return found


def _existing(root: str) -> Storage:
    storage = Storage(absolute(root))
    if not storage.exists():
        raise DataError(
            f"source ({root}) does not exist; give the directory or the URL of the images"
        )
    return storage


def divided_source(
    root: str, val_fraction: float, order: ClassOrder, shards: str
) -> dict[str, Source]:
    """Divide the images of `root`, which has train or CLASS/*, as data.val_fraction does.

    Raises DataError, also if `root` has val; ConfigError if `order` would be ignored.
    """
    storage, given = _existing(root), f"val_fraction ({val_fraction})"
    if _kind(storage, "val"):
        raise DataError(f"source ({root}) contains val, so {given} divides nothing; leave it out")
    if _kind(storage, "train"):
        whole = open_source(root, "train", order, shards)
    elif absolute(shards).startswith(storage.root.rstrip("/") + "/"):
        rule = f"would be a class of source ({root}) when it is read again"
        raise ConfigError(f"root ({shards}) {rule}; give a directory outside of it")
    else:
        whole = _class_folders(storage, "", order)
    is_val = choose_val(whole.names, whole.labels, val_fraction, None, given)
    parts = {"train": np.flatnonzero(~is_val), "val": np.flatnonzero(is_val)}
    return {split: whole.take(rows) for split, rows in parts.items()}


def open_source(
    root: str, split: str, order: ClassOrder = BY_NAME, shards: str | None = None
) -> Source:
    """List the images of `split`. Raises DataError, or ConfigError if `order` would be ignored.

    shards: where the shards are written, which also takes copies of images in tables.
    """
    storage = Storage(absolute(root))
    kind = _kind(storage, split)
    if kind == "archive":
        return _archive(Path(storage.root), split, order)
    if kind == "folder":
        return _class_folders(storage, split, order)
    if kind == "tables":
        assert shards is not None  # of a preparation
        return _tables(storage, split, order, Storage(absolute(shards)))
    if kind and order != BY_NAME:
        raise ConfigError(
            f"class_order ({order.choice}) would be ignored: the {kind} of source ({root}) "
            "contain the labels; leave it out"
        )
    if kind == "shards":
        return shards_source(storage, split)
    if kind == "tars":
        return tars_source(storage, split)
    raise DataError(
        f"source ({root}) contains no {split} images; "
        "give the splits that it has: split=train or split=val"
    )


def _kind(storage: Storage, split: str) -> str | None:
    if storage.is_local and storage.exists({"train": imagenet.TRAIN, "val": imagenet.VAL}[split]):
        if split == "val" and not storage.exists(imagenet.DEVKIT):
            raise DataError(
                f"{storage.root} lacks {imagenet.DEVKIT}, which contains the labels of "
                f"{imagenet.VAL}; add it"
            )
        return "archive"
    if table_files(storage, split):
        return "tables"
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


def _class_folders(storage: Storage, split: str, order: ClassOrder) -> Source:
    """The images of split/CLASS/*, or of CLASS/* if `split` is empty."""
    if not storage.is_local:
        return _remote_folder(storage, split, order)
    top = Path(storage.root)
    index = index_folder(top, split, order) if split else index_classes(top, order)
    store = index.store
    assert isinstance(store, FileStore)
    paths = [store.path(i) for i in range(len(index))]
    return _of_files(storage.root, split, index.classes, index.labels, paths, store.sizes)


def _remote_folder(storage: Storage, split: str, order: ClassOrder) -> Source:
    """As index_folder, but with a single listing of the store."""
    ignored = scan.Ignored()
    sizes = storage.tree_sizes(split)
    paths = [path for path in sizes if _is_image(path, split, ignored)]
    for note in ignored.notes():
        log.warning(note)
    if not paths:
        raise DataError(
            f"{storage.path(split)} contains no CLASS/* images; "
            f"lay them out as {posixpath.join(split, 'CLASS/*')}"
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
        ignored.add("hidden", posixpath.join(split, path))
    elif ignored.accepts(name, posixpath.join(split, *folders)):
        if folders:
            return True
        ignored.add("outside of the class folders", posixpath.join(split, path))
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
    whole, files = np.full(n, WHOLE, np.int64), [posixpath.join(split, path) for path in paths]
    return Source(
        root, classes, classes, labels, paths, files, np.arange(n, dtype=np.int32), whole, sizes
    )


def _tables(storage: Storage, split: str, order: ClassOrder, shards: Storage) -> Source:
    """The images of a Hugging Face data set. The files are copies in `shards`, not yet written."""
    table = read_table(storage, split, order)
    copies = copies_of(storage, split, table)
    offsets = np.zeros(len(table.sizes), np.int64)
    for k in range(len(copies)):
        rows = np.flatnonzero(table.file_of == k)
        offsets[rows[1:]] = np.cumsum(table.sizes[rows])[:-1]
    places = sorted(range(len(table.names)), key=lambda i: (table.labels[i], table.names[i]))
    return Source(
        shards.root,
        table.classes,
        table.classes,
        table.labels[places],
        [table.names[i] for i in places],
        copies,
        table.file_of[places],
        offsets[places],
        table.sizes[places],
        partial(copy_images, storage, shards, table, copies),
    )


def tar_names(storage: Storage, split: str) -> list[str]:
    return [name for name in storage.names() if re.fullmatch(rf"{split}-.*\.tar", name)]


def shards_source(storage: Storage, split: str) -> Source:
    """List our own shards. Their names, classes and order are kept. Raises DataError."""
    index = read_index(storage)
    if index is None:
        raise DataError(f"{storage.root} contains no {INDEX}; give the root of finished shards")
    entry = index.splits[split]
    if entry["recipe"]["encoding"] == "raw":
        raise DataError(
            f"source ({storage.root}) contains raw pixels, which cannot be packed again; "
            "give the source of these shards"
        )
    content = {kind: storage.read(f"{split}.{kind}") for kind in ("samples.npy", "names.txt")}
    for kind, data in content.items():
        check_file(storage, f"{split}.{kind}", entry, hashlib.sha256(data).hexdigest())
    samples = np.load(io.BytesIO(content["samples.npy"]), allow_pickle=False)
    if storage.is_local:
        check_split(storage, entry, split, samples)
    names = content["names.txt"].decode(errors="surrogateescape").split("\n")[:-1]
    files = [shard["name"] for shard in entry["shards"]]
    places = [
        samples[name].astype(kind)
        for name, kind in (("shard", np.int32), ("offset", np.int64), ("size", np.int64))
    ]
    return Source(
        storage.root,
        index.classes,
        index.class_names,
        samples["label"].copy(),
        names,
        files,
        *places,
    )


def tars_source(storage: Storage, split: str) -> Source:
    """List WebDataset tars, of pairs KEY.cls (the label as a number) and KEY.jpg (or .png ...).

    Raises DataError.
    """
    if not storage.is_local:
        raise DataError(
            f"source ({storage.root}) has tars at a URL, which cannot be packed; "
            "copy them to this machine first"
        )
    files, rows = tar_names(storage, split), []
    for k, file in enumerate(scan.watched(files, len(files), f"indexing {split}-*.tar")):
        rows += [(label, f"{file.removesuffix('.tar')}/{name}", k, offset, size)
                 for label, name, offset, size in _samples(Path(storage.path(file)))]  # fmt: skip
    labels = [row[0] for row in rows]
    if not rows:
        raise DataError(
            f"{storage.path(files[0])} contains no pair of KEY.cls and an image; "
            "it is not a WebDataset tar"
        )
    count = _num_classes(storage, max(labels) + 1)
    width = len(str(count - 1))
    classes = [f"class{c:0{width}d}" for c in range(count)]
    log.warning(
        "%s has labels but no class names, which only index.json of shards has: using %s to %s",
        files[0],
        classes[0],
        classes[-1],
    )
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
                labels[key] = _label(
                    os.pread(fd, member.size, member.offset), f"{tar}:{member.name}"
                )
            elif f".{suffix}".lower() in scan.SUFFIXES:  # not KEY.seg.png, a second file of KEY
                images[key] = member
    finally:
        os.close(fd)
    alone = sorted(labels.keys() ^ images.keys())
    if alone:
        raise DataError(
            f"{tar} contains {listed(alone)} without both an image and a label; "
            "fix or remove the tar"
        )
    return [
        (labels[key], member.name, member.offset, member.size) for key, member in images.items()
    ]


def _label(text: bytes, member: str) -> int:
    if not text.strip().isdigit() or int(text) >= _MAX_CLASSES:
        raise DataError(
            f"{member} must contain the label as a number below {_MAX_CLASSES:,}, "
            f"got {text[:20]!r}; fix or remove the tar"
        )
    return int(text)


def _num_classes(storage: Storage, at_least: int) -> int:
    """Number of classes over all splits: one split may lack the last classes."""
    found = [at_least]
    for split in ("train", "val"):
        for file in tar_names(storage, split):
            found.append(
                1 + max((label for label, *_ in _samples(Path(storage.path(file)))), default=0)
            )
    return max(found)
