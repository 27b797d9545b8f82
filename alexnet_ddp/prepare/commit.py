"""Commits a split whose shards are all written: merges the sidecars and writes index.json last."""

import hashlib
import io
import json
import re
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from alexnet_ddp.data.sources.shard_index import FORMAT, INDEX, ShardIndex, read_index
from alexnet_ddp.data.sources.shards import SAMPLE, SAMPLE_FIELDS
from alexnet_ddp.data.storage import SCRATCH, Storage
from alexnet_ddp.prepare.plan import Plan, ShardTask
from alexnet_ddp.prepare.write import Statistics, to_npy
from alexnet_ddp.runtime.errors import DataError, MachineError

INFO = "_info.json"  # of all splits
_ATTEMPTS, _PAUSE_S = 20, 0.1


def remove_temporary_files(root: Storage) -> None:
    """Remove what the workers have left. Raises nothing: an error of the work is not replaced.

    A task that Spark has cancelled may still write for a moment. The next start removes what
    remains.
    """
    for _ in range(_ATTEMPTS):
        try:
            root.remove(SCRATCH)
            return
        except OSError:
            time.sleep(_PAUSE_S)


def commit(plan: Plan, tasks: list[ShardTask]) -> dict[str, Any]:
    """Write the files SPLIT.*, then index.json, and return the split's entry in the index.

    Raises DataError if a sidecar is damaged or every image is bad, MachineError if a shard has
    another size than its sidecar, and OSError.
    """
    root, split = Storage(plan.root), plan.split
    statistics, quarantine, noted, shards = Statistics(), [], [], []
    for task in tasks:
        sidecar = json.loads(root.read(f"{task.sidecar}.json"))
        if root.size(f"{task.stem}.tar") != sidecar["bytes"]:
            raise MachineError(
                f"{root.path(task.stem)}.tar is not what was written; "
                "rerun the same command to write it again"
            )
        samples = root.read(f"{task.sidecar}.npy")
        if hashlib.sha256(samples).hexdigest() != sidecar["samples_sha256"]:
            raise DataError(
                f"{root.path(task.sidecar)}.npy is damaged; start again with verify=true"
            )
        noted.append(np.load(io.BytesIO(samples), allow_pickle=False))
        statistics.merge(Statistics(**sidecar["statistics"]))
        quarantine += sidecar["quarantine"]
        entry = {"name": f"{task.stem}.tar"}
        shards.append(
            entry | {name: sidecar[name] for name in ("images", "bytes", "sha256", "idx_sha256")}
        )
    rows = np.concatenate(noted)
    rows = rows[np.argsort(rows["row"])]
    if not len(rows):
        reasons = sorted({row["reason"] for row in quarantine})
        raise DataError(
            f"every image of {split} is bad ({', '.join(reasons)}); "
            f"check the source, {plan.source.root}"
        )
    files = {
        f"{split}.samples.npy": to_npy(_samples(rows)),
        f"{split}.names.txt": _lines(plan.source.names[i] for i in rows["row"]),
        f"{split}.quarantine.jsonl": quarantine_lines(quarantine),
        f"{split}.stats.json": _json(_statistics(plan, rows, statistics, quarantine)),
        f"{split}.wids.json": _json(_wids(split, shards)),
    }
    if plan.recipe.mean_image:
        files[f"{split}.mean.npy"] = to_npy(_mean_image(root, tasks, len(rows)))
    for name, content in files.items():
        root.write(name, content)
    entry = plan.identity | {
        "val_fraction": plan.val_fraction,
        "images": len(rows),
        "quarantined": len(quarantine),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "files": {
            name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())
        },
    }
    _publish(root, plan, entry)
    return entry


def withdraw(root: Storage, split: str) -> None:
    """Remove a split from the indices before its shards are replaced: no reader sees a mixture."""
    index = read_index(root)
    if index is None or split not in index.splits:
        return
    rest = {name: entry for name, entry in index.splits.items() if name != split}
    if rest:
        _write_index(root, ShardIndex(index.classes, index.class_names, rest))
    else:
        root.remove(INDEX)
        root.remove(INFO)
    root.remove(f"{split}.wids.json")


