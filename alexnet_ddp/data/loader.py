"""Batches on the device: what prefetch.py has filled in host memory is copied without waiting."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from alexnet_ddp.config import DataConfig
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.fill import Fill, build_fill
from alexnet_ddp.data.index import SampleIndex
from alexnet_ddp.data.prefetch import HostBatch, Prefetcher
from alexnet_ddp.data.sampler import Work


@dataclass(frozen=True)
class Batch:
    """What one forward pass of one rank sees."""

    work: Work
    images: torch.Tensor  # uint8 [n, size, size, 3] on the device; valid until the next batch is asked for
    labels: torch.Tensor  # int64 [n] on the device
    indices: torch.Tensor  # int32 [n] on the device
    colour: torch.Tensor | None  # float32 [n, 3] to add to RGB in [0, 1]


class Loader:
    """Turns Works into Batches with `num_threads` threads, from pinned memory where the device is a GPU.

    image_size(epoch): pixels, height = width.
    """

    def __init__(
        self,
        fill: Fill,
        labels: np.ndarray,
        colour: Callable[[int, np.ndarray], np.ndarray | None],
        image_size: Callable[[int], int],
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._labels, self._colour, self._device = labels, colour, device
        self._prefetcher = Prefetcher(fill, image_size, num_threads, self._allocate)

    @property
    def waited_s(self) -> float:
        """Seconds that the user of the batches had to wait for them."""
        return self._prefetcher.waited_s

    def batches(self, works: Iterable[Work]) -> Iterator[Batch]:
        """The Batch of each Work, in order. An error in a thread is raised where its Batch is asked for."""
        with closing(self._prefetcher.batches(works)) as batches:
            yield from map(self._to_device, batches)

    def close(self) -> None:
        self._prefetcher.close()

    def _allocate(self, size: int) -> tuple[np.ndarray, torch.Tensor]:
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return tensor.numpy(), tensor

    def _to_device(self, host: HostBatch) -> Batch:
        work, indices = host.work, host.work.indices
        images = host.buffer.owner[: host.images.size].view(host.images.shape)
        if host.bad:  # rare, so a copy may be made
            good = np.setdiff1d(np.arange(len(indices)), host.bad)
            images, indices = images[torch.from_numpy(good)], indices[good]
        batch = Batch(
            work,
            images.to(self._device, non_blocking=True),
            torch.from_numpy(self._labels[indices].astype(np.int64)).to(self._device, non_blocking=True),
            torch.from_numpy(indices.astype(np.int32)).to(self._device, non_blocking=True),
            self._colour_of(work.epoch, indices),
        )
        if self._device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
            host.buffer.wait_until_free = copied.synchronize
        return batch

    def _colour_of(self, epoch: int, indices: np.ndarray) -> torch.Tensor | None:
        shift = self._colour(epoch, indices)
        return None if shift is None else torch.from_numpy(shift).to(self._device, non_blocking=True)


def build_loader(
    cfg: DataConfig,
    index: SampleIndex,
    augment: Augment | None,
    num_threads: int,
    device: torch.device,
    may_grow: bool = False,
) -> Loader:
    """A loader of `index`; augment=None shows the images as the evaluation sees them.

    may_grow: images of early epochs are smaller, where `cfg` says so.
    """
    colour = augment.colour if augment else _no_colour
    fill = build_fill(cfg, index, augment)
    size = cfg.train_image_size if may_grow else lambda epoch: cfg.image_size
    return Loader(fill, index.labels, colour, size, cfg.num_threads or num_threads, device)


def _no_colour(epoch: int, indices: np.ndarray) -> None:
    return None
