"""index.json of packed shards: reads it, and checks that the files belong to it.

Untrusted input: names in index.json that become paths are validated.

An interrupted copy can mix the files of two preparations. Their sizes do not show that, because all
shards of raw images have the same size. The first and the last image of each shard are compared
with their CRC-32, and the small files with their SHA-256. `prepare action=verify` reads every byte.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.data.sources import scan
from alexnet_ddp.data.sources.tars import pread
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import listed

INDEX = "index.json"
FORMAT = 1  # of the shards and of the index
REMEDY = "copy all files again from one preparation, or prepare the shards again"

_THREADS = 8  # threads that read shards: network file systems answer slowly


@dataclass(frozen=True)
class ShardIndex:
    """The content of index.json."""

    classes: list[str] = field(default_factory=list)  # in the order of the labels
    class_names: list[str] = field(default_factory=list)  # readable names, in the same order
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)  # split -> files, shards, ...


def read_index(storage: Storage) -> ShardIndex | None:
    """Read index.json; None if there is none yet. Raises DataError if it is damaged, OSError."""
    try:
        content = storage.read(INDEX)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']} instead of {FORMAT}")
        for split, entry in found["splits"].items():
            _check_names(split, entry)
        return ShardIndex(found["classes"], found["class_names"], found["splits"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = storage.path(INDEX)
        raise DataError(
            f"{path} is damaged ({error}); remove it and prepare again: whole shards stay"
        ) from error


def _check_names(split: str, entry: dict[str, Any]) -> None:
    """Validate names, which become paths below root, and hashes, which become names in the cache.

    Raises ValueError.
    """
    needed = {f"{split}.{kind}" for kind in ("samples.npy", "names.txt", "stats.json")}
    missing = needed - entry["files"].keys()
    if missing:
        raise ValueError(f"it has no SHA-256 of {min(missing)}")
    for shard in entry["shards"]:
        if not re.fullmatch(r"[\w\-]+\.tar", shard["name"]):
            raise ValueError(f"a shard is named {shard['name']!r}")
    for digest in [*entry["files"].values(), *(shard["sha256"] for shard in entry["shards"])]:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is no SHA-256")


def check_split(storage: Storage, entry: dict[str, Any], split: str, samples: np.ndarray) -> None:
    """Check the local files of a split against `entry`, its entry in index.json.

    samples: SAMPLE [N], the rows of SPLIT.samples.npy. A successful check is cached until the size,
    the times or the inode of a file change.
    Raises DataError, naming a file that is unreadable or from another preparation.
    """

    def build(stamps: scan.Stamps) -> scan.Arrays:
        small = [f"{split}.samples.npy", f"{split}.names.txt", *stats_of(storage, split)]
        shards = [storage.path(shard["name"]) for shard in entry["shards"]]
        stamps |= {path: scan.stamp(path) for path in (*map(storage.path, small), *shards)}
        for name in small:
            check_file(storage, name, entry, storage.sha256(name))
        wrong = wrong_shards(samples, shards)
        if wrong:
            names = listed([f"{shards[k]} ({why})" for k, why in sorted(wrong.items())])
            how = f"{names} of {len(shards):,} shards" if len(wrong) > 1 else names
            raise DataError(f"{how} do not match {split}.samples.npy and {INDEX}; {REMEDY}")
        return {}

    what = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    try:
        scan.cached("shards", Path(storage.path(f"{split}.samples.npy")), build, what)
    except OSError as error:
        raise DataError(
            f"{error.filename or storage.root} cannot be read ({error.strerror}); {REMEDY}"
        ) from error


def stats_of(storage: Storage, split: str) -> list[str]:
    """The file name of the colour statistics, if that file exists; it is optional for training."""
    name = f"{split}.stats.json"
    return [name] if storage.size(name) is not None else []


def check_file(storage: Storage, name: str, entry: dict[str, Any], sha256: str) -> None:
    """Raises DataError if `sha256` differs from the one in index.json for the file `name`."""
    if sha256 != entry["files"][name]:
        raise DataError(
            f"{storage.path(name)} is not the one that {INDEX} was written for; {REMEDY}"
        )


def wrong_shards(
    samples: np.ndarray, paths: list[str], only: Iterable[int] | None = None
) -> dict[int, str]:
    """Shards whose first or last image differs from `samples`: {shard: problem}.

    paths: a local file for each shard; only: the shards to check, by default all.
    """
    ends = _ends(samples, len(paths))
    with ThreadPoolExecutor(_THREADS) as pool:
        shards = list(ends if only is None else ends.keys() & set(only))
        found = pool.map(lambda shard: _problem(paths[shard], ends[shard]), shards)
        return {shard: problem for shard, problem in zip(shards, found) if problem}


def _ends(samples: np.ndarray, num_shards: int) -> dict[int, list[tuple[int, int, int]]]:
    """Shard -> (offset, size, CRC-32) of its first and of its last image."""
    shards = np.ascontiguousarray(samples["shard"])
    offsets = np.ascontiguousarray(samples["offset"])
    if len(shards) and int(shards.max()) >= num_shards:
        raise DataError(
            f"an image is in shard {shards.max():,}, and {INDEX} has {num_shards:,}; {REMEDY}"
        )
    first = np.full(num_shards, np.iinfo(np.uint64).max, np.uint64)
    last = np.zeros(num_shards, np.uint64)
    np.minimum.at(first, shards, offsets)
    np.maximum.at(last, shards, offsets)
    rows = np.flatnonzero((offsets == first[shards]) | (offsets == last[shards]))
    _, one_each = np.unique(np.stack([shards[rows], offsets[rows]]), axis=1, return_index=True)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for shard, offset, size, *_, crc in samples[rows[one_each]].tolist():
        found.setdefault(shard, []).append((offset, size, crc))
    return found


def _problem(path: str, images: list[tuple[int, int, int]]) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            wrong = [
                offset
                for offset, size, crc in images
                if zlib.crc32(pread(descriptor, size, offset)) != crc
            ]
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return f"other bytes at {wrong[0]:,}" if wrong else None
