"""Fills batches in host memory with threads, ahead of the training step.

Decoding releases the GIL, so threads replace worker processes: nothing is pickled, nothing uses
/dev/shm, and no worker can be lost. The order of the batches depends on the given micro-batches
alone, so a resumed run sees exactly the same ones.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alexnet_ddp.data.fill import Fill
from alexnet_ddp.data.sampler import MicroBatch
from alexnet_ddp.data.sources.source import Skipped

_AHEAD = 3  # batches being filled while one is used
_PER_TASK = (
    16  # images per task: enough to hide Python's overhead, and small batches use all threads
)

# allocate(bytes) returns (uint8 [bytes], the object that owns the memory)
Allocate = Callable[[int], tuple[np.ndarray, Any]]


@dataclass
class Buffer:
    """A reusable batch in host memory."""

    array: np.ndarray  # uint8 [bytes]
    owner: Any
    wait_until_free: Callable[[], None] = lambda: None  # the device may still be copying from it


@dataclass(frozen=True)
class HostBatch:
    """A filled batch, valid until the next one is requested.

    Its buffer is reused after that, once `buffer.wait_until_free` returns.
    """

    micro_batch: MicroBatch
    indices: np.ndarray  # int64 [n]: micro_batch.indices, perhaps followed by micro_batch.previous
    images: np.ndarray  # uint8 [n, views * size, size, 3], at the beginning of the buffer
    buffer: Buffer
    bad: list[Skipped]  # positions refer to `indices`


class Prefetcher:
    """Fills a HostBatch for each MicroBatch with `threads`.

    image_size(epoch): pixels, height = width.
    will_need(indices): a hint that these images will be read soon.
    with_previous: also load the image before those of a micro-batch (for mixing).
    num_views: of each image.
    waited_s: seconds that the consumer has waited for batches so far.
    """

    def __init__(
        self,
        fill: Fill,
        image_size: Callable[[int], int],
        threads: ThreadPoolExecutor,
        allocate: Allocate,
        with_previous: bool = False,
        will_need: Callable[[np.ndarray], None] | None = None,
        *,
        num_views: int = 1,
    ) -> None:
        self._fill, self._image_size, self._allocate = fill, image_size, allocate
        self._num_views = num_views
        self._threads, self._with_previous, self._will_need = threads, with_previous, will_need
        self.waited_s = 0.0

    def batches(self, micro_batches: Iterable[MicroBatch]) -> Generator[HostBatch, None, None]:
        """Yield the HostBatch of each MicroBatch, in order.

        An error in a thread is raised when its batch is requested.
        """
        todo, free = iter(micro_batches), list[Buffer]()
        ahead: deque[tuple[MicroBatch, np.ndarray, np.ndarray, Buffer, list[Future]]] = deque()
        try:
            while True:
                while len(ahead) <= _AHEAD and (micro_batch := next(todo, None)) is not None:
                    ahead.append((micro_batch, *self._start(micro_batch, free)))
                if not ahead:
                    return
                micro_batch, indices, images, buffer, tasks = ahead.popleft()
                yield HostBatch(micro_batch, indices, images, buffer, self._finish(tasks))
                free.append(buffer)
        finally:
            for *_, tasks in ahead:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(
        self, micro_batch: MicroBatch, free: list[Buffer]
    ) -> tuple[np.ndarray, np.ndarray, Buffer, list[Future]]:
        """Start to fill a batch; returns its indices, images, buffer and tasks."""
        indices, epoch = micro_batch.indices, micro_batch.epoch
        if self._with_previous and micro_batch.previous is not None:
            indices = np.append(indices, micro_batch.previous)
        n, size = len(indices), self._image_size(epoch)
        height = self._num_views * size
        needed = n * height * size * 3
        if self._will_need is not None:
            self._will_need(indices)
        fitting = [b for b in free if len(b.array) >= needed]
        if fitting:
            buffer = fitting[0]
            free.remove(buffer)
            buffer.wait_until_free()
        else:
            free.clear()  # too small; rare, because the first batch of an image size is the largest
            buffer = Buffer(*self._allocate(needed))
        images = buffer.array[:needed].reshape(n, height, size, 3)
        parts = [slice(i, min(i + _PER_TASK, n)) for i in range(0, n, _PER_TASK)]
        tasks = [self._threads.submit(self._fill, images[p], indices[p], epoch) for p in parts]
        return indices, images, buffer, tasks

    def _finish(self, tasks: list[Future]) -> list[Skipped]:
        began = time.monotonic()
        bad = [
            replace(one, position=i * _PER_TASK + one.position)
            for i, task in enumerate(tasks)
            for one in task.result()
        ]
        self.waited_s += time.monotonic() - began
        return bad
