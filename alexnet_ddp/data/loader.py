"""Threads that fill batches ahead of the step, and the copy to the device.

Decoding releases the GIL, so threads do what others need worker processes for: nothing is pickled, nothing lives in
/dev/shm, no worker can be lost, and what comes next is decided by the plan of Works alone, so any start is exact.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from alexnet_ddp.config import DataConfig
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.fill import Fill, build_fill
from alexnet_ddp.data.index import SampleIndex
from alexnet_ddp.data.sampler import Work

_AHEAD = 3  # batches being filled while one is used
_PER_TASK = 16  # images a thread takes at once: enough to hide Python's share, few enough to spread a small batch


@dataclass(frozen=True)
class Batch:
    """What one forward pass of one rank sees."""

    work: Work
    images: torch.Tensor  # uint8 [n, size, size, 3] on the device; valid until the next batch is asked for
    labels: torch.Tensor  # int64 [n] on the device
    indices: torch.Tensor  # int32 [n] on the device
    colour: torch.Tensor | None  # float32 [n, 3] to add to RGB in [0, 1]


class _Buffer:
    """A reusable batch in host memory, pinned where the device is a GPU."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.array = self.tensor.numpy()
        self.copied: torch.cuda.Event | None = None

    def wait_until_free(self) -> None:
        """The device may still be copying out of it."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None


class Loader:
    """Turns Works into Batches with `num_threads` threads. `waited_s` sums the seconds its user had to wait."""

    def __init__(
        self,
        fill: Fill,
        labels: np.ndarray,
        colour: Callable[[int, np.ndarray], np.ndarray | None],
        image_size: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._fill, self._labels, self._colour = fill, labels, colour
        self._image_size, self._device = image_size, device
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.waited_s = 0.0

    def batches(self, works: Iterable[Work]) -> Iterator[Batch]:
        """The Batch of each Work, in order. An error in a thread is raised where its Batch is asked for."""
        works, ahead, free = iter(works), deque(), []
        try:
            while True:
                while len(ahead) <= _AHEAD and (work := next(works, None)) is not None:
                    ahead.append((work, *self._start(work, free)))
                if not ahead:
                    return
                work, buffer, tasks = ahead.popleft()
                yield self._finish(work, buffer, tasks)
                free.append(buffer)
        finally:
            for _, _, tasks in ahead:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, work: Work, free: list[_Buffer]) -> tuple[_Buffer, list[Future]]:
        n = len(work.indices)
        if hasattr(self._fill, "will_need"):
            self._fill.will_need(work.indices)
        fitting = [b for b in free if len(b.array) >= n]
        if fitting:
            buffer = fitting[0]
            free.remove(buffer)
            buffer.wait_until_free()
        else:
            free.clear()  # too small: the first batch of a run is the largest, so this is rare
            buffer = _Buffer((n, self._image_size, self._image_size, 3), self._device)
        parts = [slice(i, min(i + _PER_TASK, n)) for i in range(0, n, _PER_TASK)]
        submit = self._threads.submit
        return buffer, [submit(self._fill, buffer.array[p], work.indices[p], work.epoch) for p in parts]

    def _finish(self, work: Work, buffer: _Buffer, tasks: list[Future]) -> Batch:
        began = time.monotonic()
        bad = [i * _PER_TASK + position for i, task in enumerate(tasks) for position in task.result()]
        self.waited_s += time.monotonic() - began
        images, indices = buffer.tensor[: len(work.indices)], work.indices
        if bad:  # rare, so a copy may be made
            good = np.setdiff1d(np.arange(len(indices)), bad)
            images, indices = images[torch.from_numpy(good)], indices[good]
        batch = Batch(
            work,
            images.to(self._device, non_blocking=True),
            torch.from_numpy(self._labels[indices].astype(np.int64)).to(self._device, non_blocking=True),
            torch.from_numpy(indices.astype(np.int32)).to(self._device, non_blocking=True),
            self._colour_of(work.epoch, indices),
        )
        if self._device.type == "cuda":
            buffer.copied = torch.cuda.Event()
            buffer.copied.record()
        return batch

    def _colour_of(self, epoch: int, indices: np.ndarray) -> torch.Tensor | None:
        shift = self._colour(epoch, indices)
        return None if shift is None else torch.from_numpy(shift).to(self._device, non_blocking=True)


def build_loader(
    cfg: DataConfig, index: SampleIndex, augment: Augment | None, num_threads: int, device: torch.device
) -> Loader:
    """A loader of `index`; augment=None shows the images as the evaluation sees them."""
    colour = augment.colour if augment else _no_colour
    fill = build_fill(cfg, index, augment)
    return Loader(fill, index.labels, colour, cfg.image_size, cfg.num_threads or num_threads, device)


def _no_colour(epoch: int, indices: np.ndarray) -> None:
    return None
