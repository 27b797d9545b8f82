"""Images -> slots of a batch, in the loader's threads: read, decode, crop, resize, flip. Nothing here needs torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from alexnet_ddp.config import ConfigError, DataConfig, OnBadImage
from alexnet_ddp.config.data import Interpolation
from alexnet_ddp.data.augment import Augment, Views
from alexnet_ddp.data.decode import BadImage, centre_into, crop_into, resize_into, scratch, size_of
from alexnet_ddp.data.policy import Operation, operate
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.runtime.errors import DataError


class Skipped(NamedTuple):
    """An image that could not be had, and is left out."""

    position: int  # in what was asked for
    index: int  # in the SampleIndex
    kind: str  # empty, damaged, too large, ...
    reason: str  # its name, and what is wrong with it


# fill(slots uint8 [n, size, size, 3], indices int64 [n], epoch) -> the bad images, whose slots are left as they were
Fill = Callable[[np.ndarray, np.ndarray, int], list[Skipped]]


def build_fill(cfg: DataConfig, index: SampleIndex, augment: Augment | None) -> Fill:
    """What fills slots with images of `index`; augment=None shows them as the evaluation sees them."""
    if hasattr(index.store, "fill"):
        return index.store.fill
    if getattr(index.store, "raw_size", None):
        if cfg.eval_interpolation is Interpolation.bicubic:
            rule = "is not possible with raw shards, which are resized bilinearly"
            raise ConfigError(
                f"data.eval_interpolation=bicubic {rule}; use data.eval_interpolation=bilinear"
            )
        return RawFill(index, augment, cfg)
    return ImageFill(index, augment, cfg)


@dataclass(frozen=True)
class _IndexFill:
    """Bad images raise DataError, or are skipped, as the user chose."""

    index: SampleIndex
    augment: Augment | None
    cfg: DataConfig

    def will_need(self, indices: np.ndarray) -> None:
        self.index.will_need(indices)

    def _guard(self, bad: list[Skipped], k: int, i: int, action: Callable[[], object]) -> object:
        """action(); where image i, at position k, turns out to be bad, note it or raise."""
        try:
            return action()
        except (BadImage, DataError) as error:
            reason = (
                str(error) if isinstance(error, DataError) else f"{self.index.name(i)}: {error}"
            )
            if self.cfg.on_bad_image is not OnBadImage.skip:
                remedy = "remove or mend it, or leave it out with data.on_bad_image=skip"
                raise DataError(
                    reason if isinstance(error, DataError) else f"{reason}; {remedy}"
                ) from None
            bad.append(Skipped(k, int(i), getattr(error, "kind", "unreadable"), reason))
            return None


@dataclass(frozen=True)
class ImageFill(_IndexFill):
    """Encoded images."""

    def __call__(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[Skipped]:
        bad: list[Skipped] = []
        if self.augment is None:
            how = self.cfg.eval_interpolation
            resize = round(self.cfg.eval_resize * slots.shape[1] / self.cfg.image_size)
            for k, i in enumerate(indices):
                self._guard(
                    bad,
                    k,
                    i,
                    lambda k=k, i=i: centre_into(slots[k], self.index.read(i), resize, how),
                )
            return bad
        data = [
            self._guard(bad, k, i, lambda i=i: self.index.read(i))
            for k, i in enumerate(indices.tolist())
        ]
        views = self.augment.views(epoch, indices, *self._sizes(bad, indices, data))
        boxes, flips = _boxes(views), views.flip.tolist()
        operations = self.augment.operations(epoch, indices, slots.shape[1])
        for k, i in enumerate(indices):
            if data[k] is not None:
                self._guard(bad, k, i, lambda k=k: crop_into(slots[k], data[k], boxes[k], flips[k]))
                operate(slots[k], operations[k])
                self.augment.finish(slots[k], epoch, int(i))
        return bad

    def _sizes(
        self, bad: list[Skipped], indices: np.ndarray, data: list[bytes | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Widths and heights, int64 [n], as an index knows them or from the headers; 1 for a bad image."""
        if hasattr(self.index.store, "dimensions"):
            return self.index.store.dimensions(indices)
        sizes = [(1, 1)] * len(data)
        for k, i in enumerate(indices):
            if data[k] is not None:
                size = self._guard(bad, k, i, lambda k=k: size_of(data[k]))
                data[k], sizes[k] = (None, (1, 1)) if size is None else (data[k], size)
        return tuple(np.array(sizes, dtype=np.int64).T)


@dataclass(frozen=True)
class RawFill(_IndexFill):
    """Raw images of shards: of each, the rows of its crop are read, and resized into the slot."""

    def __call__(self, slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[Skipped]:
        bad: list[Skipped] = []
        size = self.index.store.raw_size
        if self.augment is None:
            boxes, flips = [self._central_box(size)] * len(indices), [False] * len(indices)
            operations: list[list[Operation]] = [[]] * len(indices)
        else:
            operations = self.augment.operations(epoch, indices, slots.shape[1])
            views = self.augment.views(
                epoch, indices, *(np.full(len(indices), size, np.int64),) * 2
            )
            boxes, flips = _boxes(views), views.flip.tolist()
        for k, i in enumerate(indices.tolist()):
            self._guard(
                bad, k, i, lambda k=k, i=i: self._crop_into(slots[k], i, boxes[k], flips[k])
            )
            operate(slots[k], operations[k])
            if self.augment is not None:
                self.augment.finish(slots[k], epoch, i)
        return bad

    def _crop_into(self, slot: np.ndarray, i: int, box: list[int], flip: bool) -> None:
        store, (left, top, width, height) = self.index.store, box
        size = height * store.raw_size * 3
        rows = np.frombuffer(scratch(size), np.uint8, size).reshape(height, store.raw_size, 3)
        try:
            store.read_rows(i, top, rows)
        except OSError as error:
            raise DataError(
                f"{store.name(i)} cannot be read ({error.strerror or error}); copy it again"
            ) from error
        resize_into(slot, rows[:, left : left + width], flip)

    def _central_box(self, size: int) -> tuple[int, int, int, int]:
        """What the evaluation's resize and centre crop leave of the square."""
        side = round(size * self.cfg.image_size / self.cfg.eval_resize)
        start = round((size - side) / 2)
        return start, start, side, side


def _boxes(views: Views) -> list[list[int]]:
    """[left, top, width, height] for each."""
    return np.stack([views.left, views.top, views.width, views.height], axis=1).tolist()
