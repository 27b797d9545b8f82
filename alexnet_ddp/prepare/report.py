"""Prints about finished shards: the actions inspect, stats, diff and verify."""

import io
import json
import logging
import os
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet_ddp.data.sources.classes import class_difference
from alexnet_ddp.data.sources.shard_index import INDEX, ShardIndex, read_index
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.commit import damaged_files, duplicates
from alexnet_ddp.prepare.engine import Engine, with_progress
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.printing import listed, say
from alexnet_ddp.runtime.terminal import Console, Table

log = logging.getLogger(__name__)

_SHOWN = 5  # groups of duplicates


def committed(root: Storage) -> ShardIndex:
    """Return the index of `root`. Raises DataError if nothing was committed."""
    index = read_index(root)
    if index is None:
        raise DataError(
            f"{root.path(INDEX)} does not exist: no shards were committed; "
            "finish the preparation first"
        )
    return index


def names_of(root: Storage, split: str) -> list[str]:
    """CLASS/FILE of each image of a split, in the order of its samples."""
    return root.read(f"{split}.names.txt").decode(errors="surrogateescape").split("\n")[:-1]


def summary(root: str) -> None:
    """Print a table row and the recipe of each split, and the file that lists its bad images."""
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
    """Print the summary, the sizes of the shards and the encoder of each split."""
    summary(root)
    for split, entry in committed(Storage(root)).splits.items():
        counts = [shard["images"] for shard in entry["shards"]]
        sizes = f"{min(counts):,} to {max(counts):,} images per shard"
        say(f"{split}: {sizes}; written by {entry['encoder']}")


def diff(root: str, other: str) -> None:
    """Print the differences between two roots. Raises DataError if there are any.

    Compares the indices, which contain the SHA-256 of every file; action=verify reads the files.
    Raises ConfigError if both are the same place.
    """
    if os.path.realpath(root) == os.path.realpath(other):
        raise ConfigError(f"other ({other}) is the same place as root; give another one")
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
    """Return 'recipe.quality 90 instead of 80' for each value of `one` that differs in `other`."""
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
                else f"{prefix}{name} {_shown(value)} instead of {_shown(theirs)}"
            )
    return found


def _shown(value: object) -> object:
    return "null" if value is None else value


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


def stats(root: str) -> None:
    """Print SPLIT.stats.json as a table, and the duplicates inside a split and across splits."""
    storage = Storage(root)
    index = committed(storage)
    found = {split: json.loads(storage.read(f"{split}.stats.json")) for split in index.splits}
    columns = {split: _column(index.splits[split], values) for split, values in found.items()}
    table = Table("", *columns)
    for row in next(iter(columns.values())):
        table.add_row(row, *(column[row] for column in columns.values()))
    say(root)
    Console().print(table)
    for split, values in found.items():
        groups = values["duplicates"]
        _print_groups(f"{split}: {len(groups):,} images occur more than once", groups)
    if len(found) > 1:
        _print_duplicates_across_splits(storage, index)


def _column(entry: dict[str, Any], values: dict[str, Any]) -> dict[str, str]:
    """Return {name of the row: text} of one split."""
    counts = sorted(values["images_of_class"].values())
    fewest, most = (
        min(values["images_of_class"], key=lambda c: (sign * values["images_of_class"][c], c))
        for sign in (1, -1)
    )
    shard_sizes = [shard["images"] for shard in entry["shards"]]
    bad = ", ".join(f"{n} {reason}" for reason, n in values["quarantined"].items())
    return {
        "images": f"{values['images']:,}",
        "quarantined": bad or "none",
        "MB of images": f"{values['bytes_of_images'] / 1e6:,.1f}",
        "width, pixels": _range(values["widths"], values["mean_width"]),
        "height, pixels": _range(values["heights"], values["mean_height"]),
        "mean RGB": _numbers(values["mean"]),
        "standard deviation RGB": _numbers(values["std"]),
        "eigenvalues of the covariance": _numbers(values["eigenvalues"]),
        "classes": f"{len(counts):,}",
        "fewest images per class": f"{counts[0]:,} ({fewest})",
        "median": f"{np.median(counts):,g}",
        "most": f"{counts[-1]:,} ({most})",
        "images per shard": f"{min(shard_sizes):,} to {max(shard_sizes):,}",
    }


def _range(sum_min_max: list[int], mean: float) -> str:
    return f"{sum_min_max[1]:,} to {sum_min_max[2]:,}, mean {mean:,.1f}"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _print_groups(line: str, groups: list[list[str]]) -> None:
    say(line)
    for group in groups[:_SHOWN]:
        say(f"  {listed(group)}")
    if len(groups) > _SHOWN:
        say(f"  and {len(groups) - _SHOWN:,} more groups, in SPLIT.stats.json")


