"""Packed shards: uncompressed tar archives in WebDataset layout, and an index that finds any image in them.

    ROOT/index.json           the commit: what there is, with a SHA-256 for each file
    ROOT/train-000000.tar     KEY.cls, KEY.jpg (or KEY.npy), ...; KEY is the position in the order of the shards
    ROOT/train.samples.npy    a SAMPLE for each image, in the order (class, name) of every index here
    ROOT/train.names.txt      their names, CLASS/FILE

The one rule: an image is found by (shard, offset, size), so any order can be read, and the order of the files on disk
never matters.
"""

import json
import os
import resource
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.data.index import SampleIndex
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.errors import DataError

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # of the image's first byte in the shard
        ("size", "<u4"),  # bytes
        ("label", "<i4"),
        ("width", "<u2"),  # pixels
        ("height", "<u2"),
        ("crc32", "<u4"),  # of the image's bytes
    ]
)
NPY_HEADER = 128  # bytes before the pixels of a raw image
INDEX = "index.json"


class ShardStore:
    """Images in shards, read in place by any number of threads.

    Each shard is opened when its first image is read and stays open. Pickles without the open files.
    """

    def __init__(self, root: str, split: str, samples: np.ndarray, raw_size: int | None) -> None:
        self.root, self.split, self.samples, self.raw_size = root, split, samples, raw_size
        self._open: dict[int, int] = {}  # shard -> file descriptor
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes

    @property
    def shards(self) -> np.ndarray:
        """uint32 [N]: the shard of each image."""
        return self.samples["shard"]

    def take(self, positions: np.ndarray) -> "ShardStore":
        return ShardStore(self.root, self.split, self.samples[positions], self.raw_size)

    def read(self, i: int) -> bytes:
        shard, offset, size, *_ = self.samples[i].item()
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) < size:
            raise OSError(f"the shard ends at byte {offset + len(data):,}, inside the image")
        return data

    def read_rows(self, i: int, top: int, rows: np.ndarray) -> None:
        """Fill `rows`, uint8 [n, raw_size, 3], with the rows from `top` on of the raw image `i`."""
        shard, offset, *_ = self.samples[i].item()
        at = offset + NPY_HEADER + top * self.raw_size * 3
        if os.preadv(self._descriptor(shard), [rows], at) < rows.nbytes:
            raise OSError("the shard ends inside the image")

    def name(self, i: int) -> str:
        sample = self.samples[i]
        return f"{self._path(int(sample['shard']))}:{sample['offset']}"

    def _path(self, shard: int) -> str:
        return f"{self.root}/{self.split}-{shard:06d}.tar"

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.get(shard)
        if descriptor is None:
            with self._lock:
                if shard not in self._open:
                    self._open[shard] = os.open(self._path(shard), os.O_RDONLY)
                descriptor = self._open[shard]
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "split": self.split, "samples": np.array(self.samples), "raw_size": self.raw_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


@dataclass(frozen=True)
class ShardIndex:
    """What index.json says."""

    classes: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_index(storage: Storage) -> ShardIndex | None:
    """None where nothing is committed. Raises DataError where it is damaged."""
    try:
        found = json.loads(storage.read(INDEX))
        return ShardIndex(found["classes"], found["class_names"], found["splits"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        path = storage.path(INDEX)
        raise DataError(f"{path} is damaged ({error}); prepare the shards again, with overwrite=true") from error


def open_shards(root: str) -> tuple[SampleIndex, SampleIndex, list[str]]:
    """(train, val, names of the classes for humans) of finished shards. Raises DataError.

    Samples are mapped into memory, not read: all ranks of a node share one copy, and a start takes milliseconds.
    """
    storage = Storage(absolute(root))
    index = read_index(storage)
    if index is None:
        remedy = "give the root of a finished preparation, or finish it: python -m alexnet_ddp.prepare"
        raise DataError(f"data.root ({root}) holds no {INDEX}; {remedy}")
    missing = sorted({"train", "val"} - index.splits.keys())
    if missing:
        raise DataError(f"data.root ({root}) has no {missing[0]} shards; prepare them: split={missing[0]}")
    train, val = (_open_split(storage, index, split) for split in ("train", "val"))
    _allow_open_files(sum(len(entry["shards"]) for entry in index.splits.values()))
    return train, val, index.class_names


def _open_split(storage: Storage, index: ShardIndex, split: str) -> SampleIndex:
    entry = index.splits[split]
    for shard in entry["shards"]:
        size = storage.size(shard["name"])
        if size != shard["bytes"]:
            there = "is not there" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
            raise DataError(f"{storage.path(shard['name'])} {there}; copy it again, or prepare it again")
    path = Path(storage.path(f"{split}.samples.npy"))
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the shards again") from error
    if samples.dtype != SAMPLE or len(samples) != entry["images"]:
        raise DataError(f"{path} is not the one that {INDEX} was written for; prepare the shards again")
    raw_size = entry["recipe"]["size"] if entry["recipe"]["encoding"] == "raw" else None
    store = ShardStore(storage.root, split, samples, raw_size)
    return SampleIndex(index.classes, np.ascontiguousarray(samples["label"]), store)


def _allow_open_files(count: int) -> None:
    """Each shard stays open: ask for so many files, where the soft limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
