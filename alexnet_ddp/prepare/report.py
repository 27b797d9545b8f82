"""What there is, for people: the table after a preparation, and two roots compared."""

from typing import Any

from alexnet_ddp.data.sources.classes import class_difference
from alexnet_ddp.data.sources.scan import listed
from alexnet_ddp.data.sources.shard_index import INDEX, ShardIndex, read_index
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.terminal import Console, Table


def committed(root: Storage) -> ShardIndex:
    """Raises DataError where nothing was committed."""
    index = read_index(root)
    if index is None:
        raise DataError(
            f"{root.path(INDEX)} is not there: no shards were committed; finish the preparation first"
        )
    return index


def names_of(root: Storage, split: str) -> list[str]:
    """CLASS/FILE of each image of a split, in the order of its samples."""
    return root.read(f"{split}.names.txt").decode(errors="surrogateescape").split("\n")[:-1]


def summary(root: str) -> None:
    """A line for each split, its recipe, and where its bad images are listed."""
    index = committed(Storage(root))
    table = Table("split", "images", "classes", "shards", "MB", "quarantined")
    for split, entry in index.splits.items():
        table.add_row(
            split,
            f"{entry['images']:,}",
            f"{len(index.classes):,}",
            f"{entry['num_shards']:,}",
            f"{entry['bytes'] / 1e6:,.1f}",
            f"{entry['quarantined']:,}",
        )
    say(root)
    Console().print(table)
    for split, entry in index.splits.items():
        recipe = " ".join(
            f"{name}={value}" for name, value in entry["recipe"].items() if value is not None
        )
        say(f"{split}: {recipe}")
        if entry["quarantined"]:
            say(f"{split}: bad images were left out, see {root}/{split}.quarantine.jsonl")


def inspect(root: str) -> None:
    summary(root)
    for split, entry in committed(Storage(root)).splits.items():
        counts = [shard["images"] for shard in entry["shards"]]
        say(
            f"{split}: {min(counts):,} to {max(counts):,} images a shard; written by {entry['encoder']}"
        )


def diff(root: str, other: str) -> None:
    """Print in what two roots differ, as their indices say it. Raises DataError where they do.

    The index holds a SHA-256 for each file, so nothing else has to be read; action=verify reads.
    """
    one, two = Storage(root), Storage(other)
    mine, theirs = committed(one), committed(two)
    if mine == theirs:
        say(f"{root} and {other} are identical, byte for byte")
        return
    lines = []
    if mine.classes != theirs.classes:
        difference = class_difference("root", mine.classes, "other", theirs.classes)
        lines.append(f"classes: {difference or 'the same, in another order'}")
    elif mine.class_names != theirs.class_names:
        lines.append("classes: the names for people differ")
    lines += [f"only root has {split}" for split in mine.splits.keys() - theirs.splits.keys()]
    lines += [f"only other has {split}" for split in theirs.splits.keys() - mine.splits.keys()]
    for split in sorted(mine.splits.keys() & theirs.splits.keys()):
        lines += [
            f"{split}: {line}"
            for line in _split_differences(one, two, mine.splits[split], theirs.splits[split])
        ]
    for line in lines:
        say(line)
    raise DataError(f"{root} and {other} differ")


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """'recipe.quality 90 instead of 80' for each value of `one` that `other` has otherwise."""
    found = []
    for name, value in one.items():
        theirs = other.get(name)
        if isinstance(value, dict) and isinstance(theirs, dict):
            found += differences(value, theirs, f"{prefix}{name}.")
        elif value != theirs:
            is_hash = isinstance(value, str) and len(value) == 64
            found.append(
                f"other {prefix}{name}"
                if is_hash
                else f"{prefix}{name} {value} instead of {theirs}"
            )
    return found


def _split_differences(
    one: Storage, two: Storage, mine: dict[str, Any], theirs: dict[str, Any]
) -> list[str]:
    if mine == theirs:
        return []
    plain = {
        name: value
        for name, value in mine.items()
        if name not in ("shards", "files", "names_and_labels")
    }
    lines = differences(plain, theirs)
    split = mine["shards"][0]["name"].rsplit("-", 1)[0]
    names, others = set(names_of(one, split)), set(names_of(two, split))
    for which, found in (("root", names - others), ("other", others - names)):
        if found:
            lines.append(f"only {which} has {listed(sorted(found))}")
    hashes = [
        {shard["name"]: shard["sha256"] for shard in entry["shards"]} for entry in (mine, theirs)
    ]
    changed = [
        name for name in hashes[0] if hashes[1].get(name, hashes[0][name]) != hashes[0][name]
    ]
    files = [name for name, digest in mine["files"].items() if theirs["files"].get(name) != digest]
    lines += [f"shards with other bytes: {listed(changed)}"] * bool(changed)
    return lines + [f"other bytes in {listed(files)}"] * bool(files)