def damaged_files(root: Storage, index: ShardIndex, split: str, read: bool = True) -> list[str]:
    """Names of a split's files, except its shards, that are missing or differ from the index.

    read: compare their SHA-256; if False, only check that they exist.
    """
    wanted = index.splits[split]["files"] | {INFO: hashlib.sha256(info(index)).hexdigest()}
    return [name for name, digest in wanted.items()
            if root.size(name) is None or (read and root.sha256(name) != digest)]  # fmt: skip


def info(index: ShardIndex) -> bytes:
    """Return the content of _info.json, which timm reads."""
    splits = {}
    for name, entry in index.splits.items():
        names, lengths = ([shard[key] for shard in entry["shards"]] for key in ("name", "images"))
        splits[name] = {
            "name": name,
            "num_samples": sum(lengths),
            "filenames": names,
            "shard_lengths": lengths,
        }
    return _json({"splits": splits})


def quarantine_lines(quarantine: list[dict[str, Any]]) -> bytes:
    return _lines(json.dumps(row) for row in sorted(quarantine, key=lambda row: row["name"]))


def _publish(root: Storage, plan: Plan, entry: dict[str, Any]) -> None:
    """Remove the files of earlier attempts, and write the index last."""
    kept = {shard["name"] for shard in entry["shards"]}
    for name in root.names():
        found = re.fullmatch(rf"({plan.split}-\d{{6}})\.(tar|idx)", name)
        if found and f"{found[1]}.tar" not in kept:
            root.remove(name)
    if not plan.recipe.mean_image:
        root.remove(f"{plan.split}.mean.npy")
    before = read_index(root) or ShardIndex()
    splits = dict(sorted({**before.splits, plan.split: entry}.items()))
    _write_index(root, ShardIndex(plan.source.classes, plan.source.class_names, splits))
    root.remove(SCRATCH)


def _write_index(root: Storage, index: ShardIndex) -> None:
    root.write(INFO, info(index))
    root.write(INDEX, _json({"format": FORMAT} | asdict(index)))


def _wids(split: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    shardlist = [{"url": shard["name"], "nsamples": shard["images"]} for shard in shards]
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split,
        "shardlist": shardlist,
    }


def _samples(rows: np.ndarray) -> np.ndarray:
    samples = np.empty(len(rows), SAMPLE)
    for name in SAMPLE_FIELDS:
        samples[name] = rows[name]
    return samples


def _statistics(
    plan: Plan, rows: np.ndarray, statistics: Statistics, quarantine: list[dict]
) -> dict[str, Any]:
    counts = np.bincount(rows["label"], minlength=len(plan.source.classes))
    reasons = sorted({row["reason"] for row in quarantine})
    groups = duplicates(rows["content"])
    return {
        **vars(statistics),
        **statistics.summary(),
        "bytes_of_images": int(rows["size"].sum(dtype=np.uint64)),
        "images_of_class": dict(zip(plan.source.classes, counts.tolist())),
        "quarantined": {
            reason: sum(row["reason"] == reason for row in quarantine) for reason in reasons
        },
        "duplicates": [[plan.source.names[i] for i in rows["row"][group]] for group in groups],
    }


def duplicates(content: np.ndarray) -> list[np.ndarray]:
    """Return groups of positions of images with the same bytes in the source.

    content: hashes of these bytes, uint64 [N, 2].
    """
    _, inverse, counts = np.unique(content, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(counts)
    return sorted(
        (order[end - n : end] for end, n in zip(ends, counts) if n > 1), key=lambda group: group[0]
    )


def _mean_image(root: Storage, tasks: list[ShardTask], n: int) -> np.ndarray:
    """The mean of `n` images: float32 [size, size, 3], RGB in 0..255."""
    total: Any = 0
    for task in tasks:
        content = io.BytesIO(root.read(f"{task.sidecar}.mean.npy"))
        total = total + np.load(content, allow_pickle=False).astype(np.int64)
    return (total / n).astype(np.float32)


def _lines(lines: Any) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
