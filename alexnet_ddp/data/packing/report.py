"""What there is, for people: the table after a preparation, and the actions that look at finished shards."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from alexnet_ddp.config import Action, PrepareConfig
from alexnet_ddp.data.shards import INDEX, ShardIndex, read_index
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.errors import DataError


def summary(root: str) -> None:
    """A line for each split."""
    index = _index(Storage(root))
    table = Table("split", "images", "classes", "shards", "MB", "quarantined", "recipe", title=root)
    for split, entry in index.splits.items():
        table.add_row(
            split,
            f"{entry['images']:,}",
            f"{len(index.classes):,}",
            f"{entry['num_shards']:,}",
            f"{entry['bytes'] / 1e6:,.1f}",
            f"{entry['quarantined']:,}",
            ", ".join(f"{name}={value}" for name, value in entry["recipe"].items() if value is not None),
        )
    Console().print(table)


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """'recipe.quality 90 instead of 80' for each value of `one` that `other` has otherwise."""
    found = []
    for name, value in one.items():
        theirs = other.get(name)
        if isinstance(value, dict) and isinstance(theirs, dict):
            found += differences(value, theirs, f"{prefix}{name}.")
        elif value != theirs:
            long = isinstance(value, str) and len(value) > 40
            found.append(f"other {prefix}{name}" if long else f"{prefix}{name} {value} instead of {theirs}")
    return found


def inspect(cfg: PrepareConfig) -> None:
    root = absolute(cfg.root)
    summary(root)
    for split, entry in _index(Storage(root)).splits.items():
        counts = [shard["images"] for shard in entry["shards"]]
        print(f"{split}: {min(counts):,} to {max(counts):,} images a shard; written by {entry['encoder']}")


ACTIONS: dict[Action, Callable[[PrepareConfig], None]] = {Action.inspect: inspect}


def _index(root: Storage) -> ShardIndex:
    index = read_index(root)
    if index is None:
        raise DataError(f"{root.path(INDEX)} is not there: no shards were committed; finish the preparation first")
    return index
