"""The built-in data set: ten classes of textures and shapes, drawn here and stored as JPEG files.

It allows training right after the installation, without a download, through the same index,
decoder, augmentation and evaluation as any other data set. Colour, polarity, position, scale,
rotation, blur, clutter and noise are random: a linear model on the pixels stays near chance, a
convolutional network learns the classes in about a minute on two cores.

An image depends on (VERSION, split, index) only. It is drawn with integers, so it is identical
on every CPU and with every version of NumPy, OpenCV or Pillow. libjpeg-turbo encodes it with its
exact integer DCT. tests/data/sources/test_demo.py contains checksums of pixels and files. If a
drawing changes, `VERSION` must change too.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from alexnet_ddp import rng
from alexnet_ddp.runtime.environment import num_usable_cores
from alexnet_ddp.runtime.errors import DataError

VERSION = 2
USABLE_VERSIONS = (1, 2)  # runs that started on version 1 (drawn by OpenCV) can still resume
COUNTS = {"train": 4000, "val": 1000}
MARKER = "demo.json"

Ints = NDArray[np.signedinteger]  # int32, or int64 for products

_PX = 16  # coordinates are in 1/16 px
_BITS = 8
_ONE = 1 << _BITS  # masks and colours are in 1/256; >> _BITS is faster than // _ONE
_TURN = 4096  # angles are in 1/4096 turn
_UNIT = 1 << 14  # sines are in 1/16384, rounded, so that they do not depend on the C library
_SINES = np.array(
    [round(_UNIT * math.sin(2 * math.pi * k / _TURN)) for k in range(_TURN)], np.int64
)


def ensure_demo(root: Path) -> None:
    """Create the demo data set at `root` if it does not exist yet.

    It consists of `root/{train,val}/CLASS/NNNNN.jpg` and a marker file. Everything is written to a
    temporary folder next to `root` and renamed once, so several processes may call this at once
    and a killed one leaves no partial data set.
    Raises DataError if `root` contains anything else; that is never overwritten.
    """
    root = Path(os.path.abspath(root))
    if _is_complete(root):
        return
    draft = root.with_name(f".{root.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write(draft)
        os.rename(draft, root)
    except OSError as error:
        if not _is_complete(root):
            raise DataError(
                f"data.root ({root}): the demo data set cannot be created: {error}; "
                "choose another data.root"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def demo_image(split: str, index: int) -> NDArray[np.uint8]:
    """Image `index` of `split` before compression: uint8 [H, W, 3], H and W from 64 to 80 px.

    Its class is `index % 10`.
    """
    draw = _Draws(rng.fold(VERSION, list(COUNTS).index(split), index))
    height, width = draw.integer(64, 80), draw.integer(64, 80)
    figure = _FIGURES[CLASSES[index % len(CLASSES)]](height, width, draw).astype(np.int32) * _ONE
    if draw.integer(0, 1):
        figure = _blurred(figure, draw.integer(1, 66))

    level = draw.integer(40 * _ONE, 215 * _ONE)
    ground = np.clip(level + draw.integers(3, -60 * _ONE, 60 * _ONE), 0, 255 * _ONE)
    away = -1 if ground.sum() > 3 * 127 * _ONE else 1  # darker on light ground, and vice versa
    step = away * draw.integer(90, 150) * draw.integers(3, 77, _ONE)
    coarse = draw.normals((4, 4, 3), draw.integer(3 * _ONE, 15 * _ONE))
    image = np.ascontiguousarray(
        ground + _enlarged(_enlarged(coarse, height).swapaxes(0, 1), width).swapaxes(0, 1)
    )
    _clutter(image, draw)
    image += figure[:, :, None] * step >> _BITS
    _clutter(image, draw)
    image += draw.normals(image.shape, draw.integer(2 * _ONE, 10 * _ONE))
    return np.clip(image >> _BITS, 0, 255).astype(np.uint8)


def demo_jpeg(split: str, index: int) -> bytes:
    """`demo_image(split, index)` as a JPEG file."""
    return simplejpeg.encode_jpeg(
        demo_image(split, index), quality=90, colorspace="RGB", colorsubsampling="420"
    )


class _Draws:
    """Random integers in a fixed order: the words hash32(key, 0), hash32(key, 1), ..."""

    def __init__(self, key: int) -> None:
        self._key, self._next = key, 0
        # One call for all words except the noise is faster than a call for every few words.
        self._first = self._hashed(0, 128)

    def _hashed(self, start: int, end: int) -> Ints:
        return rng.hash32(self._key, np.arange(start, end, dtype=np.int32))

    def _words(self, count: int) -> Ints:
        """`count` words of 32 bits, as int32."""
        start, self._next = self._next, self._next + count
        return (
            self._first[start : self._next]
            if self._next <= len(self._first)
            else self._hashed(start, self._next)
        )

    def integers(self, count: int, low: int, high: int) -> Ints:
        """`count` integers, uniform in [low, high]."""
        words = self._words(count).view(np.uint32).astype(np.int64)
        return (low + (words * (high - low + 1) >> 32)).astype(np.int32)

    def integer(self, low: int, high: int) -> int:
        return int(self.integers(1, low, high)[0])

    def normals(self, shape: tuple[int, ...], sigma: int) -> Ints:
        """Nearly normal: the sum of the four bytes of a word; its standard deviation is 147.8."""
        words = self._words(math.prod(shape))
        total = (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24 & 255)
        return ((total - 510) * sigma // 148).reshape(shape)


def _sin(angle: Ints | int) -> Ints:
    return _SINES[angle % _TURN]


def _cos(angle: Ints | int) -> Ints:
    return _SINES[(angle + _TURN // 4) % _TURN]


def _is_complete(root: Path) -> bool:
    """True if `root` is a finished demo data set, False if it is absent or empty.

    Raises DataError for anything else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.root ({root}) must be absent, empty or contain a finished demo data set "
            f"({MARKER}), and is never overwritten; choose another data.root"
        ) from error
    if found not in map(_marker, USABLE_VERSIONS):
        raise DataError(
            f"data.root ({root}) contains a demo data set with another {MARKER} than this program "
            f"writes (version {VERSION}); delete it or choose another data.root"
        )
    for split, count in COUNTS.items():
        if (present := sum(1 for _ in root.glob(f"{split}/*/*.jpg"))) != count:
            raise DataError(
                f"data.root ({root}) contains {present} of the {count} {split} images of the demo "
                "data set; delete it to have it created again"
            )
    return True


