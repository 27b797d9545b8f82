"""Threads that fill batches in host memory ahead of the step.

Decoding releases the GIL, so threads do what others need worker processes for: nothing is pickled, nothing lives in
/dev/shm, no worker can be lost, and what comes next is decided by the plan of Works alone, so any start is exact.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet_ddp.data.fill import Fill, Skipped
from alexnet_ddp.data.sampler import Work

_AHEAD = 3  # batches being filled while one is used
_PER_TASK = 16  # images a thread takes at once: enough to hide Python's share, few enough to spread a small batch

# allocate(bytes) -> (uint8 [bytes], what owns the memory)
Allocate = Callable[[int], tuple[np.ndarray, Any]]


@dataclass
class Buffer:
    """A reusable batch in host memory."""

    array: np.ndarray  # uint8 [bytes]
    owner: Any
    wait_until_free: Callable[[], None] = lambda: None  # the device may still be copying out of it


@dataclass(frozen=True)
class HostBatch:
    """Valid until the next one is asked for; its buffer is filled again once `buffer.wait_until_free` returns."""

    work: Work
    indices: np.ndarray  # int64 [n] of the images: the work's, and perhaps the one before them
    images: np.ndarray  # uint8 [n, size, size, 3], at the beginning of the buffer
    buffer: Buffer
    bad: list[Skipped]  # by their positions in `indices`


class Prefetcher:
    """Turns Works into HostBatches with `threads`. `waited_s` sums the seconds its user had to wait.

    image_size(epoch): pixels, height = width. with_previous: also the image before those of a Work.
    """

    def __init__(
        self,
        fill: Fill,
        image_size: Callable[[int], int],
        threads: ThreadPoolExecutor,
        allocate: Allocate,
        with_previous: bool = False,
    ) -> None:
        self._fill, self._image_size, self._allocate = fill, image_size, allocate
        self._threads, self._with_previous = threads, with_previous
        self.waited_s = 0.0

    def batches(self, works: Iterable[Work]) -> Iterator[HostBatch]:
        """The HostBatch of each Work, in order. An error in a thread is raised where its batch is asked for."""
        works, ahead, free = iter(works), deque(), []
        try:
            while True:
                while len(ahead) <= _AHEAD and (work := next(works, None)) is not None:
                    ahead.append((work, *self._start(work, free)))
                if not ahead:
                    return
                work, indices, images, buffer, tasks = ahead.popleft()
                yield HostBatch(work, indices, images, buffer, self._finish(tasks))
                free.append(buffer)
        finally:
            for *_, tasks in ahead:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(
        self, work: Work, free: list[Buffer]
    ) -> tuple[np.ndarray, np.ndarray, Buffer, list[Future]]:
        more = self._with_previous and len(work.indices)
        indices = np.append(work.indices, work.previous) if more else work.indices
        n, size = len(indices), self._image_size(work.epoch)
        needed = n * size * size * 3
        if hasattr(self._fill, "will_need"):
            self._fill.will_need(indices)
        fitting = [b for b in free if len(b.array) >= needed]
        if fitting:
            buffer = fitting[0]
            free.remove(buffer)
            buffer.wait_until_free()
        else:
            free.clear()  # too small: the first batch of a size is the largest, so this is rare
            buffer = Buffer(*self._allocate(needed))
        images = buffer.array[:needed].reshape(n, size, size, 3)
        parts = [slice(i, min(i + _PER_TASK, n)) for i in range(0, n, _PER_TASK)]
        tasks = [self._threads.submit(self._fill, images[p], indices[p], work.epoch) for p in parts]
        return indices, images, buffer, tasks

    def _finish(self, tasks: list[Future]) -> list[Skipped]:
        began = time.monotonic()
        bad = [
            one._replace(position=i * _PER_TASK + one.position)
            for i, task in enumerate(tasks)
            for one in task.result()
        ]
        self.waited_s += time.monotonic() - began
        return bad
