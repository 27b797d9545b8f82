"""Packed shards: uncompressed tar archives in WebDataset layout, and an index of their images.

    ROOT/index.json           lists all files with a SHA-256 each; written last, as the commit
    ROOT/train-000000.tar     KEY.cls, KEY.jpg (or KEY.npy), ...; KEY is the position in the shards
    ROOT/train.samples.npy    a SAMPLE for each image, sorted by (class, name)
    ROOT/train.names.txt      the names CLASS/FILE, in the same order

Images are read by (shard, offset, size), so they can be read in any order, and the order of the
images in the shards does not matter.
"""

import math
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.config import ConfigError, ShardsConfig, Shuffle
from alexnet_ddp.data.cache import NodeCache
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.shard_index import (
    INDEX,
    REMEDY,
    ShardIndex,
    check_file,
    check_split,
    read_index,
    stats_of,
    wrong_shards,
)
from alexnet_ddp.data.sources.tars import pread, will_need
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.runtime.errors import DataError

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
SAMPLE_FIELDS = SAMPLE.names or ()
NPY_HEADER = 128  # bytes before the pixels of a raw image


@dataclass(frozen=True)
class Shards:
    """The shard files of a split: local ones, or remote ones that are fetched to this node."""

    storage: Storage
    names: list[str]
    sha256: list[str]
    sizes: list[int]  # bytes
    cache: NodeCache | None

    def open(self, shard: int) -> int:
        """A file descriptor, for reading. Raises OSError."""
        if self.cache is not None:
            return self.cache.open(self.names[shard], self.sha256[shard], self.sizes[shard])
        return os.open(self.storage.path(self.names[shard]), os.O_RDONLY)


class ShardStore:
    """Images in shards, read in place. Safe to use from several threads.

    A local shard is opened when its first image is read and stays open. A shard in the node's cache
    is opened for each image, so that the cache can delete it. Pickles without the open files.
    """

    def __init__(self, files: Shards, samples: np.ndarray, raw_size: int | None) -> None:
        """samples: SAMPLE [N]; raw_size: height and width of raw images, None if encoded."""
        self.files = files
        self.samples = samples.view(np.ndarray)  # indexing a memmap is slower
        self.raw_size = raw_size
        self._open: dict[int, int] = {}  # shard -> file descriptor
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N]: bytes of each image; the CRC-32 for raw images, which all have one size."""
        return self.samples["crc32" if self.raw_size else "size"].astype(np.int64)

    @property
    def shards(self) -> np.ndarray:
        """uint32 [N]: the shard of each image."""
        return self.samples["shard"]

    def take(self, positions: np.ndarray) -> "ShardStore":
        return ShardStore(self.files, self.samples[positions], self.raw_size)

    def dimensions(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(widths, heights) in pixels, int64 [n] each."""
        found = self.samples[indices]
        return found["width"].astype(np.int64), found["height"].astype(np.int64)

    def read(self, i: int) -> bytes:
        shard, offset, size, *_ = self.samples[i].item()
        return self._open_for(shard, pread, size, offset)

    def read_rows(self, i: int, top: int, rows: np.ndarray) -> None:
        """Read raw image `i` from row `top` into `rows`, uint8 [n, raw_size, 3]. Raises OSError."""
        assert self.raw_size is not None  # only raw images have rows
        shard, offset, *_ = self.samples[i].item()
        at = offset + NPY_HEADER + top * self.raw_size * 3
        count = self._open_for(shard, os.preadv, [rows], at)
        if count < rows.nbytes:
            raise OSError(f"the file ends at byte {at + count:,}, inside the image")

    def will_need(self, indices: np.ndarray) -> None:
        """Ask the kernel to read these images ahead, or start to fetch their shards.

        Returns at once. Raises OSError.
        """
        wanted, files = self.samples[indices], self.files
        if files.cache is not None:
            for shard in np.unique(wanted["shard"]).tolist():
                files.cache.will_need(files.names[shard], files.sha256[shard], files.sizes[shard])
            return
        for shard, offset, size in zip(
            *(wanted[name].tolist() for name in ("shard", "offset", "size"))
        ):
            will_need(self._descriptor(shard), offset, size)

    def name(self, i: int) -> str:
        sample = self.samples[i]
        shard = self.files.names[int(sample["shard"])]
        return f"{self.files.storage.path(shard)}:{sample['offset']}"

    def _open_for(self, shard: int, call: Callable, *arguments: Any) -> Any:
        """Return call(descriptor, *arguments), with the descriptor of `shard`."""
        if self.files.cache is None:
            return call(self._descriptor(shard), *arguments)
        descriptor = self.files.open(shard)
        try:
            return call(descriptor, *arguments)
        finally:
            os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.get(shard)
        if descriptor is None:
            with self._lock:
                if shard not in self._open:
                    self._open[shard] = self.files.open(shard)
                descriptor = self._open[shard]
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "samples": np.array(self.samples), "raw_size": self.raw_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardStore.__init__(self, **state)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def open_shards(cfg: ShardsConfig) -> tuple[SampleIndex, SampleIndex, list[str]]:
    """Open finished shards: (train, val, readable class names).

    Samples are memory-mapped: all ranks of a node share one copy, and opening takes milliseconds.
    Raises DataError, or ConfigError if the cache options do not suit the shards.
    """
    storage = Storage(absolute(cfg.root))
    try:
        index = read_index(storage)
    except OSError as error:
        raise DataError(
            f"data.root ({cfg.root}) cannot be read ({error}); check the address and its access"
        ) from error
    if index is None:
        raise DataError(
            f"data.root ({cfg.root}) holds no {INDEX}; give the root of a finished preparation, "
            "or finish it: python -m alexnet_ddp.prepare"
        )
    missing = sorted({"train", "val"} - index.splits.keys())
    if missing:
        remedy = ", or divide the images with val_fraction=0.15" if missing == ["val"] else ""
        raise DataError(
            f"data.root ({cfg.root}) has no {missing[0]} shards; "
            f"prepare them: split={missing[0]}{remedy}"
        )
    cache = _cache(cfg, storage, index)
    train, val = (open_split(storage, index, split, cache) for split in ("train", "val"))
    if cache is None:
        _allow_open_files(sum(len(entry["shards"]) for entry in index.splits.values()))
    return train, val, index.class_names


