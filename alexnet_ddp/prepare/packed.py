"""Images that are packed already, as a source: finished shards of ours, or any tars in WebDataset layout."""

import hashlib
import io
import logging
import os
import re
from pathlib import Path

import numpy as np

from alexnet_ddp.data.sources import scan
from alexnet_ddp.data.sources.shard_index import check_file, check_split, read_index
from alexnet_ddp.data.sources.tars import Member, tar_members
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.listing import Source
from alexnet_ddp.runtime.errors import DataError

log = logging.getLogger(__name__)

_MOST_CLASSES = 1_000_000  # more are damage


def tar_names(storage: Storage, split: str) -> list[str]:
    return [name for name in storage.names() if re.fullmatch(rf"{split}-.*\.tar", name)]


def shards_source(storage: Storage, split: str) -> Source:
    """Shards of ours say themselves what they hold, so packing them anew keeps names, classes and order."""
    index = read_index(storage)
    entry = index.splits[split]
    if entry["recipe"]["encoding"] == "raw":
        raise DataError(
            f"source ({storage.root}) holds raw pixels, which are not packed again; give its own source"
        )
    content = {kind: storage.read(f"{split}.{kind}") for kind in ("samples.npy", "names.txt")}
    for kind, data in content.items():
        check_file(storage, f"{split}.{kind}", entry, hashlib.sha256(data).hexdigest())
    samples = np.load(io.BytesIO(content["samples.npy"]), allow_pickle=False)
    if storage.is_local:
        check_split(storage, entry, split, samples)
    names = content["names.txt"].decode(errors="surrogateescape").split("\n")[:-1]
    files = [shard["name"] for shard in entry["shards"]]
    places = [
        samples[name].astype(kind)
        for name, kind in (("shard", np.int32), ("offset", np.int64), ("size", np.int64))
    ]
    return Source(
        storage.root,
        index.classes,
        index.class_names,
        samples["label"].copy(),
        names,
        files,
        *places,
    )


def tars_source(storage: Storage, split: str) -> Source:
    """WebDataset tars: KEY.cls holds the label as a number, KEY.jpg (or another suffix) the image."""
    if not storage.is_local:
        raise DataError(
            f"source ({storage.root}) has tars at a URL, which cannot be packed; copy them here first"
        )
    files, rows = tar_names(storage, split), []
    for k, file in enumerate(scan.watched(files, len(files), f"indexing {split}-*.tar")):
        rows += [(label, f"{file.removesuffix('.tar')}/{name}", k, offset, size)
                 for label, name, offset, size in _samples(Path(storage.path(file)))]  # fmt: skip
    labels = [row[0] for row in rows]
    if not rows:
        raise DataError(
            f"{storage.path(files[0])} holds no pair of KEY.cls and an image; it is no WebDataset tar"
        )
    count = _num_classes(storage, max(labels) + 1)
    width = len(str(count - 1))
    classes = [f"class{c:0{width}d}" for c in range(count)]
    log.warning(
        "%s has labels but no class names (index.json of shards has): %s to %s",
        files[0],
        classes[0],
        classes[-1],
    )
    rows.sort(key=lambda row: (row[0], row[1]))
    return Source(
        storage.root,
        classes,
        classes,
        np.array([row[0] for row in rows], np.int32),
        [f"{classes[row[0]]}/{row[1]}" for row in rows],
        files,
        np.array([row[2] for row in rows], np.int32),
        np.array([row[3] for row in rows], np.int64),
        np.array([row[4] for row in rows], np.int64),
    )


def _samples(tar: Path) -> list[tuple[int, str, int, int]]:
    """(label, name, offset, size in bytes) of each pair in a WebDataset tar."""
    labels: dict[str, int] = {}
    images: dict[str, Member] = {}
    fd = os.open(tar, os.O_RDONLY)
    try:
        for member in tar_members(fd, tar, 0, os.fstat(fd).st_size, may_be_cut=True):
            folder, _, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            key = f"{folder}/{key}" if folder else key
            if suffix == "cls":
                labels[key] = _label(
                    os.pread(fd, member.size, member.offset), f"{tar}:{member.name}"
                )
            elif (
                f".{suffix}".lower() in scan.SUFFIXES
            ):  # KEY.seg.png beside KEY.jpg is something else
                images[key] = member
    finally:
        os.close(fd)
    alone = sorted(labels.keys() ^ images.keys())
    if alone:
        raise DataError(
            f"{tar} holds {scan.listed(alone)} without both an image and a label; mend or remove the tar"
        )
    return [
        (labels[key], member.name, member.offset, member.size) for key, member in images.items()
    ]


def _label(text: bytes, where: str) -> int:
    if not text.strip().isdigit() or int(text) >= _MOST_CLASSES:
        rule = f"must hold the label as a number below {_MOST_CLASSES:,}"
        raise DataError(f"{where} {rule}, got {text[:20]!r}; mend or remove the tar")
    return int(text)


def _num_classes(storage: Storage, at_least: int) -> int:
    """Of all splits: the labels of one may stop before the other's."""
    found = [at_least]
    for split in ("train", "val"):
        for file in tar_names(storage, split):
            found.append(
                1 + max((label for label, *_ in _samples(Path(storage.path(file)))), default=0)
            )
    return max(found)
