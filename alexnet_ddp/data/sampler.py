"""The distributed sampler: which image comes when, and to whom, as a function of (seed, epoch). It has no state.

Every image comes once an epoch. A global batch is cut into contiguous slices whose sizes differ by at most one; the
last batch of an epoch is smaller. Nothing is padded, nothing has to divide anything.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config import Config, ConfigError, ShardsConfig, Shuffle
from alexnet_ddp.data.sources.index import SampleIndex


@dataclass(frozen=True)
class Work:
    """One forward pass of one rank: which images. All ranks make as many in a step; one may have no images in some."""

    step: int
    epoch: int
    indices: np.ndarray  # int64 [n], n <= micro_batch_size
    is_last: bool  # of this step: its backward pass synchronises
    previous: int | None = (
        None  # the image before these in the global batch; before its first one comes its last
    )


@dataclass(frozen=True, eq=False)
class Windows:
    """For storage that is slow at random reads: the shards in random order, and the images of `size` shards at a time.

    Only the shards of one window are read at any time, those of two where a batch meets the next one. The shards were
    filled at random, so a batch has as many classes as under the full shuffle (ImageNet in 1,024 shards, batches of 256
    and 1,024: within 0.2 % for 16, 32 and 64 at a time). What windows cost: of S shards, k at a time, two images of one
    shard meet in a batch S/k times as often, so images of one batch meet again in the next epoch S/k^2 + (1 - 1/k)^2
    times as often (measured: 4.9 for 16, 2.0 for 32, 1.2 for 64). A sliding window of k shards was measured: the same.
    """

    shards: np.ndarray  # unsigned [N]: the shard of each image
    size: int

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.size).encode())
        digest.update(np.ascontiguousarray(self.shards, dtype="<u4").tobytes())
        return digest.hexdigest()

    def arrange(self, order: np.ndarray, key: int) -> np.ndarray:
        """`order`, an int64 permutation of the images, window by window."""
        present = np.flatnonzero(
            np.bincount(self.shards)
        )  # a subset of the images may leave shards out
        count = -(-len(present) // self.size)
        window = np.zeros(present[-1] + 1, np.min_scalar_type(count))  # few bits sort fast
        ranks = (
            np.arange(len(present)) * count // len(present)
        )  # of 17 shards, 16 at a time: 9 and 8, not 16 and 1
        window[present[rng.permutation(key, len(present))]] = ranks
        return order[np.argsort(window[self.shards[order]], kind="stable")]


@dataclass(frozen=True)
class GlobalBatchSampler:
    """The batches of a run: order[kG : (k + 1)G] of the epoch's permutation, for every world size the same."""

    num_images: int
    global_batch_size: int
    seed: int
    drop_last: bool = False
    windows: Windows | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"trainer.global_batch_size ({self.global_batch_size}) exceeds the {self.num_images} training images "
                f"and trainer.drop_last drops the incomplete batch; use at most {self.num_images}"
            )

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.num_images, self.global_batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of `step` (0-based), over all ranks: int64 [n], n <= global_batch_size."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return _order(self.num_images, self.seed, epoch, self.windows)[
            k * self.global_batch_size : (k + 1) * self.global_batch_size
        ]

    def work(
        self, steps: range, rank: int, world_size: int, micro_batch_size: int | None
    ) -> Iterator[Work]:
        """What `rank` does in `steps`, one forward pass at a time."""
        for step in steps:
            batch = self.batch(step)
            mine = rank_slice(len(batch), rank, world_size)
            indices, sizes, start = (
                batch[mine],
                micro_batches(len(batch), world_size, micro_batch_size),
                0,
            )
            for k, size in enumerate(sizes):
                chunk = indices[start : start + size]
                previous = int(batch[mine.start + start - 1]) if len(chunk) else None
                yield Work(step, step // self.steps_per_epoch, chunk, k == len(sizes) - 1, previous)
                start += size


def build_sampler(cfg: Config, index: SampleIndex) -> GlobalBatchSampler:
    """The batches of a training on `index`. Raises ConfigError."""
    by_window = isinstance(cfg.data, ShardsConfig) and cfg.data.shuffle is Shuffle.window
    windows = Windows(index.store.shards, cfg.data.window_shards) if by_window else None
    trainer = cfg.trainer
    return GlobalBatchSampler(
        len(index), trainer.global_batch_size, cfg.seed, trainer.drop_last, windows
    )


class Shuffled:
    """rng.permutation(key, n) a sixteenth at a time: no first batch, of a start or a resume, waits for all."""

    def __init__(self, key: int, n: int) -> None:
        self._key, self._high, self._parts = key, rng.high_words(key, n), {}
        self._part_of = (self._high >> np.uint32(28)).astype(np.uint8)
        self._starts = [0, *np.cumsum(np.bincount(self._part_of, minlength=16)).tolist()]

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """int64, as a slice of the permutation."""
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
    num_images: int, seed: int, epoch: int, windows: Windows | None
) -> Shuffled | np.ndarray:
    key = rng.fold(seed, rng.ORDER, epoch)
    if windows is None:
        return Shuffled(key, num_images)
    return windows.arrange(rng.permutation(key, num_images), rng.fold(seed, rng.SHARDS, epoch))


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """The contiguous part of n items that `rank` has; sizes differ by at most one, lower ranks have the larger ones."""
    size, rest = divmod(n, world_size)
    start = rank * size + min(rank, rest)
    return slice(start, start + size + (rank < rest))


def micro_batches(n: int, world_size: int, micro_batch_size: int | None) -> list[int]:
    """The forward passes of a global batch of n images, the same on all ranks: how many images a rank has in each, at
    most. One with a smaller slice has one less in the last.
    """
    largest = rank_slice(n, 0, world_size).stop
    micro = micro_batch_size or max(1, largest)
    return [max(1, min(micro, largest - start)) for start in range(0, max(1, largest), micro)]


def evaluation_work(num_images: int, batch_size: int, rank: int, world_size: int) -> Iterator[Work]:
    """Whole batches of a fixed grid, dealt to the ranks in turn: what is computed together never depends on the world.

    Every rank gets the same number of Works, so that they can agree between two of them; some are empty at the end.
    """
    rounds = -(-num_images // (batch_size * world_size))
    for k in range(rounds):
        start = (k * world_size + rank) * batch_size
        indices = np.arange(start, min(start + batch_size, num_images), dtype=np.int64)
        yield Work(step=k, epoch=0, indices=indices, is_last=k == rounds - 1)


def describe_batch(sampler: GlobalBatchSampler, index: SampleIndex, step: int) -> dict[str, object]:
    """The global batch of `step` (0-based) as JSON. There "step" counts from 1, as the rows of metrics do."""
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
    """16 hex digits that name the images of a batch, in order."""
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()[:16]
