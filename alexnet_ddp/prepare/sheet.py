"""Draws the first images of a training, augmented as in the first epoch, with their classes."""

import io
import os
from pathlib import Path

import numpy as np

from alexnet_ddp.config import DataConfig, OnBadImage
from alexnet_ddp.config.prepare import PrepareConfig
from alexnet_ddp.config.schema import choice_of
from alexnet_ddp.data.augment import Augment, build_augment
from alexnet_ddp.data.fill import build_fill
from alexnet_ddp.data.picture import draw
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.imagenet import TRAIN, open_archive
from alexnet_ddp.data.sources.index import SampleIndex, index_folder
from alexnet_ddp.data.sources.sets import colour_basis
from alexnet_ddp.data.sources.shards import open_split
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.prepare.report import committed
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import say

_COUNT = 48  # images


def sheet(cfg: PrepareConfig) -> None:
    """Write a PNG of the first training images of source if it is given, else of root.

    Raises DataError if they cannot be opened.
    """
    place = absolute(cfg.source or cfg.root)
    index, names, basis = _open(place, is_source=cfg.source is not None)
    data = DataConfig(image_size=cfg.image_size, on_bad_image=OnBadImage.skip)
    augment = build_augment(cfg.augment, cfg.seed, data.image_size, data.resized_side, basis)
    indices = GlobalBatchSampler(len(index), _COUNT, cfg.seed).batch(0)
    pixels = _pixels(data, index, augment, indices)
    kind = choice_of("augment", type(cfg.augment))
    title = (
        f"{place}: the first {len(indices)} of {len(index):,} training images, "
        f"seed {cfg.seed}, augment {kind}"
    )
    out = io.BytesIO()
    draw(pixels, [names[label].split(",")[0] for label in index.labels[indices]], title).save(
        out, "PNG"
    )
    target = absolute(cfg.output or f"{cfg.root}/train.sheet.png")
    folder, _, name = target.rpartition("/")
    if cfg.output:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(out.getvalue())
    else:
        Storage(folder).write(name, out.getvalue())
    say(target)


def _open(
    place: str, is_source: bool
) -> tuple[SampleIndex, list[str], tuple[np.ndarray, np.ndarray] | None]:
    """Return (training images, class names, principal axes of their colours if they are known)."""
    storage = Storage(place)
    if not is_source:
        index = committed(storage)
        if "train" not in index.splits:
            raise DataError(f"root ({place}) has no train shards; prepare them: split=train")
        return open_split(storage, index, "train", None), index.class_names, colour_basis(storage)
    if os.path.exists(storage.path(TRAIN)):
        archive, _, names = open_archive(Path(place), "train")
        return archive, names, None
    folder = index_folder(Path(place), "train", option="source")
    return folder, folder.classes, None


def _pixels(
    cfg: DataConfig, index: SampleIndex, augment: Augment | None, indices: np.ndarray
) -> list[np.ndarray | None]:
    slots = np.zeros((len(indices), cfg.image_size, cfg.image_size, 3), np.uint8)
    bad = build_fill(cfg, index, augment)(slots, indices, 0)
    if augment is not None:
        slots = _with_effects(slots, augment, indices)
    positions = {one.position for one in bad}
    return [None if k in positions else slot for k, slot in enumerate(slots)]


def _with_effects(slots: np.ndarray, augment: Augment, indices: np.ndarray) -> np.ndarray:
    """Apply the effects of the device: jitter, noise, erasing, and mixing with the image before."""
    import torch  # only here: the other actions start without torch

    from alexnet_ddp.data.effects import Partners, apply_effects, to_pixels

    rows = np.arange(-1, len(indices) - 1) % len(indices)
    partners = Partners(rows, rows) if augment.mixes else None
    effects = augment.effects(0, indices, slots.shape[1], partners, torch.from_numpy)
    return to_pixels(apply_effects(torch.from_numpy(slots), effects), effects.normalisation)
