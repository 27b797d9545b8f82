"""The images of a split: N images as a few arrays, not as N Python objects.

They are sorted by (label, file name), for folders, archives and shards alike. A position therefore
means the same image on every rank, after every restart and in every storage form.
"""

import errno
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.data.image import read_file
from alexnet_ddp.data.sources import scan
from alexnet_ddp.data.sources.classes import BY_NAME, ClassOrder, class_difference
from alexnet_ddp.data.sources.source import ImageSource
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import listed

# At each start, the sizes in a cached index are compared with the files: all of them up to
# _CHECKED images, otherwise at least _SAMPLED, evenly spread (comparing 1.28 million takes 8 s).
_CHECKED = 50_000
_SAMPLED = 10_000
_THREADS = 8  # threads that list folders: network file systems answer slowly
_NO_FILE = -1  # the size of a link without a target


@dataclass(frozen=True, eq=False)
class FileStore:
    """Images that are files below `root`."""

    root: str
    blob: np.ndarray  # uint8: the relative paths, concatenated
    ends: np.ndarray  # int64 [N]: the end of each path in blob
    sizes: np.ndarray  # int64 [N]: bytes of each file when it was listed

    @classmethod
    def pack(cls, root: str, paths: Iterable[str], sizes: np.ndarray | None = None) -> "FileStore":
        """A store of `paths`, relative to `root`."""
        blob, ends = bytearray(), array("q")
        for path in paths:
            blob += os.fsencode(path)
            ends.append(len(blob))
        sizes = np.full(len(ends), _NO_FILE, np.int64) if sizes is None else sizes
        return cls(root, np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64), sizes)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def nbytes(self) -> int:
        return self.blob.nbytes + self.ends.nbytes + self.sizes.nbytes

    def path(self, i: int) -> str:
        """The path of image `i`, relative to root."""
        return os.fsdecode(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())

    def take(self, positions: np.ndarray) -> "FileStore":
        return self.pack(self.root, map(self.path, positions.tolist()), self.sizes[positions])

    def read(self, i: int) -> bytes:
        return read_file(self.name(i))

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.path(i))

    def dimensions(self, indices: np.ndarray) -> None:
        return None

    def will_need(self, indices: np.ndarray) -> None:
        """Does nothing: opening each file for a hint would cost as much as reading it."""


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """N images of C classes, sorted by (label, file name).

    An index i of an image may also be one of its repeats: i + N * k. See ClassSampling.
    """

    classes: list[str]  # in the order of the labels
    labels: np.ndarray  # int32 [N]: positions in classes
    store: ImageSource
    # SHA-256 (hex) of the names CLASS/FILE, one per line; for a subset, the fingerprint of the
    # whole index.
    names: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        return self.labels.nbytes + self.store.nbytes

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises DataError with its name if it cannot be read."""
        try:
            return self.store.read(i % len(self))
        except OSError as error:
            why = error.strerror or error
            raise DataError(
                f"{self.name(i)} cannot be read ({why}); put it back, or start again without it"
            ) from error

    def will_need(self, indices: np.ndarray) -> None:
        """A hint that these images will be read soon. Takes about a microsecond per image."""
        with suppress(OSError):  # the read will report it
            self.store.will_need(indices % len(self))

    def dimensions(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Widths and heights in pixels, int64 [n], if the store knows them."""
        return self.store.dimensions(indices % len(self))

    def name(self, i: int) -> str:
        """A path, or archive:member, for messages."""
        return self.store.name(i % len(self))

    def subset(self, n: int | None) -> "SampleIndex":
        """A fixed choice of `n` images, in their order here; all of them for None or n >= N."""
        if n is None or n >= len(self):
            return self
        kept = np.sort(rng.permutation(rng.fold(rng.SUBSET), len(self))[:n])
        return SampleIndex(
            self.classes, self.labels[kept], self.store.take(kept), self.fingerprint()
        )

    def fingerprint(self) -> str:
        """A string that identifies the data: "v2:" and a SHA-256 (hex).

        It covers the classes, and the label, the name CLASS/FILE and the size of each image. It
        does not depend on the path of the data, nor on whether folders, archives or shards contain
        the images. Images that were resized or re-encoded for shards have other sizes, hence
        another fingerprint. An image replaced by another one of equal size is not detected.
        """
        digest = hashlib.sha256(json.dumps([len(self), self.classes, self.names]).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        digest.update(self.store.sizes.astype("<i8").tobytes())
        return f"v2:{digest.hexdigest()}"


def index_folder(
    root: Path, split: str, order: ClassOrder = BY_NAME, option: str = "data.root"
) -> SampleIndex:
    """The images of root/split/CLASS/**, ordered as by torchvision's ImageFolder.

    Hidden files and folders are left out; a warning counts everything that was left out. The
    result is cached until a folder in root/split changes or an image has another size.
    option: that gave root, for messages.
    Raises DataError if root, split or every class is missing, if images lie outside of the class
    folders, or if a class of `train` has no images.
    """
    top = Path(os.path.abspath(root)) / split
    if not os.path.isdir(root):
        raise DataError(
            f"{option} ({root}) is not a folder; give one that contains {split}/CLASS/*"
        )
    if not top.is_dir():
        remedy = f"arrange the images as {split}/CLASS/*"
        if os.path.exists(os.path.join(root, "index.json")):
            remedy = "if it contains the shards of prepare, write data=shards"
        raise DataError(f"{option} ({root}) contains no folder {split}; {remedy}")

    return _index(top, order, needs_all=split == "train")


def index_classes(top: Path, order: ClassOrder = BY_NAME) -> SampleIndex:
    """The images of top/CLASS/**, by the same rules. Raises DataError, also for an empty class."""
    return _index(Path(os.path.abspath(top)), order, needs_all=True)


def is_one_class(folder: Path) -> bool:
    """Whether a folder contains images and no folders, as that of one class does."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries]
    except OSError:
        return False
    visible, ignored = [one for one in found if not one[0].startswith(".")], scan.Ignored()
    has_folders = any(is_folder for _, is_folder in visible)
    return not has_folders and any(ignored.accepts(name, str(folder)) for name, _ in visible)


def _index(top: Path, order: ClassOrder, needs_all: bool) -> SampleIndex:
    """needs_all: a class without images is an error."""

    def build(stamps: scan.Stamps) -> scan.Arrays:
        return _scan(str(top), stamps, order, needs_all)

    try:
        found = scan.cached(
            "folder", top, build, order.key(), lambda arrays: _is_current(top, arrays)
        )
    except OSError as error:
        raise DataError(
            f"{error.filename or top} cannot be read ({error.strerror}); check its permissions"
        ) from error
    scan.report(found)
    names = scan.from_json(found["names"])
    return SampleIndex(scan.from_json(found["classes"]), found["labels"], _store(top, found), names)


def list_images(top: str) -> tuple[FileStore, list[str]]:
    """(the images below the folder `top`, notes about what was left out).

    Applies the same rules as training. Raises DataError.
    """
    top = top.rstrip("/") or "/"
    try:
        content = _list_class(top)
    except OSError as error:
        raise DataError(
            f"{error.filename or top} cannot be read ({error.strerror}); check its permissions"
        ) from error
    prefix = top.rstrip("/") + "/"
    relative = (path.removeprefix(prefix) for path in content.paths())
    sizes = np.frombuffer(content.sizes, np.int64)
    return FileStore.pack(top, relative, sizes), content.ignored.notes()


def _store(top: Path, found: scan.Arrays) -> FileStore:
    return FileStore(str(top), found["blob"], found["ends"], found["sizes"])


def _is_current(top: Path, found: scan.Arrays) -> bool:
    """Whether the files still have the sizes in the index.

    This detects rewritten files, which leave the times of their folder unchanged. For a small index
    all files are compared, and the number of entries in each folder, in case the file system keeps
    no times for folders. For a larger index, an evenly spread sample is compared.
    """
    store, entries = _store(top, found), scan.from_json(found["entries"])
    if len(store.sizes) <= _CHECKED and any(
        len(os.listdir(folder)) != count for folder, count in entries.items()
    ):
        return False
    return have_sizes(store)


def have_sizes(store: FileStore) -> bool:
    """Whether the files have the sizes that the store says: all of them, or a sample of many."""
    n = len(store.sizes)
    return all(
        size_of(store.name(i)) == store.sizes[i]
        for i in range(0, n, 1 if n <= _CHECKED else n // _SAMPLED)
    )


def size_of(path: str) -> int:
    """Bytes of a file, _NO_FILE if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return _NO_FILE


def names_digest(names: Iterable[str]) -> str:
    """SHA-256 (hex) of names, one per line, in the format of the names.txt of shards."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _scan(top: str, stamps: scan.Stamps, order: ClassOrder, needs_all: bool) -> scan.Arrays:
    ignored, paths, sizes, counts = scan.Ignored(), [], array("q"), []
    entries = {top: len(os.listdir(top))}
    classes = order.arrange(_class_names(top, stamps, ignored), top)
    with ThreadPoolExecutor(_THREADS) as pool:
        lists = pool.map(lambda name: _list_class(f"{top}/{name}"), classes)
        for content in scan.watched(lists, len(classes), f"indexing {top}"):
            stamps |= content.stamps
            ignored.merge(content.ignored)
            entries |= content.entries
            counts.append(len(content.sizes))
            sizes += content.sizes
            paths += [path[len(top) + 1 :] for path in content.paths()]
    store = FileStore.pack(top, paths, np.frombuffer(sizes, np.int64))
    empty = [name for name, count in zip(classes, counts) if not count]
    if empty and (len(empty) == len(classes) or needs_all):
        raise DataError(
            f"{top} holds no images of {listed(empty)}; add some to its folder, or remove it"
        )
    notes = ignored.notes() + [f"{top} holds no images of {listed(empty)}"] * bool(empty)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    texts = {"classes": classes, "notes": notes, "names": names_digest(paths), "entries": entries}
    arrays = {"labels": labels, "blob": store.blob, "ends": store.ends, "sizes": store.sizes}
    return arrays | {key: scan.to_json(value) for key, value in texts.items()}


def _class_names(top: str, stamps: scan.Stamps, ignored: scan.Ignored) -> list[str]:
    """The class folders of `top`, in no particular order. Raises DataError if there are none."""
    stamps[top] = scan.stamp(top)
    classes, stray = [], []
    with os.scandir(top) as entries:
        for name, is_folder in sorted((entry.name, _is_folder(entry)) for entry in entries):
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
        if stray and os.path.basename(top) not in ("train", "val"):
            above = os.path.dirname(top)
            remedy = f"if it is one class, give the folder above it ({above}); otherwise {remedy}"
        if stray and stray[0].startswith("ILSVRC2012_val_"):
            remedy = (
                "keep ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz: "
                "data=imagenet reads them in place"
            )
        raise DataError(f"{top} holds {lies}; {remedy}")
    return classes


@dataclass
class _Listed:
    """The images of a class."""

    # (folder, the names of its images, joined by "/"), sorted: a text needs less than N texts
    folders: list[tuple[str, str]]
    sizes: "array[int]"  # bytes of each image
    stamps: scan.Stamps  # of its folders
    entries: dict[str, int]  # folder -> number of its entries
    ignored: scan.Ignored

    def paths(self) -> Iterator[str]:
        """The paths of the images, sorted by folder, then by name."""
        for folder, names in self.folders:
            yield from (f"{folder}/{name}" for name in names.split("/"))


def _list_class(top: str) -> _Listed:
    """The images of `top` and all visible folders below it, in the order of sorted(os.walk(top)).

    Links are followed. Raises DataError for a link to a folder that contains it.
    """
    content = _Listed([], array("q"), {}, {}, scan.Ignored())
    found: list[tuple[str, str, array[int]]] = []
    todo: list[tuple[str, frozenset[str]]] = [(top, frozenset())]
    while todo:
        folder, above = todo.pop()
        content.stamps[folder], here = scan.stamp(folder), os.path.realpath(folder)
        if here in above:
            raise DataError(
                f"{folder} links to a folder that contains it, without end; remove that link"
            )
        images, count = [], 0
        with os.scandir(folder) as entries:
            for entry in entries:
                count += 1
                if not _is_folder(entry):
                    if content.ignored.accepts(entry.name, folder):
                        images.append((entry.name, _entry_size(entry)))
                elif entry.name.startswith("."):
                    content.ignored.add("hidden", entry.path)
                else:
                    todo.append((entry.path, above | {here}))
        content.entries[folder] = count
        if images:
            images.sort()
            names = "/".join(name for name, _ in images)
            found.append((folder, names, array("q", (size for _, size in images))))
    for folder, names, sizes in sorted(found):
        content.folders.append((folder, names))
        content.sizes += sizes
    return content


# Errors of a link without a target: it counts as a bad image, not as an unreadable folder.
_NO_TARGET = (errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _NO_TARGET:
            return False
        raise


def _entry_size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        if error.errno in _NO_TARGET:
            return _NO_FILE
        raise


def check_same_classes(train: SampleIndex, val: SampleIndex) -> None:
    """Raises DataError, naming the difference, if the two have different classes."""
    remedy = "add or remove these class folders"
    differ = class_difference("train", train.classes, "val", val.classes, remedy)
    if differ:
        raise DataError(f"train and val must have the same classes, but {differ}")
