"""Turns the source bytes of one image into the bytes of a shard.

The same bytes, recipe and Pillow give the same result. An image that cannot be used therefore gets
a fixed code: the text of an exception could differ between machines.
"""

import io
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, features

from alexnet_ddp.config.prepare import Encoding
from alexnet_ddp.data import restarts
from alexnet_ddp.data.image import BadImage, crop_long_image, open_image, scaled_size, to_rgb


class Refused(Exception):
    """The image is quarantined. The message is one of the codes of data/image.py."""


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


_CONVERSION = 2  # increment if data/image.py converts the same bytes to other pixels


def fingerprint() -> str:
    """Versions of Pillow, its JPEG library and our conversion, which the bytes depend on."""
    turbo = features.version("libjpeg_turbo") or features.version("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {turbo}, conversion {_CONVERSION}"


def encode(data: bytes, recipe: Recipe) -> Encoded:
    """Decode an image completely, convert it to RGB, resize and encode it as `recipe` requires.

    Raises Refused for a bad image.
    """
    try:
        image, is_plain = _decoded(data)
    except BadImage as error:
        raise Refused(error.code) from None
    if recipe.encoding is Encoding.raw:
        assert recipe.size is not None  # it is set for raw images
        pixels = np.ascontiguousarray(square(image, recipe.size))
        return Encoded(_npy(pixels), pixels)
    small = _shrunk(image, recipe.shorter_side)
    if recipe.keep_original and is_plain and small is image and not restarts.has_table(data):
        return Encoded(data, np.asarray(image))  # a grey image: 3 channels here, 1 in `data`
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
    """Resize the shorter side to `size` pixels and crop the centre: uint8 [size, size, 3]."""
    image = crop_long_image(image)
    width, height = scaled_size(image.size, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _decoded(data: bytes) -> tuple[Image.Image, bool]:
    """Return the image in RGB, and whether it is a JPEG that all decoders read alike."""
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
