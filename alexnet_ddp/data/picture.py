"""Draws images with the names of their classes as one picture."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 8
_GAP, _LINE, _HEAD = 10, 20, 34  # pixels: between cells, of a class name, of the title
_PAPER, _INK, _MISSING = (255, 255, 255), (40, 40, 40), (225, 225, 225)


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


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut `text` to `width` pixels, without characters that cannot be drawn."""
    text = text.encode(errors="replace").decode().replace("\n", " ")
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def jpeg(pixels: np.ndarray, max_side: int, quality: int = 82) -> bytes:
    """A JPEG of uint8 [height, width, 3], reduced until no side is longer than max_side pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [height, width, 3]."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def enlarged(values: np.ndarray, size: int) -> np.ndarray:
    """Float [height, width] resized to float32 [size, size], smoothly."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