def _print_duplicates_across_splits(storage: Storage, index: ShardIndex) -> None:
    """Print the images that are in several splits: they make a validation result too good."""
    contents, names, split_of = [], [], []
    for k, split in enumerate(index.splits):
        content = _contents(storage, split, index.splits[split])
        if content is None:
            say(f"duplicates across splits: unknown, as {split} has no sidecars in _state/")
            return
        contents.append(content)
        names += [f"{split}:{name}" for name in names_of(storage, split)]
        split_of += [k] * len(content)
    groups = [
        group
        for group in duplicates(np.concatenate(contents))
        if len({split_of[i] for i in group}) > 1
    ]
    _print_groups(
        f"across splits: {len(groups):,} images are in more than one",
        [[names[i] for i in g] for g in groups],
    )


def _contents(storage: Storage, split: str, entry: dict[str, Any]) -> np.ndarray | None:
    """Return the hash of each image's source bytes, uint64 [N, 2], in the order of the samples.

    None if the sidecars, which contain the hashes, do not exist.
    """
    folders = [name for name in storage.folders("_state") if name.startswith(f"{split}-")]
    if len(folders) != 1:
        return None
    try:
        stems = [shard["name"].removesuffix(".tar") for shard in entry["shards"]]
        parts = [storage.read(f"_state/{folders[0]}/{stem}.npy") for stem in stems]
    except FileNotFoundError:
        return None
    rows = np.concatenate([np.load(io.BytesIO(part), allow_pickle=False) for part in parts])
    return rows["content"][np.argsort(rows["row"])]


@dataclass(frozen=True)
class Check:
    """A shard to verify."""

    root: str
    split: str
    shard: int
    name: str
    images: int
    sha256: str
    idx_sha256: str


def verify(root: str, engine: Engine) -> None:
    """Read every byte of the shards and compare it with the index; print a summary.

    Needs neither sidecars nor source. Logs a line for each broken file, then raises DataError.
    """
    storage = Storage(root)
    index = committed(storage)
    broken = [name for split in index.splits for name in damaged_files(storage, index, split)]
    lines = [f"{storage.path(name)} is not what was written" for name in dict.fromkeys(broken)]
    checks = [
        Check(root, split, k, *(shard[key] for key in ("name", "images", "sha256", "idx_sha256")))
        for split, entry in index.splits.items()
        for k, shard in enumerate(entry["shards"])
    ]
    for found in with_progress(engine, check_shard, checks, "verifying"):
        if found["problem"]:
            check = found["of"]
            names = names_of(storage, check.split) if found["bad"] else []
            whose = f": {listed([names[i] for i in found['bad']])}" if names else ""
            lines.append(f"{storage.path(check.name)} {found['problem']}{whose}")
            broken.append(check.name)
    for line in lines:
        log.warning(line)
    if broken:
        raise DataError(
            f"{root}: {listed(sorted(set(broken)))} broken; "
            "rerun the command that prepared them to write them again"
        )
    total = sum(entry["bytes"] for entry in index.splits.values())
    say(f"{root}: {len(checks):,} shards, {total / 1e6:,.1f} MB: every byte is what was written")


def check_shard(check: Check) -> dict[str, Any]:
    """Verify one shard, in a worker.

    Returns "images": their number, "of": check, "problem": text or "", "bad": positions of the
    damaged images.
    """
    root, idx = Storage(check.root), f"{check.name.removesuffix('.tar')}.idx"
    problem, bad = "", []
    if root.size(check.name) is None:
        problem = "does not exist"
    else:
        if root.sha256(check.name) != check.sha256:
            problem = "is damaged"
        if problem or root.is_local:
            bad = _bad_images(root, check)
            problem = problem or ("does not match its samples" if bad else "")
    if not problem and (root.size(idx) is None or root.sha256(idx) != check.idx_sha256):
        problem = f"has a damaged {idx}"
    return {"images": check.images, "of": check, "problem": problem, "bad": bad}


def _bad_images(root: Storage, check: Check) -> list[int]:
    """Positions of the images of a shard whose bytes do not match their CRC-32."""
    try:
        samples = np.load(io.BytesIO(root.read(f"{check.split}.samples.npy")), allow_pickle=False)
    except (FileNotFoundError, ValueError):
        return []  # verify() reports that file
    rows = np.flatnonzero(samples["shard"] == check.shard)
    rows = rows[np.argsort(samples["offset"][rows])]
    places = (samples[name][rows].tolist() for name in ("offset", "size", "crc32"))
    return [i for i, offset, size, crc in zip(rows.tolist(), *places)
            if zlib.crc32(root.read(check.name, offset, size)) != crc]  # fmt: skip
