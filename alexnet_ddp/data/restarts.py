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
_HEAD = struct.Struct("<9sHHB")  # name, places of the frame header and of the bit stream, blocks between two markers
_NAME = b"restarts\0"
_LARGEST = 8  # blocks between two markers, where the row can be parted so
_NUMBERS = (0xD0 + np.arange(1 << 15) % 8).astype(np.uint8)  # the second bytes of markers, in order
_END = b"\xff\xd9"


class Cut(NamedTuple):
    """A JPEG of a part of an image."""

    data: bytearray
    left: int  # pixels of the image
    top: int
    width: int
    height: int


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
    sizes = np.diff(np.concatenate(([scan - 2], marks, [len(jpeg) - 2])))  # each with the marker before it
    length = 2 + _HEAD.size + 2 * len(sizes)
    if sizes.max() > 0xFFFF or length > 0xFFFF:
        return jpeg
    moved = 2 + length
    head = _HEAD.pack(_NAME, frame + moved, scan + moved, blocks)
    comment = b"\xff\xfe" + length.to_bytes(2, "big") + head + sizes.astype("<u2").tobytes()
    return jpeg[:_AT] + comment + jpeg[_AT:]


def cut(data: bytes, box: tuple[int, int, int, int]) -> Cut | None:
    """The part that `box` (left, top, width, height) needs; None where `data` has no table or all of it is needed.

    ValueError where the file is not as long as its table says.
    """
    if data[_AT + 4 : _AT + 13] != _NAME:
        return None
    _, frame, scan, blocks = _HEAD.unpack_from(data, _AT + 4)
    height, width = struct.unpack_from(">HH", data, frame + 5)
    count = (int.from_bytes(data[_AT + 2 : _AT + 4], "big") - 2 - _HEAD.size) // 2
    bounds = np.empty(count + 1, np.int64)
    bounds[0] = scan - 2
    np.cumsum(np.frombuffer(data, "<u2", count, _AT + 4 + _HEAD.size), out=bounds[1:])
    bounds[1:] += scan - 2
    if bounds[-1] != len(data) - 2 or data[-2:] != _END:
        raise ValueError("cut short")
    left, top, wide, high = box
    segment = blocks * _BLOCK  # pixels
    a, b = max(0, left - _MARGIN) // segment, min(-(-width // segment), -(-(left + wide + _MARGIN) // segment))
    c, d = max(0, top - _MARGIN) // _BLOCK, min(-(-height // _BLOCK), -(-(top + high + _MARGIN) // _BLOCK))
    per_row = -(-width // segment)
    if (b - a) * (d - c) == count:
        return None
    first = np.arange(c, d) * per_row + a
    begins = bounds[first] + 2
    out = _joined(data, scan, bounds, first, begins, b - a)
    size = min(width, b * segment) - a * segment, min(height, d * _BLOCK) - c * _BLOCK
    struct.pack_into(">HH", out, frame + 5, size[1], size[0])
    return Cut(out, a * segment, c * _BLOCK, *size)


def _joined(data: bytes, scan: int, bounds: np.ndarray, first: np.ndarray, begins: np.ndarray, n: int) -> bytearray:
    """The header, and of each row the `n` segments from `first` on, with markers numbered in order."""
    ends = bounds[first + n]
    pieces = [data[begin:end] for begin, end in zip(begins.tolist(), ends.tolist())]
    out = bytearray(b"".join((data[:scan], b"\xff\xd0".join(pieces), _END)))
    moved = np.empty(len(first), np.int64)  # how far each row goes
    moved[0] = scan
    np.cumsum((ends - begins + 2)[:-1], out=moved[1:])
    moved[1:] += scan
    moved -= begins
    marks = (bounds[first[:, None] + np.arange(n)] + (moved + 1)[:, None]).ravel()[1:]
    np.frombuffer(out, np.uint8)[marks] = _NUMBERS[: len(marks)]
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