def _marker(version: int) -> dict[str, object]:
    return {
        "data_set": "alexnet_ddp demo",
        "version": version,
        "counts": dict(COUNTS),
        "classes": list(CLASSES),
    }


def _write(root: Path) -> None:
    """Write all images, and the marker last."""
    for split in COUNTS:
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)

    def write(job: tuple[str, int]) -> None:
        split, index = job
        file = root / split / CLASSES[index % len(CLASSES)] / f"{index:05d}.jpg"
        file.write_bytes(demo_jpeg(split, index))

    jobs = [(split, index) for split, count in COUNTS.items() for index in range(count)]
    with ThreadPoolExecutor(min(4, num_usable_cores())) as pool:
        for _ in pool.map(write, jobs):
            pass
    (root / MARKER).write_text(json.dumps(_marker(VERSION), indent=2) + "\n")


def _grid(height: int, width: int) -> tuple[Ints, Ints]:
    """Pixel centres: y [H, 1] and x [1, W], in 1/16 px."""
    return np.arange(height)[:, None] * _PX, np.arange(width)[None, :] * _PX


def _blurred(mask: Ints, side: int) -> Ints:
    """`mask` convolved with (side, 256 - 2 side, side) / 256 along both axes."""
    for _ in range(2):
        padded = np.pad(mask, ((1, 1), (0, 0)), mode="edge")
        mask = ((padded[:-2] + padded[2:]) * side + mask * (_ONE - 2 * side) + _ONE // 2) >> _BITS
        mask = mask.T
    return mask


def _enlarged(coarse: Ints, size: int) -> Ints:
    """Linear interpolation along the first axis to `size` rows."""
    last = len(coarse) - 1
    position = np.clip(
        (2 * np.arange(size, dtype=np.int32) + 1) * len(coarse) * _ONE // (2 * size) - _ONE // 2,
        0,
        last * _ONE,
    )
    low = np.minimum(position // _ONE, last - 1)
    weight = (position - low * _ONE).reshape(-1, *[1] * (coarse.ndim - 1))
    return (coarse[low] * (_ONE - weight) + coarse[low + 1] * weight) >> _BITS


def _clutter(image: Ints, draw: _Draws) -> None:
    """Draw a few thin strokes and specks, in place: edges that do not depend on the class."""
    height, width = image.shape[:2]
    for _ in range(draw.integer(0, 2)):
        y = np.arange(height)[:, None] - draw.integer(0, height - 1)
        x = np.arange(width)[None, :] - draw.integer(0, width - 1)
        dx, dy = (int(v) for v in draw.integers(2, -14, 14))
        colour, thickness = draw.integers(3, 0, 255 * _ONE), draw.integer(1, 2)
        length2 = max(dx * dx + dy * dy, 1)
        # The nearest point of the stroke, times length2.
        along = np.clip(x * dx + y * dy, 0, length2)
        distance2 = (x * length2 - along * dx) ** 2 + (y * length2 - along * dy) ** 2
        image[4 * distance2 <= (thickness * length2) ** 2] = colour


def _place(height: int, width: int, draw: _Draws) -> tuple[int, int, int, int]:
    """Centre (y, x), radius and angle of a shape that stays inside the image."""
    radius = draw.integer(18 * _PX, 30 * _PX)
    y, x = (draw.integer(radius, side * _PX - radius) for side in (height, width))
    return y, x, radius, draw.integer(-163, 163)


def _polygon(
    radii: list[float], turns: list[float]
) -> Callable[[int, int, _Draws], NDArray[np.bool_]]:
    """A function that draws a polygon given in polar coordinates.

    radii: relative to the radius of the shape; turns: angles in turns.
    """
    lengths, angles = (np.array([round(v * _TURN) for v in values]) for values in (radii, turns))

    def figure(height: int, width: int, draw: _Draws) -> NDArray[np.bool_]:
        cy, cx, radius, turn = _place(height, width, draw)
        scale = _UNIT * _TURN
        ys = cy + radius * lengths * _sin(angles + turn) // scale
        xs = cx + radius * lengths * _cos(angles + turn) // scale
        y, x = _grid(height, width)
        inside = np.zeros((height, width), bool)
        for y0, x0, y1, x1 in zip(ys, xs, np.roll(ys, -1), np.roll(xs, -1)):
            # The even-odd rule: count the edges that a ray to the right crosses.
            crosses = (y0 <= y) != (y1 <= y)
            left = (x - x0) * (y1 - y0) < (y - y0) * (x1 - x0)
            inside ^= crosses & (left == (y1 > y0))
        return inside

    return figure


def _in_disk(height: int, width: int, cy: int, cx: int, radius: int) -> NDArray[np.bool_]:
    y, x = _grid(height, width)
    return (y - cy) ** 2 + (x - cx) ** 2 <= radius**2


def _circle(height: int, width: int, draw: _Draws) -> NDArray[np.bool_]:
    cy, cx, radius, _ = _place(height, width, draw)
    return _in_disk(height, width, cy, cx, radius * 85 // 100)


def _crescent(height: int, width: int, draw: _Draws) -> NDArray[np.bool_]:
    cy, cx, radius, turn = _place(height, width, draw)
    away = radius * draw.integer(450, 600)
    by = cy + away * int(_sin(turn)) // (1000 * _UNIT)
    bx = cx + away * int(_cos(turn)) // (1000 * _UNIT)
    bite = _in_disk(height, width, by, bx, radius * 80 // 100)
    return _in_disk(height, width, cy, cx, radius) & ~bite


def _texture(
    paint: Callable[[Ints, Ints, int], NDArray[np.bool_]],
) -> Callable[[int, int, _Draws], NDArray[np.bool_]]:
    """A function that draws the texture `paint(u, v, shift)`.

    u, v: [H, W], distances from a point near the middle along two orthogonal axes, in 1/4096 of a
    period of 12 to 22 px; shift: in [0, 4096).
    """

    def figure(height: int, width: int, draw: _Draws) -> NDArray[np.bool_]:
        y, x = _grid(height, width)
        y, x = (
            axis - side * _PX * draw.integer(300, 700) // 1000
            for axis, side in ((y, height), (x, width))
        )
        turn, period = draw.integer(0, _TURN - 1), draw.integer(12 * _PX, 22 * _PX)
        c, s = int(_cos(turn)), int(_sin(turn))
        u, v = ((a * x + b * y) * _TURN // (_UNIT * period) for a, b in ((c, s), (-s, c)))
        return paint(u, v, draw.integer(0, _TURN - 1))

    return figure


def _rings(u: Ints, v: Ints, shift: int) -> NDArray[np.bool_]:
    radius = np.sqrt(u * u + v * v).astype(np.int64)  # IEEE 754 rounds a square root exactly
    return _sin(radius + shift) > 0


# A cross with arms 0.7 wide: two corners at the tip of each arm, one corner between two arms.
_ARM = 1.06
_NOTCH = 0.495
_TIP = 0.0536
_FIGURES: dict[str, Callable[[int, int, _Draws], NDArray[np.bool_]]] = {
    "checker": _texture(lambda u, v, shift: _sin(u) * _sin(v) > 0),
    "circle": _circle,
    "crescent": _crescent,
    "cross": _polygon(
        [_ARM, _ARM, _NOTCH] * 4, [q / 4 + a for q in range(4) for a in (-_TIP, _TIP, 0.125)]
    ),
    "dots": _texture(lambda u, v, shift: (_cos(u) + _cos(v)) * 10 > _UNIT * 7 + 24 * shift),
    "rings": _texture(_rings),
    "square": _polygon([1.0] * 4, [k / 4 for k in range(4)]),
    "star": _polygon([1.1, 0.45] * 5, [k / 10 for k in range(10)]),
    "stripes": _texture(lambda u, v, shift: _sin(u) * 10 > 24 * shift - _UNIT * 3),
    "triangle": _polygon([1.1] * 3, [k / 3 for k in range(3)]),
}
CLASSES = tuple(_FIGURES)
