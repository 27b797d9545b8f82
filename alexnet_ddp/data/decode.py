"""Decodes an image into one slot of a uint8 batch.

Training uses simplejpeg (libjpeg-turbo) and cv2, which release the GIL, and Pillow for the formats
that they do not support (PNG, CMYK, ...). Evaluation uses Pillow, with the same pixels as
torchvision's classification preset.
"""

import math
import threading
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

from alexnet_ddp.config.data import Interpolation
from alexnet_ddp.data import restarts
from alexnet_ddp.data.image import (
    DECODE_ERROR,
    BadImage,
    check_size,
    crop_long_image,
    open_image,
    scaled_size,
    to_rgb,
)
from alexnet_ddp.data.views import CENTRE, EvalViews

if TYPE_CHECKING:
    from PIL import Image


class _Thread(threading.local):
    """What each thread has of its own. Every thread begins with an empty buffer."""

    def __init__(self) -> None:
        self.buffer = bytearray()


_thread = _Thread()
cv2.setNumThreads(1)  # the loader's threads decode in parallel already


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone. Raises BadImage."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except MemoryError:
        raise
    except Exception:  # Pillow supports more formats and reports why it cannot open a file
        return open_image(data).size
    return check_size(width, height)


def crop_into(
    slot: np.ndarray, data: bytes | bytearray, box: tuple[int, int, int, int], flip: bool
) -> None:
    """Decode `data`, crop `box` (left, top, width, height in pixels) and resize it into `slot`.

    slot: uint8 [size, size, 3]; flip: mirror horizontally. Raises BadImage.
    """
    part = restarts.cut(data, box)
    if part is not None:
        data, box = part.data, (box[0] - part.left, box[1] - part.top, *box[2:])
    image, scale = _decode_reduced(data, box, slot.shape[0])
    left, top, width, height = (round(value * scale) for value in box)
    crop = image[top : top + max(1, height), left : left + max(1, width)]
    if top + height > image.shape[0] + 1 or left + width > image.shape[1] + 1 or not crop.size:
        raise BadImage("damaged: it is smaller than in its index", DECODE_ERROR)
    resize_into(slot, crop, flip)


def resize_into(slot: np.ndarray, crop: np.ndarray, flip: bool) -> None:
    """Resize `crop`, uint8 [height, width, 3], into `slot`, uint8 [size, size, 3]."""
    size = slot.shape[0]
    # INTER_LINEAR skips pixels if an image shrinks by a factor of 2 or more.
    shrinks = min(crop.shape[:2]) >= 2 * size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cv2.resize(crop, (size, size), dst=slot, interpolation=interpolation)
    if flip:
        cv2.flip(slot, 1, dst=slot)


def centre_into(
    slot: np.ndarray, data: bytes, resize: int, interpolation: Interpolation | None = None
) -> None:
    """As centre_crop, of an encoded image. Raises BadImage."""
    views_into(slot[None], data, resize, interpolation)


def centre_crop(
    slot: np.ndarray,
    image: "Image.Image",
    resize: int,
    interpolation: Interpolation | None = None,
) -> None:
    """Resize the shorter side to `resize` (antialiased), and crop the centre into `slot`.

    The pixels equal those of torchvision's preset. Very long images are cropped before they are
    resized, see crop_long_image. interpolation: None is bilinear. Raises BadImage.
    """
    _crop_views(slot[None], image, resize, interpolation, CENTRE)


def views_into(
    slots: np.ndarray,
    data: bytes,
    resize: int,
    interpolation: Interpolation | None = None,
    views: EvalViews = CENTRE,
) -> None:
    """Write each view of an encoded image, resized once, into its slot of `slots`.

    slots: uint8 [views, size, size, 3]. See centre_crop. Raises BadImage.
    """
    _crop_views(slots, open_image(data), resize, interpolation, views)


def _crop_views(
    slots: np.ndarray,
    image: "Image.Image",
    resize: int,
    interpolation: Interpolation | None,
    views: EvalViews,
) -> None:
    from PIL import Image

    image, size = crop_long_image(to_rgb(image)), slots.shape[1]
    is_cubic = interpolation is Interpolation.bicubic
    how = Image.Resampling.BICUBIC if is_cubic else Image.Resampling.BILINEAR
    image = image.resize(scaled_size(image.size, resize), how)
    for slot, view in zip(slots, views, strict=True):
        left, top = view.corner(image.size, (size, size))
        crop = np.asarray(image.crop((left, top, left + size, top + size)))
        slot[...] = crop[:, ::-1] if view.flip else crop


def _decode_reduced(
    data: bytes | bytearray, box: tuple[int, int, int, int], size: int
) -> tuple[np.ndarray, float]:
    """Decode the rows down to the end of `box`, at reduced scale.

    The scale is the smallest one at which both sides of `box` have at least `size` pixels.
    Returns uint8 [h, w, 3], valid until this thread decodes again, and the scale: 1, or 4/8 to 1/8,
    which libjpeg decodes faster. Raises BadImage.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height)  # for packed images, only the size in the index is known so far
        if space not in ("YCbCr", "Gray", "RGB"):
            raise ValueError(f"colour space {space}")
        rows = _rows_to_decode(box[1] + box[3], height)
        position = _height_position(data) if rows < height else None
        if position is None:
            rows = height
        else:
            data = data[:position] + rows.to_bytes(2, "big") + data[position + 2 :]
        needed = size / min(box[2], box[3])
        least = {"min_width": math.ceil(width * needed), "min_height": math.ceil(rows * needed)}
        buffer = scratch(rows * width * 3)
        image = simplejpeg.decode_jpeg(
            data, "RGB", min_factor=2, strict=position is None, buffer=buffer, **least
        )
        shape = image.shape[:2]
        eighths = next(
            m for m in (8, 4, 3, 2, 1) if (-(-rows * m // 8), -(-width * m // 8)) == shape
        )
        return image, eighths / 8
    except (BadImage, MemoryError):
        raise
    except Exception:  # Pillow supports more formats and reports damage better
        return np.asarray(to_rgb(open_image(data))), 1.0


def scratch(size: int) -> bytearray:
    """This thread's buffer of at least `size` bytes; reusing it avoids page faults per image."""
    if len(_thread.buffer) < size:
        _thread.buffer = bytearray(size)
    return _thread.buffer


def _rows_to_decode(bottom: int, height: int) -> int:
    """Rows down to `bottom` in whole JPEG blocks, and one block more for chroma interpolation."""
    return int(min(height, -(-bottom // 16) * 16 + 16))


def _height_position(data: bytes | bytearray) -> int | None:
    """The position of the image height in a JPEG whose lower rows need not be decoded.

    Most of the decoding time is spent on the bit stream, so rows below a crop should be skipped: if
    the header declares fewer rows, the decoder stops there. This works for a single sequential scan
    of all colours. The end marker must exist: a file that is cut short must be detected, and with
    fewer rows it would not be. Returns None for any other file.
    """
    position, colours = None, 0
    if data[-2:] != b"\xff\xd9":
        return None
    for marker, at in restarts.segments(data):
        if marker in (0xC0, 0xC1):  # baseline or extended sequential, Huffman
            position, colours = at + 5, data[at + 9]
        elif marker == restarts.START_OF_SCAN:
            return position if data[at + 4] == colours else None
        elif not (marker == 0xC4 or 0xDB <= marker <= 0xFE):  # tables, comments, application data
            return None
    return None
