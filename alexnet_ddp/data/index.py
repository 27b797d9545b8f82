"""What there is to train on: N images as a few arrays, never a Python object for each.

The one rule: the order is (class, file name), whatever holds the bytes, so the same data as folders or as archives is
the same data set, and a position in it means the same image on every rank and after every restart.
"""

import errno
import hashlib
import json
import os
import stat
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config.data import MAX_BYTES
from alexnet_ddp.data import scan
from alexnet_ddp.data.tars import ArchiveStore
from alexnet_ddp.errors import DataError


@dataclass(frozen=True, eq=False)
class FileStore:
    """Images that are files below `root`."""

    root: str
    blob: np.ndarray  # uint8: the relative paths, one after the other
    ends: np.ndarray  # int64 [N]: where each ends in blob

    @classmethod
    def pack(cls, root: str, paths: Iterable[str]) -> "FileStore":
        blob, ends = bytearray(), array("q")
        for path in paths:
            blob += os.fsencode(path)
            ends.append(len(blob))
        return cls(root, np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64))

    @property
    def nbytes(self) -> int:
        return self.blob.nbytes + self.ends.nbytes

    def path(self, i: int) -> str:
        """Relative to root."""
        return os.fsdecode(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())

    def take(self, positions: np.ndarray) -> "FileStore":
        return self.pack(self.root, map(self.path, positions.tolist()))

    def read(self, i: int) -> bytes:
        with open(self.name(i), "rb", buffering=0, opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            if found.st_size > MAX_BYTES:
                raise OSError(errno.EFBIG, f"{found.st_size:,} bytes, an image has at most {MAX_BYTES:,}")
            return file.read()

    def name(self, i: int) -> str:
        return f"{self.root}/{self.path(i)}"


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """N images of C classes, sorted by (class, file name): what there is, never what is in it."""

    classes: list[str]  # sorted
    labels: np.ndarray  # int32 [N]: positions in classes
    store: FileStore | ArchiveStore

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        return self.labels.nbytes + self.store.nbytes

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. DataError with its name when they cannot be had."""
        try:
            return self.store.read(i)
        except OSError as error:
            why = error.strerror or error
            raise DataError(f"{self.name(i)} cannot be read ({why}); put it back, or start again without it") from error

    def will_need(self, indices: np.ndarray) -> None:
        """A hint that these images are read soon. Costs a microsecond an image; errors show when they are read."""
        with suppress(OSError):
            getattr(self.store, "will_need", _nothing)(indices)

    def name(self, i: int) -> str:
        """A path, or archive:member, for messages."""
        return self.store.name(i)

    def subset(self, n: int | None) -> "SampleIndex":
        """The same `n` images each time, in the order they have here. All of them for None and for n >= N."""
        if n is None or n >= len(self):
            return self
        kept = np.sort(rng.permutation(rng.fold(rng.SUBSET), len(self))[:n])
        return SampleIndex(self.classes, self.labels[kept], self.store.take(kept))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the count, the classes and the labels: not of paths, since data may move or be repacked."""
        digest = hashlib.sha256(json.dumps([len(self), self.classes]).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to would wait for ever


def _nothing(indices: np.ndarray) -> None:
    pass


def index_folder(root: Path, split: str) -> SampleIndex:
    """The images of root/split/CLASS/**, as torchvision's ImageFolder orders them, but without hidden entries.

    Cached until a folder in root/split changes. What is left out is a warning; DataError when root, split or every
    class is missing, when images lie outside of the classes, or when a class of `train` has none.
    """
    top = Path(os.path.abspath(root)) / split
    if not os.path.isdir(root):
        raise DataError(f"data.root ({root}) is not a folder; give one that holds {split}/CLASS/*")
    if not top.is_dir():
        raise DataError(f"data.root ({root}) holds no folder {split}; lay the images out as {split}/CLASS/*")
    try:
        found = scan.cached("folder", top, lambda stamps: _scan_split(str(top), stamps))
    except OSError as error:
        raise DataError(f"{error.filename or top} cannot be read ({error.strerror}); check its permissions") from error
    scan.report(found)
    store = FileStore(str(top), found["blob"], found["ends"])
    return SampleIndex(scan.from_json(found["classes"]), found["labels"], store)


def list_images(top: str) -> tuple[list[str], list[str]]:
    """(the images below the folder `top`, notes about what was left out), by the rules that training follows."""
    ignored = scan.Ignored()
    try:
        folders = _image_folders(top.rstrip("/") or "/", {}, ignored)
    except OSError as error:
        raise DataError(f"{error.filename or top} cannot be read ({error.strerror}); check its permissions") from error
    return [os.path.join(folder, name) for folder, names in folders for name in names], ignored.notes()


def _scan_split(top: str, stamps: scan.Stamps) -> scan.Arrays:
    ignored, counts = scan.Ignored(), []
    classes = _class_names(top, stamps, ignored)

    def paths() -> Iterator[str]:
        for name in scan.watched(classes, len(classes), f"indexing {top}"):
            folders = _image_folders(f"{top}/{name}", stamps, ignored)
            counts.append(sum(len(names) for _, names in folders))
            for folder, names in folders:
                yield from (f"{folder[len(top) + 1 :]}/{name}" for name in names)

    store = FileStore.pack(top, paths())
    empty = [name for name, count in zip(classes, counts) if not count]
    if empty and (len(empty) == len(classes) or os.path.basename(top) == "train"):
        raise DataError(f"{top} holds no images of {scan.listed(empty)}; add some to its folder, or remove it")
    notes = ignored.notes() + [f"{top} holds no images of {scan.listed(empty)}"] * bool(empty)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    lists = {"classes": scan.to_json(classes), "notes": scan.to_json(notes)}
    return lists | {"labels": labels, "blob": store.blob, "ends": store.ends}


def _class_names(top: str, stamps: scan.Stamps, ignored: scan.Ignored) -> list[str]:
    stamps[top] = scan.stamp(top)
    classes, stray = [], []
    with os.scandir(top) as entries:
        for name, is_folder in sorted((entry.name, entry.is_dir()) for entry in entries):
            if is_folder and name.startswith("."):
                ignored.add("hidden", f"{top}/{name}")
            elif is_folder:
                classes.append(name)
            elif ignored.accepts(name, top):
                ignored.add("outside of the class folders", f"{top}/{name}")
                stray.append(name)
    if not classes:
        lies = f"{len(stray):,} images but no class folders" if stray else "no class folders"
        remedy = f"move the images into {top}/CLASS/"
        if stray and stray[0].startswith("ILSVRC2012_val_"):
            remedy = "keep ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz: data=imagenet reads them in place"
        raise DataError(f"{top} holds {lies}; {remedy}")
    return classes


def _image_folders(top: str, stamps: scan.Stamps, ignored: scan.Ignored) -> list[tuple[str, list[str]]]:
    """(folder, names of its images) for `top` and every visible folder below it, in the order of sorted(os.walk(top)).

    Links are followed; one that leads back to a folder above it is a DataError, since it has no end.
    """
    found: list[tuple[str, list[str]]] = []
    todo: list[tuple[str, frozenset[str]]] = [(top, frozenset())]
    while todo:
        folder, above = todo.pop()
        stamps[folder], here = scan.stamp(folder), os.path.realpath(folder)
        if here in above:
            raise DataError(f"{folder} links to a folder that contains it, without end; remove that link")
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    if ignored.accepts(entry.name, folder):
                        names.append(entry.name)
                elif entry.name.startswith("."):
                    ignored.add("hidden", entry.path)
                else:
                    todo.append((entry.path, above | {here}))
        found.append((folder, sorted(names)))
    return sorted(found)


def check_same_classes(train: SampleIndex, val: SampleIndex) -> None:
    """DataError naming the classes that only one of the two has."""
    differ = class_difference("train", train.classes, "val", val.classes)
    if differ:
        raise DataError(f"train and val must have the same classes, but {differ}; add or remove these class folders")


def class_difference(one: str, its: list[str], other: str, others: list[str]) -> str:
    """'only ONE has a, b; only OTHER has c', or nothing where the classes are the same."""
    sides = ((one, set(its) - set(others)), (other, set(others) - set(its)))
    return "; ".join(f"only {side} has {scan.listed(sorted(names))}" for side, names in sides if names)
