"""JPEGs that can be cut before they are decoded: the pixels of a crop, from the bytes of the crop.

Most of a decoder's time goes into reading the bit stream, which has to be read from its beginning; but restart markers
(ITU-T T.81, B.2.4.4) part it into segments that stand alone. We write a marker after every few blocks of a row, and a
table of the segments' sizes as a comment. A crop is then a smaller JPEG: the segments that it touches, renumbered,
behind a header with its size. Any decoder reads the whole image as ever; the markers and the table cost 4 % of bytes.

The one rule: the pixels are those of the whole image, to the last bit.
"""

import struct
from typing import NamedTuple

import numpy as np

_BLOCK = 16  # pixels: a block (MCU) of a 4:2:0 JPEG, height = width
_MARGIN = 2  # pixels beside a crop that its chroma is interpolated from
_AT = 20  # where the comment stands: behind the start of the image and the JFIF header
_HEAD = struct.Struct(
    "<9sHHB"
)  # name, places of the frame header and of the bit stream, blocks between two markers
_NAME = b"restarts\0"
_LARGEST = 8  # blocks between two markers, where the row can be parted so
_NUMBERS = (0xD0 + np.arange(1 << 15) % 8).astype(np.uint8)  # the second bytes of markers, in order
_END = b"\xff\xd9"


class Cut(NamedTuple):
    """A JPEG of a part of an image."""

    data: bytearray
    left: int  # pixels of the image
    top: int


def interval(width: int) -> int:
    """Blocks between two markers, for an image so many pixels wide: few, and whole segments make a row."""
    row = -(-width // _BLOCK)
    return next((k for k in range(2, _LARGEST + 1) if row % k == 0), 1)


def with_table(jpeg: bytes, blocks: int) -> bytes:
    """A baseline 4:2:0 JFIF file that has a restart marker after every `blocks` blocks, with its table.

    Unchanged where a segment is too long for the table.
    """
    frame, scan = _places(jpeg)
    stream = np.frombuffer(jpeg, np.uint8)
    marks = np.flatnonzero(stream[scan:-2] == 0xFF) + scan
    marks = marks[(stream[marks + 1] & 0xF8) == 0xD0]
    sizes = np.diff(
        np.concatenate(([scan - 2], marks, [len(jpeg) - 2]))
    )  # each with the marker before it
    length = 2 + _HEAD.size + 2 * len(sizes)
    if sizes.max() > 0xFFFF or length > 0xFFFF:
        return jpeg
    moved = 2 + length
    head = _HEAD.pack(_NAME, frame + moved, scan + moved, blocks)
    comment = b"\xff\xfe" + length.to_bytes(2, "big") + head + sizes.astype("<u2").tobytes()
    return jpeg[:_AT] + comment + jpeg[_AT:]


def cut(data: bytes, box: tuple[int, int, int, int]) -> Cut | None:
    """The part that `box` (left, top, width, height) needs; None where all of it is needed or nothing can be cut.

    Nothing can where there is no table, or where it is not this file's: editors copy comments, and disks flip bits.
    """
    if not has_table(data):
        return None
    try:
        return _cut(data, box)
    except (
        ValueError,
        IndexError,
        ZeroDivisionError,
        struct.error,
    ):  # whoever decodes the whole says what is wrong
        return None


def has_table(data: bytes) -> bool:
    return data[_AT + 4 : _AT + 13] == _NAME


def _cut(data: bytes, box: tuple[int, int, int, int]) -> Cut | None:
    _, frame, scan, blocks = _HEAD.unpack_from(data, _AT + 4)
    height, width = struct.unpack_from(">HH", data, frame + 5)
    segment = blocks * _BLOCK  # pixels
    rows, per_row = -(-height // _BLOCK), -(-width // segment)
    sizes = np.frombuffer(data, "<u2", rows * per_row, _AT + 4 + _HEAD.size)
    bounds = np.empty(
        len(sizes) + 1, np.int64
    )  # where the markers are, one before the first and one at the end
    bounds[0], bounds[1:] = scan - 2, sizes
    np.cumsum(bounds, out=bounds)
    if bounds[-1] != len(data) - 2 or data[-2:] != _END:
        raise ValueError("another file's table")
    left, top, wide, high = box
    a, b = max(0, left - _MARGIN) // segment, min(per_row, -(-(left + wide + _MARGIN) // segment))
    c, d = max(0, top - _MARGIN) // _BLOCK, min(rows, -(-(top + high + _MARGIN) // _BLOCK))
    if (b - a) * (d - c) == rows * per_row:
        return None
    marks = bounds[:-1].reshape(rows, per_row)[c:d, a:b]
    out = _joined(data, scan, marks, bounds[1:].reshape(rows, per_row)[c:d, b - 1])
    size = min(width, b * segment) - a * segment, min(height, d * _BLOCK) - c * _BLOCK
    struct.pack_into(">HH", out, frame + 5, size[1], size[0])
    return Cut(out, a * segment, c * _BLOCK)


def _joined(data: bytes, scan: int, marks: np.ndarray, ends: np.ndarray) -> bytearray:
    """The header, and of each row the segments behind `marks`, int64 [rows, n], with markers numbered in order."""
    begins = marks[:, 0] + 2
    pieces = [data[begin:end] for begin, end in zip(begins.tolist(), ends.tolist())]
    out = bytearray(b"".join((data[:scan], b"\xff\xd0".join(pieces), _END)))
    moved = np.cumsum(ends - marks[:, 0])  # how far each row goes, and then how far the next one
    moved[1:] = moved[:-1]
    moved[0] = 0
    moved += scan + 1 - begins
    second = (marks + moved[:, None]).ravel()[1:]
    np.frombuffer(out, np.uint8)[second] = _NUMBERS[: len(second)]
    return out


def _places(jpeg: bytes) -> tuple[int, int]:
    """Where the frame header (SOF0) and the bit stream begin."""
    at, frame = 2, 0
    while jpeg[at + 1] != 0xDA:
        frame = at if jpeg[at + 1] == 0xC0 else frame
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    assert frame, "not baseline"
    assert jpeg[2:6] == b"\xff\xe0\x00\x10", "not Pillow's JFIF header"
    return frame, at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
