"""The bytes of one image as they came -> the bytes that a shard holds, or a fixed code that says why not.

The one rule: same bytes in, same recipe, same Pillow: same bytes out. So the text of an exception never leaves here.
"""

import io
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, features

from alexnet_ddp.config import Encoding
from alexnet_ddp.data import restarts
from alexnet_ddp.data.image import BadImage, crop_long_image, open_image, scaled_size, to_rgb


class Refused(Exception):
    """The image goes to the quarantine; the message is one of the codes of data/image.py."""


@dataclass(frozen=True)
class Recipe:
    """What is done to an image."""

    shorter_side: int | None  # pixels; larger images are resized to it, smaller ones never
    quality: int | None
    keep_original: bool | None
    encoding: Encoding
    size: int | None  # of raw images: pixels, height = width
    mean_image: int | None

    @property
    def suffix(self) -> str:
        return "npy" if self.encoding is Encoding.raw else "jpg"


@dataclass(frozen=True)
class Encoded:
    data: bytes
    pixels: np.ndarray  # uint8 [height, width, 3]: what Pillow decodes `data` to


_CONVERSION = 2  # of data/image.py: another number if it makes other pixels of the same bytes


def fingerprint() -> str:
    """What the bytes of a shard depend on beside recipe and source: Pillow, its JPEG library and our conversion."""
    turbo = features.version("libjpeg_turbo") or features.version("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {turbo}, conversion {_CONVERSION}"


def encode(data: bytes, recipe: Recipe) -> Encoded:
    """Decode in full, bring to RGB, resize where the recipe says so, encode. Raises Refused for a bad image."""
    try:
        image, is_plain = _decoded(data)
    except BadImage as error:
        raise Refused(error.code) from None
    if recipe.encoding is Encoding.raw:
        pixels = np.ascontiguousarray(square(image, recipe.size))
        return Encoded(_npy(pixels), pixels)
    small = _shrunk(image, recipe.shorter_side)
    if recipe.keep_original and is_plain and small is image and not restarts.has_table(data):
        return Encoded(data, np.asarray(image))  # grey in three channels here, in one there
    out, blocks = io.BytesIO(), restarts.interval(small.width)
    small.save(
        out,
        "JPEG",
        quality=recipe.quality,
        subsampling="4:2:0",
        comment=b"",
        restart_marker_blocks=blocks,
    )
    encoded = restarts.with_table(out.getvalue(), blocks)
    return Encoded(encoded, np.asarray(to_rgb(open_image(encoded))))


def square(image: Image.Image, size: int) -> np.ndarray:
    """The shorter side to `size` pixels, up or down, and the centre: uint8 [size, size, 3]."""
    image = crop_long_image(image)
    width, height = scaled_size(image.size, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _decoded(data: bytes) -> tuple[Image.Image, bool]:
    """The whole image in RGB, and whether the bytes are a JPEG that every decoder shows the same: RGB or grey."""
    image = open_image(data)
    is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    return to_rgb(image), is_plain


def _shrunk(image: Image.Image, shorter_side: int | None) -> Image.Image:
    if shorter_side is None or min(image.size) <= shorter_side:
        return image
    return image.resize(scaled_size(image.size, shorter_side), Image.Resampling.BILINEAR)


def _npy(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, pixels, version=(1, 0), allow_pickle=False)
    return out.getvalue()
