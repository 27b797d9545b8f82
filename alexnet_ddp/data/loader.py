"""Batches on the device: copies what prefetch.py filled in host memory, asynchronously."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from alexnet_ddp.config import DataConfig
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.effects import Effects, Partners, apply_effects, partner_rows
from alexnet_ddp.data.fill import Fill, build_fill
from alexnet_ddp.data.prefetch import HostBatch, Prefetcher
from alexnet_ddp.data.sampler import MicroBatch
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.data.views import CENTRE, EvalViews


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass on one rank. The tensors are on the device.

    m = n, except that with mixing (mixup, CutMix) m may be n + 1: the last image is then only used
    to be mixed into the first one.
    """

    micro_batch: MicroBatch
    # uint8 [m, views * size, size, 3], until the next batch is requested; the views of an image are
    # below each other. Or features: float32 [n, ...]
    images: torch.Tensor
    labels: torch.Tensor  # int64 [n]
    indices: torch.Tensor  # int32 [n], of MicroBatch.indices
    effects: Effects
    bad: list[Skipped]  # images of the micro-batch that were left out

    def inputs(self) -> torch.Tensor:
        """The input of the network: float [m * views, 3, size, size], or the features.

        The views of an image follow each other. Only an evaluation has several.
        """
        if self.images.is_floating_point():
            return self.images
        size = self.images.shape[2]
        return apply_effects(self.images.reshape(-1, size, size, 3), self.effects)


@dataclass(eq=False)
class Loader:
    """Loads a Batch for each MicroBatch with `num_threads` threads; uses pinned memory for a GPU.

    labels: int32 [N], of all images of the index.
    image_size(epoch): pixels, height = width.
    will_need(indices): a hint that these images will be read soon.
    plain: the effects on every image: the normalisation.
    num_views: of each image, which `fill` writes.
    """

    fill: Fill
    labels: np.ndarray
    augment: Augment | None
    image_size: Callable[[int], int]
    num_threads: int
    device: torch.device
    will_need: Callable[[np.ndarray], None] | None = None
    plain: Effects = field(default_factory=Effects)
    num_views: int = 1

    def __post_init__(self) -> None:
        self._mixes = self.augment is not None and self.augment.mixes
        # Each decoding thread runs torch on one thread, as in torch's DataLoader. set_num_threads()
        # also changes the default of threads that have not read it yet, so read it here first.
        torch.get_num_threads()
        threads = ThreadPoolExecutor(self.num_threads, "decode", torch.set_num_threads, (1,))
        self._prefetcher = Prefetcher(
            self.fill,
            self.image_size,
            threads,
            self._allocate,
            self._mixes,
            self.will_need,
            num_views=self.num_views,
        )

    @property
    def waited_s(self) -> float:
        """Seconds that the consumer has waited for batches so far."""
        return self._prefetcher.waited_s

    def batches(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        """Yield the Batch of each MicroBatch, in order.

        An error in a thread is raised when its Batch is requested.
        """
        with closing(self._prefetcher.batches(micro_batches)) as batches:
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
        n = np.count_nonzero(slots < len(host.micro_batch.indices))
        batch = Batch(
            host.micro_batch,
            images.to(self.device, non_blocking=True),
            self._copy(self._labels(indices[:n])),
            self._copy(indices[:n].astype(np.int32)),
            self._effects(host, indices, slots),
            [one for one in host.bad if one.position < len(host.micro_batch.indices)],
        )
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
            host.buffer.wait_until_free = copied.synchronize
        return batch

    def _effects(self, host: HostBatch, indices: np.ndarray, slots: np.ndarray) -> Effects:
        """indices: of the images that could be decoded; slots: their positions in the buffer."""
        if self.augment is None:
            return self.plain
        partners = None
        if self._mixes:
            rows = partner_rows(slots, len(host.micro_batch.indices))
            partners = Partners(rows, self._labels(indices[rows]))
        effects = self.augment.effects(
            host.micro_batch.epoch, indices, host.images.shape[1], partners, self._copy
        )
        return replace(effects, normalisation=self.plain.normalisation)

    def _labels(self, indices: np.ndarray) -> np.ndarray:
        """The labels of images, or of their repeats: int64, in the shape of `indices`."""
        return self.labels[indices % len(self.labels)].astype(np.int64)

    def _copy(self, array: np.ndarray) -> torch.Tensor:
        """Copy to the device, asynchronously."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def build_loader(
    cfg: DataConfig,
    index: SampleIndex,
    augment: Augment | None,
    num_threads: int,
    device: torch.device,
    may_grow: bool = False,
    *,
    views: EvalViews = CENTRE,
) -> Loader:
    """A loader for the images of `index`.

    augment: None for the evaluation's resize and `views`.
    num_threads: used unless data.num_threads is set.
    may_grow: use data's schedule of image sizes, with smaller images in early epochs.
    """
    fill = build_fill(cfg, index, augment, views)
    size = cfg.train_image_size if may_grow else lambda epoch: cfg.image_size
    threads = cfg.num_threads or num_threads
    plain = Effects(normalisation=cfg.normalisation)
    return Loader(
        fill, index.labels, augment, size, threads, device, index.will_need, plain, len(views)
    )
