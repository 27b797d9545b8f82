"""Features: the inputs of a network's head, computed once for all images and kept on this node.

    FOLDER/KEY.f32    float32 [N, ...], in the order of the index
    FOLDER/KEY.json   their shape and SHA-256, and the images that could not be read; written last

training/features.py computes them. KEY identifies the images and the network.
"""

import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from alexnet_ddp.data.effects import Effects
from alexnet_ddp.data.loader import Batch
from alexnet_ddp.data.sampler import MicroBatch
from alexnet_ddp.data.sources.index import FileStore, SampleIndex
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.runtime.errors import MachineError
from alexnet_ddp.runtime.files import sync_directory, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """The features of N images."""

    array: np.ndarray  # float32 [N, ...], mapped from the file; NaN for a bad image
    bad: dict[int, Skipped]  # by position in the index


@dataclass(frozen=True)
class FeatureFile:
    """The files of the features of `num_images` images, `shape` values each.

    path: without a suffix. norms: of the features of fixed inputs, which reveal that the network
    computes something else although its weights are the same.
    """

    path: Path
    num_images: int
    shape: tuple[int, ...]
    norms: list[float]

    @property
    def data(self) -> Path:
        return self.path.with_suffix(".f32")

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_images * math.prod(self.shape)

    def open(self, verifies: bool, accepts_bad: bool) -> Features | None:
        """The features; None if they must be computed, with a warning if files are damaged.

        verifies: compare the SHA-256. accepts_bad: images may be bad.
        """
        try:
            found = json.loads(self.record.read_bytes())
            bad = {one["index"]: Skipped(**one) for one in found["bad"]}
            if bad and not accepts_bad:
                return None
            if not np.allclose(found["norms"], self.norms, rtol=1e-3):
                log.info("the network has changed: its features are computed again")
                return None
            self._check(found["sha256"], verifies)
        except FileNotFoundError:  # none yet, or not complete
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            log.warning(
                "the features in %s are damaged (%s): computing them again", self.data, reason
            )
            return None
        shape = (self.num_images, *self.shape)
        mapped = np.memmap(self.data, "<f4", "r", shape=shape)
        return Features(mapped.view(np.ndarray), bad)  # indexing a memmap is slower

    def _check(self, sha256: str, verifies: bool) -> None:
        size = self.data.stat().st_size
        if size != self.num_bytes:
            raise ValueError(f"{size:,} bytes, not {self.num_bytes:,}")
        if verifies:
            with self.data.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256:
                raise ValueError("its SHA-256 is another one")


class FeatureWriter:
    """Writes a FeatureFile, row by row. Nothing is visible before commit().

    error: set if the disk fails; nothing is written after that. The other ranks must know of it
    before it is raised. Raises MachineError if the file cannot be created.
    """

    def __init__(self, file: FeatureFile) -> None:
        self.error: MachineError | None = None
        self._file, self._digest = file, hashlib.sha256()
        name = f".{file.path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        self._draft = file.path.with_name(name)
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            self._out = self._draft.open("wb")
        except OSError as error:
            raise _disk_error(file.data, error) from error

    def add(self, rows: np.ndarray) -> None:
        """Append `rows`, float32 [n, ...]."""
        content = np.ascontiguousarray(rows, dtype="<f4").tobytes()
        self._digest.update(content)
        try:
            if self.error is None:
                self._out.write(content)
        except OSError as error:
            self.error = _disk_error(self._file.data, error)

    def commit(self, bad: list[Skipped]) -> None:
        """Make the features visible, durably. bad: the images without features."""
        file = self._file
        if self.error is not None:
            return
        try:
            self._out.flush()
            os.fsync(self._out.fileno())
            file.record.unlink(missing_ok=True)  # it belongs to an earlier file
            os.replace(self._draft, file.data)
            sync_directory(file.data.parent)
            facts = {"sha256": self._digest.hexdigest(), "norms": file.norms}
            write_json(file.record, facts | {"bad": [asdict(one) for one in bad]})
        except OSError as error:
            self.error = _disk_error(file.data, error)

    def close(self) -> None:
        """Remove what was not committed."""
        with suppress(OSError):  # of a full disk: error has it already
            self._out.close()
        self._draft.unlink(missing_ok=True)


def _disk_error(path: Path, error: OSError) -> MachineError:
    remedy = "free some space, or set XDG_CACHE_HOME to another folder"
    return MachineError(
        f"{path} cannot be written ({error.strerror or error}); {remedy}, or "
        "leave finetune.cache_features false"
    )


@dataclass(eq=False)
class FeatureLoader:
    """Loads a Batch of features for each MicroBatch: what Loader does for images.

    labels: int32 [N], of all images. waited_s: seconds that the consumer has waited so far.
    """

    features: Features
    labels: np.ndarray
    device: torch.device
    waited_s: float = 0.0

    def batches(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        """Yield the Batch of each MicroBatch, in order."""
        for micro_batch in micro_batches:
            began = time.monotonic()
            batch = self._load(micro_batch)
            self.waited_s += time.monotonic() - began
            yield batch

    def close(self) -> None:
        """Nothing to stop: there are no threads."""

    def _load(self, micro_batch: MicroBatch) -> Batch:
        indices, bad = micro_batch.indices, list[Skipped]()
        images = indices % len(self.labels)  # without the number of the repeat
        if self.features.bad:
            known = self.features.bad
            bad = [known[i] for i in images.tolist() if i in known]
            is_good = np.array([i not in known for i in images.tolist()], dtype=bool)
            indices, images = indices[is_good], images[is_good]
        return Batch(
            micro_batch,
            torch.from_numpy(self.features.array[images]).to(self.device),
            torch.from_numpy(self.labels[images].astype(np.int64)).to(self.device),
            torch.from_numpy(indices.astype(np.int32)).to(self.device),
            Effects(),
            bad,
        )


def modification_times(index: SampleIndex) -> str:
    """A digest of the times at which the files of `index` were last changed; "" if it has none.

    An image that another one of equal size has replaced changes it.
    """
    if not isinstance(index.store, FileStore):
        return ""
    times = [_modified_ns(index.name(i)) for i in range(len(index))]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()


def _modified_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # a bad image, which reading it will report
        return -1
