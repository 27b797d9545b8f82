"""The built-in data set: ten classes of textures and shapes, drawn on the spot, stored as real JPEG files.

It is what a run trains on before anybody has pointed it at ImageNet: the first command after the installation goes
through the same index, decoder, augmentation and exact evaluation as the thousandth, without a download. And it is
hard enough to mean something: colour, polarity, place, scale, rotation, blur, clutter and noise are random, so a linear
model on the pixels stays near chance, while a convolutional network learns it in about a minute on two cores.

The one rule: an image is a function of (version, split, index) alone, never of order, threads or earlier images. With
the same numpy and OpenCV the files are equal to the byte. Change a drawing, and `VERSION` must change with it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from alexnet_ddp.environment import num_usable_cores
from alexnet_ddp.errors import DataError

VERSION = 1
COUNTS = {"train": 4000, "val": 1000}
MARKER = "demo.json"

Canvas = NDArray[np.float32]  # H x W, 0 = background, 1 = figure

_SHIFT = 4  # OpenCV's fixed point: coordinates in 1/16 px, so that figures move by less than a pixel


def ensure_demo(root: Path) -> None:
    """Make the demo data set at `root`, unless it is there: `root/{train,val}/CLASS/NNNNN.jpg` and a marker file.

    Safe against other processes and against being killed: everything is written beside `root` and renamed once.
    Whoever loses the race drops its copy. Raises `DataError` if `root` holds anything else; it is never overwritten.
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
            rule = f"cannot be made a demo data set: {error}"
            raise DataError(f"data.root ({root}) {rule}; choose another data.root") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def demo_image(split: str, index: int) -> NDArray[np.uint8]:
    """Image `index` of `split` before compression: H x W x 3 uint8, sides of 64 to 80 px. Its class is `index % 10`."""
    rng = Generator(Philox(key=[VERSION, (list(COUNTS).index(split) << 32) + index]))
    height, width = (int(side) for side in rng.integers(64, 81, 2))
    mask = np.zeros((height, width), np.float32)
    figure = _DRAW[CLASSES[index % len(CLASSES)]](mask, rng)
    if rng.random() < 0.5:
        figure = cv2.GaussianBlur(figure, (0, 0), float(rng.uniform(0.3, 0.9)))

    ground = np.clip(rng.uniform(40, 215) + rng.uniform(-60, 60, 3), 0, 255)
    away = -1.0 if ground.mean() > 127 else 1.0  # towards the side with more room
    step = (away * rng.uniform(90, 150) * rng.uniform(0.3, 1.0, 3)).astype(np.float32)
    coarse = rng.normal(0, rng.uniform(3, 15), (4, 4, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + ground.astype(np.float32)
    _clutter(image, rng)
    image += figure[:, :, None] * step
    _clutter(image, rng)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(2, 10))
    return np.clip(image, 0, 255).astype(np.uint8)


def demo_jpeg(split: str, index: int) -> bytes:
    """The file of `demo_image(split, index)`."""
    ok, data = cv2.imencode(".jpg", demo_image(split, index), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert ok
    return data.tobytes()


def _is_complete(root: Path) -> bool:
    """True if `root` is our finished data set, False if it is free (absent or empty); `DataError` for anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MARKER).read_text())
    except (OSError, ValueError) as error:
        rule = f"must be absent, empty or hold a finished demo data set ({MARKER}), and is never overwritten"
        raise DataError(f"data.root ({root}) {rule}; choose another data.root") from error
    if found != _marker():
        rule = f"holds a demo data set with another {MARKER} than this program makes (version {VERSION})"
        raise DataError(f"data.root ({root}) {rule}; delete it or choose another data.root")
    for split, count in COUNTS.items():
        if (present := sum(1 for _ in root.glob(f"{split}/*/*.jpg"))) != count:
            rule = f"holds {present} of the {count} {split} images of the demo data set"
            raise DataError(f"data.root ({root}) {rule}; delete it to have it made anew")
    return True


def _marker() -> dict[str, object]:
    return {"data_set": "alexnet_ddp demo", "version": VERSION, "counts": dict(COUNTS), "classes": list(CLASSES)}


def _write(root: Path) -> None:
    """Write the whole data set and, last, its marker."""
    for split in COUNTS:
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)

    def write(job: tuple[str, int]) -> None:
        split, index = job
        (root / split / CLASSES[index % len(CLASSES)] / f"{index:05d}.jpg").write_bytes(demo_jpeg(split, index))

    with ThreadPoolExecutor(min(4, num_usable_cores())) as pool:
        for _ in pool.map(write, [(split, index) for split, count in COUNTS.items() for index in range(count)]):
            pass
    (root / MARKER).write_text(json.dumps(_marker(), indent=2) + "\n")


def _clutter(image: NDArray[np.float32], rng: Generator) -> None:
    """Draw a few thin strokes and specks, in place: edges that say nothing about the class."""
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(0, 3))):
        x, y = (int(v) for v in rng.uniform(0, (width, height)))
        dx, dy = (int(v) for v in rng.integers(-14, 15, 2))
        colour = [float(v) for v in rng.uniform(0, 255, 3)]
        cv2.line(image, (x, y), (x + dx, y + dy), colour, int(rng.integers(1, 3)))


def _place(mask: Canvas, rng: Generator) -> tuple[NDArray[np.float64], float, float]:
    """Centre (x, y), radius in px and angle of a shape that stays inside the image."""
    radius = rng.uniform(18, 30)
    return rng.uniform(radius, np.array(mask.shape[::-1]) - radius), radius, rng.uniform(-0.25, 0.25)


def _polygon(radii: list[float], turns: list[float]) -> Callable[[Canvas, Generator], Canvas]:
    """The drawer of a polygon given in polar coordinates: radii relative to the shape's, angles in turns."""

    def draw(mask: Canvas, rng: Generator) -> Canvas:
        centre, radius, turn = _place(mask, rng)
        phase = 2 * np.pi * np.array(turns) + turn
        points = centre + radius * np.array(radii)[:, None] * np.stack([np.cos(phase), np.sin(phase)], 1)
        cv2.fillPoly(mask, [np.round(points * (1 << _SHIFT)).astype(np.int32)], 1.0, cv2.LINE_8, _SHIFT)
        return mask

    return draw


def _disk(mask: Canvas, centre: NDArray[np.float64], radius: float, value: float) -> Canvas:
    x, y, r = (round(v * (1 << _SHIFT)) for v in (*centre, radius))
    cv2.circle(mask, (x, y), r, value, -1, cv2.LINE_8, _SHIFT)
    return mask


def _circle(mask: Canvas, rng: Generator) -> Canvas:
    centre, radius, _ = _place(mask, rng)
    return _disk(mask, centre, radius * 0.85, 1.0)


def _crescent(mask: Canvas, rng: Generator) -> Canvas:
    centre, radius, turn = _place(mask, rng)
    bite = centre + radius * rng.uniform(0.45, 0.6) * np.array([np.cos(turn), np.sin(turn)])
    return _disk(_disk(mask, centre, radius, 1.0), bite, radius * 0.8, 0.0)


def _texture(paint: Callable[..., NDArray[np.bool_]]) -> Callable[[Canvas, Generator], Canvas]:
    """The drawer of a texture, given where it is painted: `paint(u, v, shift)`, with u and v (H x W) the distances from
    a point near the middle along two orthogonal axes, in radians of a period of 12 to 22 px, and a shift in (0, 1)."""

    def draw(mask: Canvas, rng: Generator) -> Canvas:
        cy, cx = rng.uniform(0.3, 0.7, 2) * mask.shape
        y, x = np.ogrid[-cy : mask.shape[0] - cy - 0.5, -cx : mask.shape[1] - cx - 0.5]
        turn, scale = rng.uniform(0, 2 * np.pi), 2 * np.pi / rng.uniform(12, 22)
        c, s = scale * np.cos(turn), scale * np.sin(turn)
        return paint(c * x + s * y, c * y - s * x, rng.uniform()).astype(np.float32)

    return draw


_ARM, _NOTCH, _TIP = 1.06, 0.495, 0.0536  # a cross with arms 0.7 wide: two corners at the tip, one between the arms
_DRAW: dict[str, Callable[[Canvas, Generator], Canvas]] = {
    "checker": _texture(lambda u, v, shift: np.sin(u) * np.sin(v) > 0),
    "circle": _circle,
    "crescent": _crescent,
    "cross": _polygon([_ARM, _ARM, _NOTCH] * 4, [q / 4 + a for q in range(4) for a in (-_TIP, _TIP, 0.125)]),
    "dots": _texture(lambda u, v, shift: np.cos(u) + np.cos(v) > 0.7 + 0.6 * shift),
    "rings": _texture(lambda u, v, shift: np.sin(np.hypot(u, v) + 2 * np.pi * shift) > 0),
    "square": _polygon([1.0] * 4, [k / 4 for k in range(4)]),
    "star": _polygon([1.1, 0.45] * 5, [k / 10 for k in range(10)]),
    "stripes": _texture(lambda u, v, shift: np.sin(u) > 0.6 * shift - 0.3),
    "triangle": _polygon([1.1] * 3, [k / 3 for k in range(3)]),
}
CLASSES = tuple(_DRAW)
