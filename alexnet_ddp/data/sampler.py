"""The distributed sampler: the images of each step and rank, as a function of (seed, epoch).

It has no state. Every image is used once per epoch, unless data.sampling asks for other numbers. A
global batch is cut into one contiguous slice per rank; the sizes of the slices differ by at most
one. The last batch of an epoch may be smaller. Nothing is padded, and no number has to be divisible
by another.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config import Config, ConfigError, ShardsConfig, Shuffle
from alexnet_ddp.data.sampling import ClassSampling, build_sampling
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.shards import ShardStore


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward pass on one rank.

    All ranks have the same number of micro-batches in a step; some of them may be empty.
    """

    step: int
    epoch: int
    # int64 [n], n <= micro_batch_size; with data.sampling the draws of ClassSampling. The image is
    # the remainder modulo the number of images, random numbers are drawn for the whole value.
    indices: np.ndarray
    is_last: bool  # the last one of its step; its backward pass synchronises the gradients
    # The image before these in the global batch, cyclically; None if the micro-batch is empty.
    previous: int | None = None


@dataclass(frozen=True, eq=False)
class Windows:
    """Shuffle for storage with slow random reads: one window of `size` random shards at a time.

    At any time only the shards of one window are read (of two windows for a batch that spans
    both). The shards were filled at random, so a batch contains as many classes as under the full
    shuffle (ImageNet in 1,024 shards, batches of 256 and 1,024: within 0.2 % for windows of 16, 32
    and 64 shards).

    The cost: with S shards in windows of k, two images of one shard share a batch S/k times as
    often as under a full shuffle. Two images of the same batch are therefore S/k^2 + (1 - 1/k)^2
    times as likely to share a batch in the next epoch (measured: 4.9 for 16, 2.0 for 32, 1.2 for
    64). A sliding window of k shards gave the same numbers.
    """

    shards: np.ndarray  # unsigned [N]: the shard of each image
    size: int  # shards per window

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the window size and the shards."""
        digest = hashlib.sha256(str(self.size).encode())
        digest.update(np.ascontiguousarray(self.shards, dtype="<u4").tobytes())
        return digest.hexdigest()

    def arrange(self, order: np.ndarray, key: int) -> np.ndarray:
        """`order`, int64 indices of the images, rearranged window by window."""
        # A subset of the images may leave some shards out.
        present = np.flatnonzero(np.bincount(self.shards))
        count = -(-len(present) // self.size)
        window = np.zeros(present[-1] + 1, np.min_scalar_type(count))  # a small dtype sorts fast
        # Windows of equal size: 17 shards in windows of at most 16 give 9 and 8, not 16 and 1.
        ranks = np.arange(len(present)) * count // len(present)
        window[present[rng.permutation(key, len(present))]] = ranks
        shards = self.shards[order % len(self.shards)]
        return order[np.argsort(window[shards], kind="stable")]


@dataclass(frozen=True)
class GlobalBatchSampler:
    """The global batches of a run, the same for every world size.

    Batch k of an epoch is order[k * G : (k + 1) * G] of the epoch's permutation.
    Raises ConfigError if drop_last would drop every batch.
    """

    num_images: int
    global_batch_size: int
    seed: int
    drop_last: bool = False
    windows: Windows | None = None
    sampling: ClassSampling | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"trainer.global_batch_size ({self.global_batch_size}) exceeds the "
                f"{self.num_images} training images and trainer.drop_last drops the incomplete "
                f"batch; use at most {self.num_images}"
            )

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.num_images, self.global_batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batch(self, step: int) -> np.ndarray:
        """The images of `step` (0-based) on all ranks: int64 [n], n <= global_batch_size."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = _order(self.num_images, self.seed, epoch, self.windows, self.sampling)
        return order[k * self.global_batch_size : (k + 1) * self.global_batch_size]

    def micro_batches(
        self, steps: range, rank: int, world_size: int, micro_batch_size: int | None
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of `rank` in `steps`. micro_batch_size: None for no limit."""
        for step in steps:
            batch = self.batch(step)
            mine = rank_slice(len(batch), rank, world_size)
            indices = batch[mine]
            sizes = micro_batch_sizes(len(batch), world_size, micro_batch_size)
            epoch, start = step // self.steps_per_epoch, 0
            for k, size in enumerate(sizes):
                chunk = indices[start : start + size]
                previous = int(batch[mine.start + start - 1]) if len(chunk) else None
                yield MicroBatch(step, epoch, chunk, k == len(sizes) - 1, previous)
                start += size


def build_sampler(cfg: Config, index: SampleIndex) -> GlobalBatchSampler:
    """The sampler of the training images `index`. Raises ConfigError."""
    windows = None
    if isinstance(cfg.data, ShardsConfig) and cfg.data.shuffle is Shuffle.window:
        assert isinstance(index.store, ShardStore)
        assert cfg.data.window_shards is not None  # the constructor replaces null
        windows = Windows(index.store.shards, cfg.data.window_shards)
    trainer, sampling = cfg.trainer, None
    if cfg.data.sampling is not None:
        sampling = build_sampling(cfg.data.sampling, index.labels, index.classes)
    return GlobalBatchSampler(
        len(index), trainer.global_batch_size, cfg.seed, trainer.drop_last, windows, sampling
    )


class Shuffled:
    """rng.permutation(key, n), sorted one sixteenth at a time as needed.

    This way the first batch after a start or a resume does not wait for the whole sort.
    """

    def __init__(self, key: int, n: int) -> None:
        self._key, self._high = key, rng.high_words(key, n)
        self._parts: dict[int, np.ndarray] = {}
        self._part_of = (self._high >> np.uint32(28)).astype(np.uint8)
        self._starts = [0, *np.cumsum(np.bincount(self._part_of, minlength=16)).tolist()]

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """A slice of the permutation, int64."""
        start, stop, _ = wanted.indices(self._starts[-1])
        pieces = []
        for part, (first, end) in enumerate(pairwise(self._starts)):
            if start < end and first < stop:
                pieces.append(self._part(part)[max(0, start - first) : stop - first])
        return np.concatenate(pieces)

    def _part(self, part: int) -> np.ndarray:
        if part not in self._parts:
            members = np.flatnonzero(self._part_of == part)
            self._parts[part] = rng.in_order(self._key, members, self._high[members])
        return self._parts[part]


@lru_cache(maxsize=2)
def _order(
    num_images: int,
    seed: int,
    epoch: int,
    windows: Windows | None,
    sampling: ClassSampling | None,
) -> Shuffled | np.ndarray:
    key = rng.fold(seed, rng.ORDER, epoch)
    if windows is None and sampling is None:
        return Shuffled(key, num_images)
    order = rng.permutation(key, num_images)
    if sampling is not None:
        order = sampling.draws(seed, epoch)[order]
    return order if windows is None else windows.arrange(order, rng.fold(seed, rng.SHARDS, epoch))


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """The contiguous slice of n items that belongs to `rank`.

    Sizes differ by at most one; lower ranks have the larger slices.
    """
    size, rest = divmod(n, world_size)
    start = rank * size + min(rank, rest)
    return slice(start, start + size + (rank < rest))


def micro_batch_sizes(n: int, world_size: int, micro_batch_size: int | None) -> list[int]:
    """Sizes of the micro-batches of the largest slice of a global batch of n images.

    All ranks make this many forward passes. A rank with a smaller slice has one image less in the
    last one.
    """
    largest = rank_slice(n, 0, world_size).stop
    micro = micro_batch_size or max(1, largest)
    return [max(1, min(micro, largest - start)) for start in range(0, max(1, largest), micro)]


def evaluation_batches(
    num_images: int, batch_size: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """Yield the evaluation batches of `rank`.

    Images are cut into the same batches for every world size, and the batches are distributed to
    the ranks in turn. Every rank gets the same number of batches, because ranks communicate between
    batches; the last ones may be empty.
    """
    rounds = -(-num_images // (batch_size * world_size))
    for k in range(rounds):
        start = (k * world_size + rank) * batch_size
        indices = np.arange(start, min(start + batch_size, num_images), dtype=np.int64)
        yield MicroBatch(step=k, epoch=0, indices=indices, is_last=k == rounds - 1)


def describe_batch(sampler: GlobalBatchSampler, index: SampleIndex, step: int) -> dict[str, object]:
    """The global batch of `step` (0-based) as JSON. Its "step" counts from 1, as in the metrics."""
    indices = sampler.batch(step).tolist()
    return {
        "step": step + 1,
        "epoch": step // sampler.steps_per_epoch,
        "seed": sampler.seed,
        "global_batch_size": sampler.global_batch_size,
        "indices": indices,
        "names": [index.name(i) for i in indices],
    }


def index_hash(indices: np.ndarray) -> str:
    """16 hex digits that identify the images of a batch and their order."""
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()[:16]
