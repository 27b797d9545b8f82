"""index.json of packed shards: what there is. It may come from anybody, so nothing in it is believed unseen."""

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
    """What index.json says."""

    classes: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_index(storage: Storage) -> ShardIndex | None:
    """None where nothing is committed. Raises DataError where it is damaged."""
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
    """Names become paths below root, hashes become names in the node's cache. Raises ValueError."""
    missing = {f"{split}.{kind}" for kind in ("samples.npy", "names.txt", "stats.json")} - entry[
        "files"
    ].keys()
    if missing:
        raise ValueError(f"it has no SHA-256 of {min(missing)}")
    for shard in entry["shards"]:
        if not re.fullmatch(r"[\w\-]+\.tar", shard["name"]):
            raise ValueError(f"a shard is named {shard['name']!r}")
    for digest in [*entry["files"].values(), *(shard["sha256"] for shard in entry["shards"])]:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is no SHA-256")
