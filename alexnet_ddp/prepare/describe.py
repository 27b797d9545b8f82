"""What finished shards hold, for people: sizes, colours, classes, and images that are there more than once."""

import io
import json
from typing import Any

import numpy as np

from alexnet_ddp.data.sources.scan import listed
from alexnet_ddp.data.sources.shard_index import ShardIndex
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.commit import duplicates
from alexnet_ddp.prepare.report import committed, names_of
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.terminal import Console, Table

_SHOWN = 5  # groups of duplicates


def stats(root: str) -> None:
    """Print SPLIT.stats.json as a table, and the duplicates inside a split and across splits."""
    storage = Storage(root)
    index = committed(storage)
    found = {split: json.loads(storage.read(f"{split}.stats.json")) for split in index.splits}
    columns = {split: _column(index.splits[split], it) for split, it in found.items()}
    table = Table("", *columns)
    for row in next(iter(columns.values())):
        table.add_row(row, *(column[row] for column in columns.values()))
    say(root)
    Console().print(table)
    for split, it in found.items():
        _say(
            f"{split}: {len(it['duplicates']):,} images are there more than once", it["duplicates"]
        )
    if len(found) > 1:
        _across_splits(storage, index)


def _column(entry: dict[str, Any], it: dict[str, Any]) -> dict[str, str]:
    """Row -> text, of one split."""
    counts = sorted(it["images_of_class"].values())
    fewest, most = (
        min(it["images_of_class"], key=lambda c: (sign * it["images_of_class"][c], c))
        for sign in (1, -1)
    )
    bad = ", ".join(f"{n} {reason}" for reason, n in it["quarantined"].items())
    return {
        "images": f"{it['images']:,}",
        "quarantined": bad or "none",
        "MB of images": f"{it['bytes_of_images'] / 1e6:,.1f}",
        "width, pixels": _range(it["widths"], it["mean_width"]),
        "height, pixels": _range(it["heights"], it["mean_height"]),
        "mean RGB": _numbers(it["mean"]),
        "standard deviation RGB": _numbers(it["std"]),
        "eigenvalues of the covariance": _numbers(it["eigenvalues"]),
        "classes": f"{len(counts):,}",
        "fewest images a class": f"{counts[0]:,} ({fewest})",
        "median": f"{np.median(counts):,g}",
        "most": f"{counts[-1]:,} ({most})",
        "images a shard": "{:,} to {:,}".format(
            *_ends([shard["images"] for shard in entry["shards"]])
        ),
    }


def _range(sum_and_ends: list[int], mean: float) -> str:
    return f"{sum_and_ends[1]:,} to {sum_and_ends[2]:,}, mean {mean:,.1f}"


def _ends(values: list[int]) -> tuple[int, int]:
    return min(values), max(values)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _say(line: str, groups: list[list[str]]) -> None:
    say(line)
    for group in groups[:_SHOWN]:
        say(f"  {listed(group)}")
    if len(groups) > _SHOWN:
        say(f"  and {len(groups) - _SHOWN:,} more groups, in SPLIT.stats.json")


def _across_splits(storage: Storage, index: ShardIndex) -> None:
    """Images of one split that are in another too: a model that was trained on them is not tested by them."""
    contents, names, of = [], [], []
    for k, split in enumerate(index.splits):
        content = _contents(storage, split, index.splits[split])
        if content is None:
            say(
                f"duplicates across splits: unknown, since the sidecars of {split} in _state/ are gone"
            )
            return
        contents.append(content)
        names += [f"{split}:{name}" for name in names_of(storage, split)]
        of += [k] * len(content)
    groups = [
        group for group in duplicates(np.concatenate(contents)) if len({of[i] for i in group}) > 1
    ]
    _say(
        f"across splits: {len(groups):,} images are in more than one",
        [[names[i] for i in g] for g in groups],
    )


def _contents(storage: Storage, split: str, entry: dict[str, Any]) -> np.ndarray | None:
    """uint64 [N, 2]: a hash of each image's bytes as they came, in the order of the samples; None without sidecars."""
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
