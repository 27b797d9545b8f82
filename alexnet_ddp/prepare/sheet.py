"""Draws the first images of a training, augmented as in the first epoch, with their classes."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alexnet_ddp.config import DataConfig, OnBadImage, PrepareConfig
from alexnet_ddp.config.schema import choice_of
from alexnet_ddp.data.augment import Augment, build_augment
from alexnet_ddp.data.fill import build_fill
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.imagenet import TRAIN, open_archive
from alexnet_ddp.data.sources.index import SampleIndex, index_folder
from alexnet_ddp.data.sources.sets import colour_basis
from alexnet_ddp.data.sources.shards import open_split
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.prepare.report import committed
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import say

_COLUMNS, _ROWS = 8, 6
_GAP, _LINE, _HEAD = 10, 20, 34  # pixels: between cells, of a class name, of the title
_PAPER, _INK, _MISSING = (255, 255, 255), (40, 40, 40), (225, 225, 225)


def sheet(cfg: PrepareConfig) -> None:
    """Write a PNG of the first training images of source if it is given, else of root.

    Raises DataError if they cannot be opened.
    """
    place = absolute(cfg.source or cfg.root)
    index, names, basis = _open(place, is_source=cfg.source is not None)
    data = DataConfig(image_size=cfg.image_size, on_bad_image=OnBadImage.skip)
    augment = build_augment(cfg.augment, cfg.seed, data.image_size, data.resized_side, basis)
    indices = GlobalBatchSampler(len(index), _COLUMNS * _ROWS, cfg.seed).batch(0)
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


def draw(pixels: list[np.ndarray | None], names: list[str], title: str) -> Image.Image:
    """Draw a grid of images, each with its class name below it and a line in the class's colour.

    Letters that Pillow's own font does not have are written as escapes, such as \\xf6.

    pixels: uint8 [size, size, 3] each; None for a bad image.
    """
    size = next((len(image) for image in pixels if image is not None), 128)
    rows, columns = -(-len(pixels) // _COLUMNS), min(_COLUMNS, len(pixels))
    width, height = _GAP + columns * (size + _GAP), _HEAD + rows * (size + _LINE + _GAP)
    page = Image.new("RGB", (width, height), _PAPER)
    pen, font, bold = ImageDraw.Draw(page), ImageFont.load_default(12), ImageFont.load_default(14)
    title, *names = (text.encode("ascii", "backslashreplace").decode() for text in (title, *names))
    pen.text((_GAP, 8), _fitted(title, width - 2 * _GAP, bold), _INK, bold)
    hues = {name: int(k * 255 / len(set(names))) for k, name in enumerate(sorted(set(names)))}
    for k, (image, name) in enumerate(zip(pixels, names)):
        left, top = (
            _GAP + k % _COLUMNS * (size + _GAP),
            _HEAD + k // _COLUMNS * (size + _LINE + _GAP),
        )
        if image is None:
            pen.rectangle((left, top, left + size - 1, top + size - 1), _MISSING)
            pen.text((left + 8, top + 8), "bad image", _INK, font)
        else:
            page.paste(Image.fromarray(image), (left, top))
        colour = Image.new("HSV", (1, 1), (hues[name], 170, 200)).convert("RGB").getpixel((0, 0))
        pen.rectangle((left, top + size, left + size - 1, top + size + 2), colour)
        pen.text((left, top + size + 4), _fitted(name, size, font), _INK, font)
    return page


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
    folder = index_folder(Path(place), "train")
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

    from alexnet_ddp.data.effects import Partners, apply_effects, normalise

    rows = np.arange(-1, len(indices) - 1) % len(indices)
    partners = Partners(rows, rows) if augment.mixes else None
    effects = augment.effects(0, indices, slots.shape[1], partners, torch.from_numpy)
    x = apply_effects(torch.from_numpy(slots), effects)
    black, white = (
        normalise(torch.full((1, 1, 1, 3), v, dtype=torch.uint8), None) for v in (0, 255)
    )
    pixels = (255 * (x - black) / (white - black)).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut `text` to `width` pixels, without characters that cannot be drawn."""
    text = text.encode(errors="replace").decode().replace("\n", " ")
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
