"""Writes one shard, its DALI index and its sidecar, which describes the shard. Runs in workers.

The sidecar is written last: a shard that has a sidecar is complete, even if several workers wrote
it. The sidecar includes exact pixel statistics, which merge to the same integers in any order.
"""

import errno
import hashlib
import io
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from alexnet_ddp.config.data import MAX_BYTES
from alexnet_ddp.data.image import BOMB, TRUNCATED, UNREADABLE
from alexnet_ddp.data.sources.shards import SAMPLE, SAMPLE_FIELDS
from alexnet_ddp.data.sources.tars import TarWriter
from alexnet_ddp.data.storage import NotAFile, Storage
from alexnet_ddp.prepare.encode import Encoded, Refused, encode, fingerprint, square
from alexnet_ddp.prepare.plan import ShardTask
from alexnet_ddp.prepare.sources import WHOLE
from alexnet_ddp.runtime.errors import DataError

# A sample in a sidecar also has its position in the source and a 128-bit hash of its source bytes.
NOTED = np.dtype(
    [*((name, SAMPLE[name]) for name in SAMPLE_FIELDS), ("row", "<i8"), ("content", "<u8", (2,))]
)

Summary = dict[str, Any]


def write_shard(task: ShardTask) -> Summary:
    """Write the shard unless it exists, and return its brief summary.

    The summary is small; everything about single images is in the sidecar. Raises OSError for a
    failing disk, DataError if this worker's Pillow differs from the driver's.
    """
    if fingerprint() != task.encoder:
        raise DataError(
            f"a worker has {fingerprint()}, the driver has {task.encoder}: "
            "they write different bytes; install the same Pillow everywhere"
        )
    root, source = Storage(task.root), Storage(task.source)
    done = read_sidecar(root, task)
    if done is not None:
        return done
    statistics, quarantine = Statistics(), []
    samples, index = [], ["v1.2 {n}"]
    size = task.recipe.mean_image
    mean = None if size is None else np.zeros((size, size, 3), np.uint32)
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
                mean += square(Image.fromarray(encoded.pixels), len(mean))
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
    """Return the brief summary of a shard that exists; None if it must be written (again).

    It must be if an image of the source has another size now. Sidecars of older versions do not
    record the sizes.
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
    """Return the brief summary and "intact": True if every byte matches the sidecar's SHA-256."""
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
    """Return the bad images of a shard that exists: name, label, reason."""
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
    """Return the bytes of image k of the task.

    Raises Refused if it is not a file, too large or truncated.
    """
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
    """Append label and image to the tar; return the sample, in the order of SAMPLE."""
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


_CHUNK_PIXELS = 1 << 20


@dataclass
class Statistics:
    """Exact sums over RGB values in 0..255, as Python integers, which cannot overflow."""

    images: int = 0
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0] * 3)
    products: list[list[int]] = field(
        default_factory=lambda: [[0] * 3 for _ in range(3)]
    )  # sums of R*R, R*G, ...
    widths: list[int] = field(default_factory=lambda: [0, 0, 0])  # sum, smallest, largest
    heights: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, image: np.ndarray) -> None:
        """Add an image, uint8 [height, width, 3]."""
        flat = image.reshape(-1, 3)
        sums, products = np.zeros(3), np.zeros((3, 3))
        for start in range(0, len(flat), _CHUNK_PIXELS):
            planes = flat[start : start + _CHUNK_PIXELS].T.astype(np.float64, order="C")
            sums += planes.sum(1)  # whole numbers below 2^53: still exact
            products += planes @ planes.T
        height, width = image.shape[:2]
        self.merge(
            Statistics(
                1,
                len(flat),
                [int(value) for value in sums],
                [[int(value) for value in row] for row in products],
                [width] * 3,
                [height] * 3,
            )
        )

    def merge(self, other: "Statistics") -> None:
        """Add the sums of `other`."""
        for mine, theirs in ((self.widths, other.widths), (self.heights, other.heights)):
            if other.images:
                smallest = min(mine[1], theirs[1]) if self.images else theirs[1]
                mine[:] = [mine[0] + theirs[0], smallest, max(mine[2], theirs[2])]
        self.images += other.images
        self.pixels += other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums)]
        self.products = [
            [a + b for a, b in zip(row, more)] for row, more in zip(self.products, other.products)
        ]

    def summary(self) -> dict[str, Any]:
        """Return mean, standard deviation and covariance of RGB in [0, 1], over all pixels.

        Divisors are the number of pixels. The eigenvalues and eigenvectors (columns) of the
        covariance are for the colour noise of Krizhevsky 2012, section 4.1.
        """
        n = max(1, self.pixels)
        covariance = [
            [
                (n * self.products[i][j] - self.sums[i] * self.sums[j]) / (n * n) / 255**2
                for j in range(3)
            ]
            for i in range(3)
        ]
        values, vectors = np.linalg.eigh(np.array(covariance))
        order = np.argsort(-values)
        vectors = vectors[:, order]
        # An eigenvector's sign is arbitrary: make its largest component positive.
        largest = vectors[np.abs(vectors).argmax(0), np.arange(3)]
        vectors = vectors * np.where(largest < 0, -1, 1)
        return {
            "mean": [value / n / 255 for value in self.sums],
            "std": [max(0.0, covariance[i][i]) ** 0.5 for i in range(3)],
            "covariance": covariance,
            "eigenvalues": np.maximum(0.0, values[order]).round(12).tolist(),
            "eigenvectors": vectors.round(9).tolist(),
            "mean_width": self.widths[0] / max(1, self.images),
            "mean_height": self.heights[0] / max(1, self.images),
        }
