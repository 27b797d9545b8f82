"""Opens an image, checks it and converts it to RGB.

No other module passes untrusted bytes to Pillow. Training, evaluation, prediction and preparation
use this one, so they accept the same files and get the same pixels. PIL is imported when the first
image is opened, because importing it takes time and the fast JPEG path does not need it.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from alexnet_ddp.config.data import MAX_BYTES, MAX_PIXELS, MAX_SIDE
from alexnet_ddp.data.storage import read_regular

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF", "AVIF")  # JPEG includes MPO

# The codes of bad images. They are part of a file format (the quarantine), so they never change.
EMPTY, NOT_AN_IMAGE, TRUNCATED, DECODE_ERROR = "empty", "not_an_image", "truncated", "decode_error"
BOMB, SAMPLE_TYPE, UNREADABLE = "bomb", "sample_type", "unreadable"
# The kinds of bad images; for the other codes, the code with spaces.
_KINDS = {TRUNCATED: "damaged", DECODE_ERROR: "damaged", BOMB: "too large"}

_MAX_RATIO = 16  # longer side / shorter side; longer images are cropped before they are resized
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_SIGNED = 2  # a value of the tag SampleFormat
_WHITE_IS_ZERO = 0  # a value of the tag PhotometricInterpretation
_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class BadImage(ValueError):
    """The bytes are not a usable image. The message gives the reason."""

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason)
        self.code = code  # one of the codes above

    @property
    def kind(self) -> str:
        """The code in one or two words, for the quarantine of a run."""
        return _KINDS.get(self.code, self.code.replace("_", " "))


def read_file(path: str) -> bytes:
    """The bytes of an image file. Raises NotAFile if it cannot be one, OSError for I/O failures."""
    return read_regular(path, largest=MAX_BYTES)


def check_size(width: int, height: int) -> tuple[int, int]:
    """Return (width, height), in pixels. Raises BadImage if they exceed the limits."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"the limit is {MAX_SIDE} a side and {MAX_PIXELS} in all"
        raise BadImage(f"{width} x {height} pixels; {limit}", BOMB)
    if min(width, height) < 1:
        raise BadImage(f"{width} x {height} pixels; an image has at least one", DECODE_ERROR)
    return width, height


def open_image(data: bytes | bytearray) -> "Image.Image":
    """Open an image and check its header; the pixels are not decoded yet. Raises BadImage."""
    if not data:
        raise BadImage("the file is empty", EMPTY)
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data):,} bytes, an image has at most {MAX_BYTES:,}", BOMB)
    from PIL import Image

    _prepare_pillow()
    with _decoding():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(*image.size)
    if image.mode == "F":  # floats have no largest value to scale by
        raise BadImage(
            "floating-point samples; convert them to unsigned integers of 8 or 16 bits", SAMPLE_TYPE
        )
    return image


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Decode an image from open_image() to 8-bit RGB. Raises BadImage.

    Integer samples of any depth are scaled by the largest value of their type: 16-bit samples are
    divided by 257 and rounded. Pillow itself converts 16-bit colour images: it keeps the upper 8
    bits, which differs by at most one level.
    """
    with _decoding():
        image.load()
        if image.mode.startswith("I") or _is_signed(image):
            image = _scaled_grey(image)
        return image.convert("RGB")


def crop_long_image(image: "Image.Image") -> "Image.Image":
    """Crop the middle of a very long image before it is resized and centre-cropped.

    Resizing the whole image would need gigabytes. Other images are returned unchanged.
    """
    (width, height), longest = image.size, _MAX_RATIO * min(image.size)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def scaled_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """(width, height) after resizing the shorter side, rounded as in torchvision's Resize."""
    width, height = size
    long = int(shorter_side * max(size) / min(size))
    return (shorter_side, long) if width <= height else (long, shorter_side)


def _prepare_pillow() -> None:
    """Register our formats in PIL, and reset global settings of other libraries."""
    # Without this import, Image.open() would import all plugins of Pillow for some files.
    from PIL import AvifImagePlugin, Image, ImageFile, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    Image.preinit()  # the other formats
    Image.MAX_IMAGE_PIXELS = None  # check_size() limits the size instead, and reports it
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # catch_warnings() is not thread-safe. Adding the filter twice would repeat other warnings.
    if warnings.filters[:1] != [_IGNORE_PILLOW]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    log = logging.getLogger("PIL")  # its messages about damaged files lack the file names
    if log.level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)


@contextmanager
def _decoding() -> Iterator[None]:
    """Convert any exception to BadImage: decoders raise many types for damaged bytes."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        raise _as_bad_image(error) from error


def _as_bad_image(error: Exception) -> BadImage:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        accepted = f"accepted formats are {', '.join(FORMATS)}"
        return BadImage(f"not an image ({type(error).__name__}); {accepted}", NOT_AN_IMAGE)
    text, name = ascii(str(error))[1:-1][:120], type(error).__name__
    if not text or " at 0x" in text:  # the address of an object differs from run to run
        text = name
    elif not isinstance(error, (OSError, ValueError, SyntaxError)):  # Pillow raises these itself
        text = f"{name}: {text}"
    return BadImage(f"damaged: {text}", TRUNCATED if "truncated" in text.lower() else DECODE_ERROR)


def _is_signed(image: "Image.Image") -> bool:
    return _SIGNED in _tag(image, _SAMPLE_FORMAT, ())


def _scaled_grey(image: "Image.Image") -> "Image.Image":
    """Convert signed samples, or samples of more than 8 bits, to mode L by their type's maximum."""
    from PIL import Image

    signed, (bits, *_) = _is_signed(image), _tag(image, _BITS_PER_SAMPLE, (16,))
    samples = np.asarray(image)
    if bits == 8:  # Pillow reads signed bytes as unsigned ones
        samples = samples.view(np.int8)
    elif bits == 32 and not signed:  # Pillow keeps them in signed integers
        samples = samples.view(np.uint32)
    if signed and samples.min() < 0:
        raise BadImage(
            "negative samples; convert them to unsigned integers of 8 or 16 bits", SAMPLE_TYPE
        )
    levels = np.multiply(samples, 255 / (2 ** (bits - signed) - 1), dtype=np.float32)
    grey = np.rint(levels, out=levels).astype(np.uint8)
    if image.format == "TIFF" and _tag(image, _PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO:
        # Pillow inverts samples of up to 8 bits only. Its default for a missing tag is the same.
        grey = 255 - grey
    return Image.fromarray(grey)


def _tag(image: "Image.Image", tag: int, default: Any) -> Any:
    """The value of a TIFF tag; `default` if the tag is missing or the format is another one."""
    from PIL.TiffImagePlugin import TiffImageFile

    return image.tag_v2.get(tag, default) if isinstance(image, TiffImageFile) else default
