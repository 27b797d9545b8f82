"""The bytes of one image as they came -> the bytes that a shard holds, or a fixed code that says why not.

The one rule: same bytes in, same recipe, same Pillow: same bytes out. So the text of an exception never leaves here.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, ImageFile, UnidentifiedImageError, features

from alexnet_ddp.config import Encoding
from alexnet_ddp.config.data import MAX_PIXELS, MAX_SIDE
from alexnet_ddp.data import restarts

# The codes of the quarantine.
EMPTY, NOT_AN_IMAGE, TRUNCATED = "empty", "not_an_image", "truncated"
DECODE_ERROR, TOO_SMALL, BOMB = "decode_error", "too_small", "bomb"
_MIN_SIDE = 4  # pixels
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")  # Pillow would start Ghostscript for others
_LONGEST = 16  # times its height that an image may be wide before it is scaled to a square: memory is finite


class Refused(Exception):
    """The image goes to the quarantine; the message is one of the codes above."""


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


def fingerprint() -> str:
    """What the bytes of a shard depend on beside recipe and source: this machine's Pillow and its JPEG library."""
    turbo = features.version("libjpeg_turbo") or features.version("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {turbo}"


def encode(data: bytes, recipe: Recipe) -> Encoded:
    """Decode in full, bring to RGB, resize where the recipe says so, encode. Raises Refused for a bad image.

    An OSError with an errno is about the machine, not about the image, and is passed on.
    """
    image, is_plain = _decoded(data)
    if recipe.encoding is Encoding.raw:
        pixels = np.ascontiguousarray(square(image, recipe.size))
        return Encoded(_npy(pixels), pixels)
    small = _shrunk(image, recipe.shorter_side)
    if recipe.keep_original and is_plain and small is image and not restarts.has_table(data):
        return Encoded(data, np.asarray(image))  # grey in three channels here, in one there
    out, blocks = io.BytesIO(), restarts.interval(small.width)
    small.save(out, "JPEG", quality=recipe.quality, subsampling="4:2:0", comment=b"", restart_marker_blocks=blocks)
    encoded = restarts.with_table(out.getvalue(), blocks)
    return Encoded(encoded, np.asarray(Image.open(io.BytesIO(encoded))))


def square(image: Image.Image, size: int) -> np.ndarray:
    """The shorter side to `size` pixels, up or down, and the centre: uint8 [size, size, 3]."""
    image = _without_far_ends(image)
    width, height = _scaled(image.size, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _decoded(data: bytes) -> tuple[Image.Image, bool]:
    """The whole image in RGB, and whether the bytes are a JPEG that every decoder shows the same: RGB or grey."""
    if not data:
        raise Refused(EMPTY)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some other library of the process may want otherwise
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF blocks and palettes: nothing that is kept
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_size(*image.size)
            is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            image.load()
            return _to_rgb(image), is_plain
    except UnidentifiedImageError:
        raise Refused(NOT_AN_IMAGE) from None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise Refused(TRUNCATED if "truncated" in str(error).lower() else DECODE_ERROR) from None
    except Refused:
        raise
    except Exception:  # Pillow's many readers raise nearly anything for damaged bytes
        raise Refused(DECODE_ERROR) from None


def _check_size(width: int, height: int) -> None:
    if min(width, height) < _MIN_SIDE:
        raise Refused(TOO_SMALL)
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise Refused(BOMB)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits. Pillow's own convert() would clip 16-bit grey to white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        scale = 8 if grey.max(initial=0) > 255 else 0
        image = Image.fromarray((np.clip(grey, 0, 65_535) >> scale).astype(np.uint8))
    return image.convert("RGB")


def _shrunk(image: Image.Image, shorter_side: int | None) -> Image.Image:
    if shorter_side is None or min(image.size) <= shorter_side:
        return image
    return image.resize(_scaled(image.size, shorter_side), Image.Resampling.BILINEAR)


def _without_far_ends(image: Image.Image) -> Image.Image:
    (width, height), longest = image.size, _LONGEST * min(image.size)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _scaled(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """(width, height) with the shorter one as given: rounded as torchvision's Resize does."""
    width, height = size
    long = int(shorter_side * max(size) / min(size))
    return (shorter_side, long) if width <= height else (long, shorter_side)


def _npy(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, pixels, version=(1, 0), allow_pickle=False)
    return out.getvalue()
