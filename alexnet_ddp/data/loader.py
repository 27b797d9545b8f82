"""Batches on the device: what prefetch.py has filled in host memory is copied without waiting."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from alexnet_ddp.config import DataConfig
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.effects import Effects, Partners, partner_rows
from alexnet_ddp.data.fill import Fill, Skipped, build_fill
from alexnet_ddp.data.prefetch import HostBatch, Prefetcher
from alexnet_ddp.data.sampler import Work
from alexnet_ddp.data.sources.index import SampleIndex


@dataclass(frozen=True)
class Batch:
    """What one forward pass of one rank sees."""

    work: Work
    images: (
        torch.Tensor
    )  # uint8 [m, size, size, 3] on the device; valid until the next batch is asked for
    labels: (
        torch.Tensor
    )  # int64 [n] on the device. m = n; but where images are mixed, m may be n + 1:
    indices: (
        torch.Tensor
    )  # int32 [n] on the device. then the last image is only there for the first to be mixed with
    effects: Effects
    bad: list[Skipped]  # images of the work that are left out


@dataclass(eq=False)
class Loader:
    """Turns Works into Batches with `num_threads` threads, from pinned memory where the device is a GPU.

    image_size(epoch): pixels, height = width. plain: the effects of every image: normalisation.
    """

    fill: Fill
    labels: np.ndarray
    augment: Augment | None
    image_size: Callable[[int], int]
    num_threads: int
    device: torch.device
    plain: Effects = field(default_factory=Effects)

    def __post_init__(self) -> None:
        self._mixes = self.augment is not None and self.augment.mixes
        # One thread of torch's for each of ours, as torch's data loader has it. The setting is the thread's own, and
        # the default of threads that have not asked yet: this one asks first.
        torch.get_num_threads()
        threads = ThreadPoolExecutor(self.num_threads, "decode", torch.set_num_threads, (1,))
        self._prefetcher = Prefetcher(
            self.fill, self.image_size, threads, self._allocate, self._mixes
        )

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
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return tensor.numpy(), tensor

    def _to_device(self, host: HostBatch) -> Batch:
        indices, slots = host.indices, np.arange(len(host.indices))
        images = host.buffer.owner[: host.images.size].view(host.images.shape)
        if host.bad:  # rare, so a copy may be made
            slots = np.setdiff1d(slots, [one.position for one in host.bad])
            images, indices = images[torch.from_numpy(slots)], indices[slots]
        n = np.count_nonzero(slots < len(host.work.indices))
        batch = Batch(
            host.work,
            images.to(self.device, non_blocking=True),
            self._copy(self.labels[indices[:n]].astype(np.int64)),
            self._copy(indices[:n].astype(np.int32)),
            self._effects(host, indices, slots),
            [one for one in host.bad if one.position < len(host.work.indices)],
        )
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
            host.buffer.wait_until_free = copied.synchronize
        return batch

    def _effects(self, host: HostBatch, indices: np.ndarray, slots: np.ndarray) -> Effects:
        """indices: of the images that could be decoded, and slots: where they are in the buffer."""
        if self.augment is None:
            return self.plain
        partners = None
        if self._mixes:
            rows = partner_rows(slots, len(host.work.indices))
            partners = Partners(rows, self.labels[indices[rows]].astype(np.int64))
        effects = self.augment.effects(
            host.work.epoch, indices, host.images.shape[1], partners, self._copy
        )
        return replace(effects, normalisation=self.plain.normalisation)

    def _copy(self, array: np.ndarray) -> torch.Tensor:
        """To the device, without waiting for it."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)


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
    fill = build_fill(cfg, index, augment)
    size = cfg.train_image_size if may_grow else lambda epoch: cfg.image_size
    plain = Effects(normalisation=cfg.normalisation)
    threads = cfg.num_threads or num_threads
    return Loader(fill, index.labels, augment, size, threads, device, plain)
