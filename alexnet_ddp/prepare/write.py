"""One row of the plan -> one shard, its DALI index, and the sidecar that says what is in it. Runs in the workers.

The sidecar comes last, so a shard with a sidecar is whole, whoever wrote it, and however often.
"""

import errno
import hashlib
import io
import json
import zlib
from typing import Any

import numpy as np
from PIL import Image

from alexnet_ddp.config.data import MAX_BYTES
from alexnet_ddp.data.image import BOMB, TRUNCATED, UNREADABLE
from alexnet_ddp.data.sources.shards import SAMPLE
from alexnet_ddp.data.sources.tars import TarWriter
from alexnet_ddp.data.storage import NotAFile, Storage
from alexnet_ddp.prepare.encode import Encoded, Refused, encode, fingerprint, square
from alexnet_ddp.prepare.plan import ShardTask
from alexnet_ddp.prepare.source import WHOLE
from alexnet_ddp.prepare.statistics import Statistics
from alexnet_ddp.runtime.errors import DataError

# A sample of a sidecar: also its position in the source, and 128 bits of a hash of its bytes as they came.
NOTED = np.dtype(
    [*((name, SAMPLE[name]) for name in SAMPLE.names), ("row", "<i8"), ("content", "<u8", (2,))]
)

Summary = dict[str, Any]


def write_shard(task: ShardTask) -> Summary:
    """Write the shard unless it is there. Raises OSError where a disk fails, DataError where Pillow is another one.

    Returns a few numbers only: what there is to know about each image goes to the sidecar.
    """
    if fingerprint() != task.encoder:
        raise DataError(
            f"a worker has {fingerprint()}, the driver has {task.encoder}: they write different bytes; "
            "install the same Pillow everywhere"
        )
    root, source = Storage(task.root), Storage(task.source)
    done = read_sidecar(root, task)
    if done is not None:
        return done
    statistics, quarantine = Statistics(), []
    samples, index = [], ["v1.2 {n}"]
    mean = (
        None
        if task.recipe.mean_image is None
        else np.zeros((task.recipe.mean_image,) * 2 + (3,), np.uint32)
    )
    with root.create(f"{task.stem}.tar") as stream:
        tar = TarWriter(stream)
        for k, row in enumerate(task.rows):
            try:
                data = _read(source, task, k)
                encoded = encode(data, task.recipe)
            except Refused as refused:
                quarantine.append(
                    {"name": task.names[k], "label": task.labels[k], "reason": str(refused)}
                )
                continue
            samples.append((*_add(tar, task, k, encoded, index), row, _content(data)))
            statistics.add(encoded.pixels)
            if mean is not None:
                mean += square(Image.fromarray(encoded.pixels), task.recipe.mean_image)
        sha256 = tar.close()
    index[0] = f"v1.2 {len(samples)}"
    lines = "".join(f"{line}\n" for line in index).encode()
    root.write(f"{task.stem}.idx", lines)
    summary = {
        "shard": task.shard,
        "images": len(samples),
        "bytes": tar.size,
        "sha256": sha256,
        "idx_sha256": hashlib.sha256(lines).hexdigest(),
        "source_sizes": task.source_sizes,
        "statistics": vars(statistics),
        "quarantine": quarantine,
    }
    if mean is not None:
        root.write(f"{task.sidecar}.mean.npy", to_npy(mean))
    noted = to_npy(np.array(samples, NOTED))
    root.write(f"{task.sidecar}.npy", noted)
    summary["samples_sha256"] = hashlib.sha256(noted).hexdigest()
    root.write(f"{task.sidecar}.json", json.dumps(summary).encode())
    return _brief(summary)


def read_sidecar(root: Storage, task: ShardTask) -> Summary | None:
    """The summary of a shard that is written already; None if it must be written (again).

    So it must if an image of the source now has another size. Sidecars of older versions do not record the sizes.
    """
    summary = _sidecar(root, task)
    if summary is None:
        return None
    then, now = summary.get("source_sizes"), task.source_sizes
    if then is not None and now is not None and then != now:
        return None
    if root.size(f"{task.stem}.tar") != summary["bytes"] or root.size(f"{task.stem}.idx") is None:
        return None
    return _brief(summary)


def is_intact(task: ShardTask) -> Summary:
    """The brief summary, with "intact": whether every byte is what the sidecar says. Runs in the workers."""
    root = Storage(task.root)
    summary = _sidecar(root, task)
    if summary is None:
        return {"shard": task.shard, "images": 0, "intact": False}
    written = (
        (f"{task.stem}.tar", "sha256"),
        (f"{task.stem}.idx", "idx_sha256"),
        (f"{task.sidecar}.npy", "samples_sha256"),
    )
    intact = all(
        root.size(name) is not None and root.sha256(name) == summary[key] for name, key in written
    )
    return _brief(summary) | {"intact": intact}


def read_quarantine(root: Storage, task: ShardTask) -> list[dict[str, Any]]:
    """The bad images of a shard that is written already: name, label, reason."""
    return (_sidecar(root, task) or {"quarantine": []})["quarantine"]


def _sidecar(root: Storage, task: ShardTask) -> Summary | None:
    try:
        return json.loads(root.read(f"{task.sidecar}.json"))
    except (FileNotFoundError, ValueError):
        return None


def to_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _brief(summary: Summary) -> Summary:
    return {name: summary[name] for name in ("shard", "images", "bytes", "sha256")} | {
        "quarantined": len(summary["quarantine"])
    }


def _read(source: Storage, task: ShardTask, k: int) -> bytes:
    """The bytes of image k of the task. Raises Refused for what is no file, is too large, or ends too early."""
    if task.offsets[k] == WHOLE:
        try:
            return source.read(task.files[k], 0, None, MAX_BYTES)
        except NotAFile as error:
            raise Refused(BOMB if error.errno == errno.EFBIG else UNREADABLE) from None
    if task.sizes[k] > MAX_BYTES:
        raise Refused(BOMB)
    data = source.read(task.files[k], task.offsets[k], task.sizes[k])
    if len(data) < task.sizes[k]:
        raise Refused(TRUNCATED)
    return data


def _add(tar: TarWriter, task: ShardTask, k: int, encoded: Encoded, index: list[str]) -> tuple:
    """Append label and image; returns the sample, in the order of SAMPLE."""
    key, suffix = f"{task.first + k:09d}", task.recipe.suffix
    label = str(task.labels[k]).encode()
    at = tar.add(f"{key}.cls", label)
    offset = tar.add(f"{key}.{suffix}", encoded.data)
    size, (height, width, _) = len(encoded.data), encoded.pixels.shape
    index.append(f"cls {at} {len(label)} {key}.cls {suffix} {offset} {size} {key}.{suffix}")
    return task.shard, offset, size, task.labels[k], width, height, zlib.crc32(encoded.data)


def _content(data: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