def _cache(cfg: ShardsConfig, storage: Storage, index: ShardIndex) -> NodeCache | None:
    """The node's cache for remote shards; None for local ones.

    Raises ConfigError if it is not configured, or too small for the order of the images.
    """
    if storage.is_local:
        return None
    if cfg.cache_dir is None:
        raise ConfigError(
            f"data.root ({cfg.root}) needs a folder on each node for whole shards; "
            "give data.cache_dir=DIR, and data.cache_gb to limit it"
        )
    limit = None if cfg.cache_gb is None else int(cfg.cache_gb * 1e9)
    total = sum(entry["bytes"] for entry in index.splits.values())
    if limit is not None and limit < total and cfg.shuffle is Shuffle.full:
        least = math.ceil(total / 1e7) / 100
        raise ConfigError(
            f"data.cache_gb ({cfg.cache_gb:g}) must hold all shards for data.shuffle=full, "
            f"{least:g} GB; increase it, or use data.shuffle=window"
        )
    largest = max(shard["bytes"] for entry in index.splits.values() for shard in entry["shards"])
    windows = 2 * (cfg.window_shards or 0) * largest
    needed = index.splits["val"]["bytes"] + windows  # an evaluation does not read val in windows
    if limit is not None and limit < min(total, needed):
        raise ConfigError(
            f"data.cache_gb ({cfg.cache_gb:g}) must hold the val shards and two windows of "
            f"data.window_shards ({cfg.window_shards}), {needed / 1e9:.3g} GB"
        )
    return NodeCache(storage, os.path.abspath(os.path.expanduser(cfg.cache_dir)), limit)


def open_split(
    storage: Storage, index: ShardIndex, split: str, cache: NodeCache | None
) -> SampleIndex:
    """Open one split of finished shards. Raises DataError."""
    entry, name = index.splits[split], f"{split}.samples.npy"
    shards = entry["shards"]
    names, hashes, sizes = ([shard[key] for shard in shards] for key in ("name", "sha256", "bytes"))
    files = Shards(storage, names, hashes, sizes, cache)
    if cache is None:
        _check_sizes(files)
    try:
        if cache is None:
            path = Path(storage.path(name))
        else:
            path = _samples_of(cache, name, entry["files"][name])
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{storage.path(name)} cannot be read ({error}); prepare the shards again"
        ) from error
    if samples.dtype != SAMPLE or len(samples) != entry["images"]:
        raise DataError(
            f"{storage.path(name)} is not the one that {INDEX} was written for; {REMEDY}"
        )
    if cache is None:
        check_split(storage, entry, split, samples)
    else:
        _refresh(cache, files, samples)
        for small in stats_of(storage, split):
            check_file(storage, small, entry, storage.sha256(small))
    raw_size = entry["recipe"]["size"] if entry["recipe"]["encoding"] == "raw" else None
    return SampleIndex(
        index.classes, np.ascontiguousarray(samples["label"]), ShardStore(files, samples, raw_size),
        entry["files"][f"{split}.names.txt"],
    )  # fmt: skip


def _check_sizes(files: Shards) -> None:
    """Raises DataError if a local shard is missing or has another size than in index.json."""
    for name, expected in zip(files.names, files.sizes):
        size = files.storage.size(name)
        if size == expected:
            continue
        problem = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
        raise DataError(f"{files.storage.path(name)} {problem}; copy it again, or prepare it again")


def _samples_of(cache: NodeCache, name: str, sha256: str) -> Path:
    """The local copy of a file, fetched again if it has changed since. Raises OSError."""
    path = cache.get(name, sha256)
    if Storage(cache.directory).sha256(sha256) != sha256:
        cache.drop(name, sha256)
        path = cache.get(name, sha256)
    return path


def _refresh(cache: NodeCache, files: Shards, samples: np.ndarray) -> None:
    """Remove shards from the node's cache that have changed since they were fetched."""
    paths = [str(cache.path(sha256)) for sha256 in files.sha256]
    present = [shard for shard, path in enumerate(paths) if os.path.exists(path)]
    for shard in wrong_shards(samples, paths, present):
        cache.drop(files.names[shard], files.sha256[shard])


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files if needed: each of the `count` shards stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
