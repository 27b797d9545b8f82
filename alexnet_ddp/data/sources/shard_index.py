"""Reads index.json of packed shards. Untrusted input: names that become paths are validated."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from alexnet_ddp.data.storage import Storage
from alexnet_ddp.runtime.errors import DataError

INDEX = "index.json"
FORMAT = 1  # of the shards and of the index


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
