"""Read every byte of finished shards again, and compare it with what the index says. Needs no sidecars, no source."""

import io
import logging
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet_ddp.data.sources.scan import listed
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.commit import damaged_files
from alexnet_ddp.prepare.report import committed, names_of
from alexnet_ddp.prepare.watch import Engine, watched
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import say

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One shard to be read."""

    root: str
    split: str
    shard: int
    name: str
    images: int
    sha256: str
    idx_sha256: str


def verify(root: str, engine: Engine) -> None:
    """Print what was read. Raises DataError that names what is broken, after a line for each."""
    storage = Storage(root)
    index = committed(storage)
    broken = [name for split in index.splits for name in damaged_files(storage, index, split)]
    lines = [f"{storage.path(name)} is not what was written" for name in dict.fromkeys(broken)]
    checks = [
        Check(root, split, k, *(shard[key] for key in ("name", "images", "sha256", "idx_sha256")))
        for split, entry in index.splits.items()
        for k, shard in enumerate(entry["shards"])
    ]
    for found in watched(engine, check_shard, checks, "verifying"):
        if found["problem"]:
            check = found["of"]
            names = names_of(storage, check.split) if found["bad"] else []
            whose = f": {listed([names[i] for i in found['bad']])}" if names else ""
            lines.append(f"{storage.path(check.name)} {found['problem']}{whose}")
            broken.append(check.name)
    for line in lines:
        log.warning(line)
    if broken:
        remedy = "the command that prepared them writes them again"
        raise DataError(f"{root}: {listed(sorted(set(broken)))} broken; {remedy}")
    total = sum(entry["bytes"] for entry in index.splits.values())
    say(f"{root}: {len(checks):,} shards, {total / 1e6:,.1f} MB: every byte is what was written")


def check_shard(check: Check) -> dict[str, Any]:
    """{"images", "of", "problem", "bad": positions of damaged images}. Runs in the workers."""
    root, idx = Storage(check.root), f"{check.name.removesuffix('.tar')}.idx"
    problem, bad = "", []
    if root.size(check.name) is None:
        problem = "is not there"
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
    """Positions of the images of a shard whose bytes have another CRC."""
    try:
        samples = np.load(io.BytesIO(root.read(f"{check.split}.samples.npy")), allow_pickle=False)
    except (FileNotFoundError, ValueError):
        return []  # that file is named already
    rows = np.flatnonzero(samples["shard"] == check.shard)
    rows = rows[np.argsort(samples["offset"][rows])]
    places = (samples[name][rows].tolist() for name in ("offset", "size", "crc32"))
    return [i for i, offset, size, crc in zip(rows.tolist(), *places)
            if zlib.crc32(root.read(check.name, offset, size)) != crc]  # fmt: skip
