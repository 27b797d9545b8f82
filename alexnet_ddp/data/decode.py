"""Bytes of an image -> one slot of a uint8 batch.

Training: simplejpeg (libjpeg-turbo) and cv2, which release the GIL; Pillow for what they refuse (PNG, CMYK, ...).
Evaluation: Pillow, exactly as torchvision's classification preset does it.
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
    open_image,
    scaled_size,
    to_rgb,
    without_far_ends,
)

if TYPE_CHECKING:
    from PIL import Image

_thread = threading.local()
cv2.setNumThreads(1)  # the loader's threads are the parallelism


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone. Raises BadImage."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except MemoryError:
        raise
    except Exception:  # Pillow opens more formats, and finds the reason if it is none of them
        return open_image(data).size
    return check_size(width, height)


def crop_into(slot: np.ndarray, data: bytes, box: tuple[int, int, int, int], flip: bool) -> None:
    """Decode, cut out `box` (left, top, width, height), resize it to `slot` (uint8 [size, size, 3]), perhaps flip."""
    part = restarts.cut(data, box)
    if part is not None:
        data, box = part.data, (box[0] - part.left, box[1] - part.top, *box[2:])
    image, scale = _decode_reduced(data, box, slot.shape[0])
    left, top, width, height = (round(value * scale) for value in box)
    crop = image[top : top + max(1, height), left : left + max(1, width)]
    if top + height > image.shape[0] + 1 or left + width > image.shape[1] + 1 or not crop.size:
        raise BadImage("damaged: it is smaller than its index says", DECODE_ERROR)
    resize_into(slot, crop, flip)


def resize_into(slot: np.ndarray, crop: np.ndarray, flip: bool) -> None:
    """Resize `crop`, uint8 [height, width, 3], to `slot`, perhaps flip."""
    size = slot.shape[0]
    shrinks = (
        min(crop.shape[:2]) >= 2 * size
    )  # INTER_LINEAR would skip pixels; between 1 and 2 it does not
    cv2.resize(
        crop, (size, size), dst=slot, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    if flip:
        cv2.flip(slot, 1, dst=slot)


def centre_into(
    slot: np.ndarray, data: bytes, resize: int, interpolation: Interpolation | None = None
) -> None:
    """As centre_crop, of an encoded image. Raises BadImage."""
    centre_crop(slot, open_image(data), resize, interpolation)


def centre_crop(
    slot: np.ndarray,
    image: "Image.Image",
    resize: int,
    interpolation: Interpolation | None = None,
) -> None:
    """Shorter side to `resize` (antialiased), centre crop to `slot`: torchvision's preset.

    A very long image loses its ends first, see without_far_ends. interpolation: None is bilinear.
    """
    from PIL import Image

    image, size = without_far_ends(to_rgb(image)), slot.shape[0]
    width, height = scaled_size(image.size, resize)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    is_cubic = interpolation is Interpolation.bicubic
    how = Image.Resampling.BICUBIC if is_cubic else Image.Resampling.BILINEAR
    image = image.resize((width, height), how)
    slot[...] = np.asarray(image.crop((left, top, left + size, top + size)))


def _decode_reduced(
    data: bytes, box: tuple[int, int, int, int], size: int
) -> tuple[np.ndarray, float]:
    """The rows down to the end of `box`, uint8 [h, w, 3], at the smallest scale that leaves `box` `size` pixels.

    The scale is 1, or 4/8 to 1/8, which libjpeg decodes faster. The array is valid until this thread decodes again.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height)  # of packed images, only the index has been asked so far
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
    except Exception:  # Pillow reads more kinds, and says better what is wrong with the rest
        return np.asarray(to_rgb(open_image(data))), 1.0


def scratch(size: int) -> bytearray:
    """This thread's buffer of at least `size` bytes: a fresh one for each image would be page-faulted in anew."""
    buffer = getattr(_thread, "buffer", b"")
    if len(buffer) < size:
        buffer = _thread.buffer = bytearray(size)
    return buffer


def _rows_to_decode(bottom: int, height: int) -> int:
    """Whole blocks of the JPEG, and one more: chroma is interpolated across their edges."""
    return int(min(height, -(-bottom // 16) * 16 + 16))


def _height_position(data: bytes) -> int | None:
    """Where the height stands in the header of a JPEG that can be decoded from the top down to any row.

    Decoding is mostly reading the bit stream, so the rows below a crop are worth leaving out: an image that claims
    fewer rows is decoded so far and no further. That holds for one sequential scan of all colours, complete to its
    end marker (a file cut short must be noticed, and with fewer rows it would not be). None for any other.
    """
    at, position, colours = 2, None, 0
    if data[-2:] != b"\xff\xd9":
        return None
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1):  # baseline or extended sequential, Huffman
            position, colours = at + 5, data[at + 9]
        elif marker == 0xDA:  # the scan
            return position if data[at + 4] == colours else None
        elif not (marker == 0xC4 or 0xDB <= marker <= 0xFE):  # tables, comments, application data
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
