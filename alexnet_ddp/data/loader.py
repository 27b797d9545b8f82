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

from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.effects import Effects, Partners, partner_rows
from alexnet_ddp.data.sampler import Work

_AHEAD = 3  # batches being filled while one is used
_PER_TASK = 8  # images a thread takes at once: enough to hide Python's share, few enough to spread a small batch

# fill(slots uint8 [n, size, size, 3], indices int64 [n], epoch) -> positions of bad images, left as they were
Fill = Callable[[np.ndarray, np.ndarray, int], list[int]]


@dataclass(frozen=True)
class Batch:
    """What one forward pass of one rank sees."""

    work: Work
    images: torch.Tensor  # uint8 [m, size, size, 3] on the device; valid until the next batch is asked for
    labels: torch.Tensor  # int64 [n] on the device. m = n; but where images are mixed, m may be n + 1:
    indices: torch.Tensor  # int32 [n] on the device. then the last image is only there for the first to be mixed with
    effects: Effects


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
        augment: Augment | None,
        image_size: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._fill, self._labels, self._augment = fill, labels, augment
        self._image_size, self._device = image_size, device
        # One thread of torch's for each of ours. The setting is the thread's own; torch's data loader does the same.
        one = {"initializer": torch.set_num_threads, "initargs": (1,)}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode", **one)
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
        indices = self._to_decode(work)
        n = len(indices)
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
        return buffer, [submit(self._fill, buffer.array[p], indices[p], work.epoch) for p in parts]

    def _finish(self, work: Work, buffer: _Buffer, tasks: list[Future]) -> Batch:
        began = time.monotonic()
        bad = [i * _PER_TASK + position for i, task in enumerate(tasks) for position in task.result()]
        self.waited_s += time.monotonic() - began
        indices = self._to_decode(work)
        images, slots = buffer.tensor[: len(indices)], np.arange(len(indices))
        if bad:  # rare, so a copy may be made
            slots = np.setdiff1d(slots, bad)
            images, indices = images[torch.from_numpy(slots)], indices[slots]
        n = np.count_nonzero(slots < len(work.indices))
        batch = Batch(
            work,
            images.to(self._device, non_blocking=True),
            self._copy(self._labels[indices[:n]].astype(np.int64)),
            self._copy(indices[:n].astype(np.int32)),
            self._effects(work, indices, slots),
        )
        if self._device.type == "cuda":
            buffer.copied = torch.cuda.Event()
            buffer.copied.record()
        return batch

    def _to_decode(self, work: Work) -> np.ndarray:
        """The images of `work` and, where images are mixed, the one before them."""
        more = self._augment and self._augment.mixes and len(work.indices)
        return np.append(work.indices, work.previous) if more else work.indices

    def _effects(self, work: Work, indices: np.ndarray, slots: np.ndarray) -> Effects:
        """indices: of the images that could be decoded, and slots: where they are in the buffer."""
        if self._augment is None:
            return Effects()
        partners = None
        if self._augment.mixes:
            rows = partner_rows(slots, len(work.indices))
            partners = Partners(rows, self._labels[indices[rows]].astype(np.int64))
        return self._augment.effects(work.epoch, indices, self._image_size, partners, self._copy)

    def _copy(self, array: np.ndarray) -> torch.Tensor:
        """To the device, without waiting for it."""
        return torch.from_numpy(array).to(self._device, non_blocking=True)
