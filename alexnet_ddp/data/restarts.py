"""Cuts a crop out of a JPEG before decoding, so that only the bytes of the crop are decoded.

A decoder spends most of its time on the bit stream and has to read it from the beginning. Restart
markers (ITU-T T.81, B.2.4.4) divide it into segments that can be decoded independently. We write a
marker after every few blocks of a row, and a comment with a table of the sizes of the segments. A
crop is then a smaller JPEG: a header with its size, and the segments that it touches, with
renumbered markers. The whole file remains a valid JPEG for any decoder; markers and table add 4 %
to its size.

The pixels of a crop equal those of the whole image exactly.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BLOCK = 16  # pixels: a block (MCU) of a 4:2:0 JPEG, height = width
_MARGIN = 2  # pixels around a crop that are needed to interpolate its chroma
_AT = 20  # the position of the comment: after the start of the image and the JFIF header
# Name, positions of the frame header and of the bit stream, blocks between two markers.
_HEAD = struct.Struct("<9sHHB")
_NAME = b"restarts\0"
_LARGEST = 8  # the largest number of blocks between two markers
_NUMBERS = (0xD0 + np.arange(1 << 15) % 8).astype(np.uint8)  # the second bytes of markers, in order
_END = b"\xff\xd9"
START_OF_SCAN = 0xDA


class Cut(NamedTuple):
    """A JPEG of a part of an image."""

    data: bytearray
    left: int  # its position in the image, in pixels
    top: int


def segments(jpeg: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Yield (marker, position) of the header segments up to the start of the scan.

    Stops early if the bytes are damaged; the marker of the last segment is then another one.
    """
    at = 2
    while at + 9 < len(jpeg) and jpeg[at] == 0xFF:
        yield jpeg[at + 1], at
        if jpeg[at + 1] == START_OF_SCAN:
            return
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def interval(width: int) -> int:
    """Blocks between two markers for an image of `width` pixels: few, and a divisor of the row."""
    row = -(-width // _BLOCK)
    return next((k for k in range(2, _LARGEST + 1) if row % k == 0), 1)


def with_table(jpeg: bytes, blocks: int) -> bytes:
    """Insert the table into a baseline 4:2:0 JFIF file with a restart marker every `blocks` blocks.

    Returns `jpeg` unchanged if a segment is too long for the table.
    """
    frame, scan = _places(jpeg)
    stream = np.frombuffer(jpeg, np.uint8)
    marks = np.flatnonzero(stream[scan:-2] == 0xFF) + scan
    marks = marks[(stream[marks + 1] & 0xF8) == 0xD0]
    # Each size includes the marker before the segment.
    sizes = np.diff(np.concatenate(([scan - 2], marks, [len(jpeg) - 2])))
    length = 2 + _HEAD.size + 2 * len(sizes)
    if sizes.max() > 0xFFFF or length > 0xFFFF:
        return jpeg
    moved = 2 + length
    head = _HEAD.pack(_NAME, frame + moved, scan + moved, blocks)
    comment = b"\xff\xfe" + length.to_bytes(2, "big") + head + sizes.astype("<u2").tobytes()
    return jpeg[:_AT] + comment + jpeg[_AT:]


def cut(data: bytes | bytearray, box: tuple[int, int, int, int]) -> Cut | None:
    """The part of the file that `box` (left, top, width, height in pixels) needs.

    Returns None if the whole file is needed, or if it has no valid table: an editor may have copied
    the comment into another file, or the file may be damaged.
    """
    if not has_table(data):
        return None
    try:
        return _cut(data, box)
    except (ValueError, IndexError, ZeroDivisionError, struct.error):
        return None  # decoding the whole file reports what is wrong


def has_table(data: bytes | bytearray) -> bool:
    """Whether `data` contains the comment with the table."""
    return data[_AT + 4 : _AT + 13] == _NAME


def _cut(data: bytes | bytearray, box: tuple[int, int, int, int]) -> Cut | None:
    _, frame, scan, blocks = _HEAD.unpack_from(data, _AT + 4)
    height, width = struct.unpack_from(">HH", data, frame + 5)
    segment = blocks * _BLOCK  # pixels
    rows, per_row = -(-height // _BLOCK), -(-width // segment)
    sizes = np.frombuffer(data, "<u2", rows * per_row, _AT + 4 + _HEAD.size)
    # Positions of the markers, including one before the first segment and one after the last.
    bounds = np.empty(len(sizes) + 1, np.int64)
    bounds[0], bounds[1:] = scan - 2, sizes
    np.cumsum(bounds, out=bounds)
    if bounds[-1] != len(data) - 2 or data[-2:] != _END:
        raise ValueError("the table belongs to another file")
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


def _joined(data: bytes | bytearray, scan: int, marks: np.ndarray, ends: np.ndarray) -> bytearray:
    """The header, and for each row the segments after `marks`, with renumbered markers.

    marks: int64 [rows, n], positions of the markers; ends: int64 [rows], ends of the last segments.
    """
    begins = marks[:, 0] + 2
    pieces = [data[begin:end] for begin, end in zip(begins.tolist(), ends.tolist())]
    out = bytearray(b"".join((data[:scan], b"\xff\xd0".join(pieces), _END)))
    moved = np.cumsum(ends - marks[:, 0])  # the offset of the next row in `out`
    moved[1:] = moved[:-1]
    moved[0] = 0
    moved += scan + 1 - begins
    second = (marks + moved[:, None]).ravel()[1:]
    np.frombuffer(out, np.uint8)[second] = _NUMBERS[: len(second)]
    return out


def _places(jpeg: bytes) -> tuple[int, int]:
    """Positions of the frame header (SOF0) and of the bit stream."""
    places = dict(segments(jpeg))
    assert 0xC0 in places, "not baseline"
    assert START_OF_SCAN in places, "no scan"
    assert jpeg[2:6] == b"\xff\xe0\x00\x10", "not Pillow's JFIF header"
    scan = places[START_OF_SCAN]
    return places[0xC0], scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")
