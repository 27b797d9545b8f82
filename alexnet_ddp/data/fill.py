"""Fills a batch with images, in the loader's threads: read, decode, crop, resize, flip.

This module does not need torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from alexnet_ddp.config import ConfigError, DataConfig, OnBadImage
from alexnet_ddp.config.data import Interpolation
from alexnet_ddp.data.augment import Augment, Views
from alexnet_ddp.data.decode import BadImage, crop_into, resize_into, scratch, size_of, views_into
from alexnet_ddp.data.policy import operate
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.shards import ShardStore
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.data.sources.synthetic import SyntheticStore
from alexnet_ddp.data.views import CENTRE, EvalViews
from alexnet_ddp.runtime.errors import DataError

T = TypeVar("T")

# fill(slots uint8 [n, views * size, size, 3], indices int64 [n], epoch) returns the bad images;
# their slots are left unchanged. The views of an image are below each other.
Fill = Callable[[np.ndarray, np.ndarray, int], list[Skipped]]


def build_fill(
    cfg: DataConfig, index: SampleIndex, augment: Augment | None, views: EvalViews = CENTRE
) -> Fill:
    """The function that fills slots with images of `index`.

    augment: None for the evaluation's resize and `views`, which are the centre crop in training.
    Raises ConfigError for raw images and data.eval_interpolation=bicubic, and for several views of
    synthetic images.
    """
    match index.store:
        case SyntheticStore() as store:
            if len(views) > 1:
                rule = "crops and flip have no effect on synthetic images, which have no borders"
                raise ConfigError(f"{rule}; leave them out")
            fill = store.fill
            return lambda slots, indices, epoch: fill(slots, indices % len(index), epoch)
        case ShardStore(raw_size=int(raw_size)) as store:
            if cfg.eval_interpolation is Interpolation.bicubic:
                rule = "is not possible with raw shards, which are resized bilinearly"
                remedy = "use data.eval_interpolation=bilinear"
                raise ConfigError(f"data.eval_interpolation=bicubic {rule}; {remedy}")
            return RawFill(index, augment, cfg, views, store, raw_size)
        case _:
            return ImageFill(index, augment, cfg, views)


@dataclass(frozen=True)
class _IndexFill:
    """Bad images raise DataError or are skipped, according to data.on_bad_image."""

    index: SampleIndex
    augment: Augment | None
    cfg: DataConfig
    views: EvalViews

    def _guard(self, bad: list[Skipped], k: int, i: int, action: Callable[[], T]) -> T | None:
        """Return action(). If image i, at position k, is bad: append it to `bad`, or raise.

        Raises DataError unless data.on_bad_image=skip.
        """
        skip = self.cfg.on_bad_image is OnBadImage.skip
        try:
            return action()
        except BadImage as error:
            reason = f"{self.index.name(i)}: {error}"
            if not skip:
                remedy = "remove or fix it, or leave it out with data.on_bad_image=skip"
                raise DataError(f"{reason}; {remedy}") from None
            bad.append(Skipped(k, int(i) % len(self.index), error.kind, reason))
        except DataError as error:
            if not skip:
                raise DataError(str(error)) from None
            bad.append(Skipped(k, int(i) % len(self.index), "unreadable", str(error)))
        return None


@dataclass(frozen=True)
class ImageFill(_IndexFill):
    """Fills slots with encoded images."""

    def __call__(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[Skipped]:
        bad: list[Skipped] = []
        if self.augment is None:
            for k, i in enumerate(indices):
                self._guard(bad, k, i, partial(self._views_into, slots[k], i))
            return bad
        data = [
            self._guard(bad, k, i, partial(self.index.read, i))
            for k, i in enumerate(indices.tolist())
        ]
        views = self.augment.views(epoch, indices, *self._sizes(bad, indices, data))
        boxes, flips = _boxes(views), views.flip.tolist()
        operations = self.augment.operations(epoch, indices, slots.shape[1])
        for k, i in enumerate(indices):
            image = data[k]
            if image is not None:
                self._guard(bad, k, i, partial(crop_into, slots[k], image, boxes[k], flips[k]))
                operate(slots[k], operations[k])
                self.augment.finish(slots[k], epoch, int(i))
        return bad

    def _views_into(self, slot: np.ndarray, i: int) -> None:
        size = slot.shape[1]
        resize = round(self.cfg.resized_side * size / self.cfg.image_size)
        how, slots = self.cfg.eval_interpolation, slot.reshape(-1, size, size, 3)
        views_into(slots, self.index.read(i), resize, how, self.views)

    def _sizes(
        self, bad: list[Skipped], indices: np.ndarray, data: list[bytes | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Widths and heights in pixels, int64 [n], from the index or the headers; 1 if bad."""
        known = self.index.dimensions(indices)
        if known is not None:
            return known
        sizes = [(1, 1)] * len(data)
        for k, i in enumerate(indices):
            image = data[k]
            if image is not None:
                size = self._guard(bad, k, i, partial(size_of, image))
                data[k], sizes[k] = (None, (1, 1)) if size is None else (image, size)
        return tuple(np.array(sizes, dtype=np.int64).T)


@dataclass(frozen=True)
class RawFill(_IndexFill):
    """Fills slots with raw images of shards: reads the rows of a crop only, and resizes them."""

    store: ShardStore
    raw_size: int  # height = width of the raw images, in pixels

    def __call__(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[Skipped]:
        bad: list[Skipped] = []
        if self.augment is None:
            for k, i in enumerate(indices.tolist()):
                self._guard(bad, k, i, partial(self._views_into, slots[k], i))
            return bad
        size = np.full(len(indices), self.raw_size, np.int64)
        operations = self.augment.operations(epoch, indices, slots.shape[1])
        views = self.augment.views(epoch, indices, size, size)
        boxes, flips = _boxes(views), views.flip.tolist()
        for k, i in enumerate(indices.tolist()):
            self._guard(bad, k, i, partial(self._crop_into, slots[k], i, boxes[k], flips[k]))
            operate(slots[k], operations[k])
            self.augment.finish(slots[k], epoch, i)
        return bad

    def _views_into(self, slot: np.ndarray, i: int) -> None:
        size, side = slot.shape[1], self._side
        for part, view in zip(slot.reshape(-1, size, size, 3), self.views, strict=True):
            corner = view.corner((self.raw_size, self.raw_size), (side, side))
            self._crop_into(part, i, (*corner, side, side), view.flip)

    def _crop_into(
        self, slot: np.ndarray, i: int, box: tuple[int, int, int, int], flip: bool
    ) -> None:
        left, top, width, height = box
        size = height * self.raw_size * 3
        rows = np.frombuffer(scratch(size), np.uint8, size).reshape(height, self.raw_size, 3)
        try:
            self.store.read_rows(i % len(self.index), top, rows)
        except OSError as error:
            raise DataError(
                f"{self.index.name(i)} cannot be read ({error.strerror or error}); copy it again"
            ) from error
        resize_into(slot, rows[:, left : left + width], flip)

    @property
    def _side(self) -> int:
        """Height = width of a crop of the evaluation in the raw image, in pixels."""
        return round(self.raw_size * self.cfg.image_size / self.cfg.resized_side)


def _boxes(views: Views) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) of each view."""
    sides = (views.left.tolist(), views.top.tolist(), views.width.tolist(), views.height.tolist())
    return list(zip(*sides))
