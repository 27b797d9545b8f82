"""Bytes to pixels: torchvision's own in evaluation, close to them in training, and a reason where there are none."""

import io
import resource
import struct
import tracemalloc
import zlib
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from alexnet_ddp.data.decode import BadImage, centre_into, crop_into, size_of

ORIGINALS = sorted((Path(__file__).parents[3] / "shared/data/imagenet-originals").rglob("*.JPEG"))
KINDS = {
    "grey JPEG": ("L", "JPEG"),
    "CMYK JPEG": ("CMYK", "JPEG"),
    "RGBA PNG": ("RGBA", "PNG"),
    "palette PNG": ("P", "PNG"),
    "grey PNG": ("L", "PNG"),
    "grey and alpha PNG": ("LA", "PNG"),
    "bilevel PNG": ("1", "PNG"),
    "BMP": ("RGB", "BMP"),
    "WebP": ("RGB", "WEBP"),
    "TIFF": ("RGB", "TIFF"),
}


def picture(width: int, height: int) -> np.ndarray:
    """Slow waves and hard edges in three different colours, nowhere symmetric: uint8 [height, width, 3]."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(9 * x + 3 * y), np.cos(7 * y - 2 * x), np.sin(5 * x * y + 1)]
    image = np.stack(waves, axis=2) * 90 + 128
    image[(x > 0.3) & (x < 0.55) & (y > 0.2) & (y < 0.45)] = (250, 20, 60)
    image[(x - 0.75) ** 2 + (y - 0.7) ** 2 < 0.02] = (10, 240, 200)
    return image.clip(0, 255).astype(np.uint8)


def encoded(width: int, height: int, mode: str = "RGB", kind: str = "JPEG", **how) -> bytes:
    image = Image.fromarray(picture(width, height))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize((width, height)))
    file = io.BytesIO()
    image.convert(mode).save(file, kind, **how)
    return file.getvalue()


def whole(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def empty(size: int) -> np.ndarray:
    return np.full((size, size, 3), 77, dtype=np.uint8)


def centre(data: bytes, size: int, resize: int) -> np.ndarray:
    slot = empty(size)
    centre_into(slot, data, resize)
    return slot


def crop(data: bytes, box: tuple[int, int, int, int], size: int, flip: bool = False) -> np.ndarray:
    slot = empty(size)
    crop_into(slot, data, box, flip)
    return slot


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a.astype(np.float64) - b).mean())


# Evaluation


def torchvision_centre(data: bytes, size: int, resize: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = functional.resize(
        image, resize, interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    return functional.pil_to_tensor(functional.center_crop(image, size)).permute(1, 2, 0).numpy()


SHAPES = [
    (500, 375),
    (375, 500),
    (400, 400),
    (401, 267),
    (64, 64),
    (9, 7),
    (1, 3),
    (2, 1),
    (40, 300),
    (255, 256),
]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_evaluation_shows_torchvisions_pixels(width, height):
    data = encoded(width, height)
    for size, resize in ((224, 256), (64, 73), (63, 73), (63, 64), (64, 64)):
        assert np.array_equal(centre(data, size, resize), torchvision_centre(data, size, resize))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_shows_torchvisions_pixels_of_other_kinds_of_files(kind):
    data = encoded(301, 200, *KINDS[kind])
    assert np.array_equal(centre(data, 64, 73), torchvision_centre(data, 64, 73))


def test_evaluation_shows_what_torchvisions_preset_shows():
    preset = ImageClassification(crop_size=224, resize_size=256, mean=(0, 0, 0), std=(1, 1, 1))
    data = encoded(500, 375)
    theirs = preset(Image.open(io.BytesIO(data))).mul(255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(centre(data, 224, 256), theirs)


@pytest.mark.skipif(not ORIGINALS, reason="shared/data/imagenet-originals is not here")
def test_evaluation_shows_torchvisions_pixels_of_imagenets_own_files():
    for path in ORIGINALS[:6]:
        data = path.read_bytes()
        assert np.array_equal(centre(data, 224, 256), torchvision_centre(data, 224, 256)), path.name


# Training


@pytest.mark.parametrize(("width", "height"), [(90, 70), (70, 90), (33, 64), (64, 64)])
def test_a_crop_of_the_whole_image_is_its_full_decode_resized(width, height):
    data = encoded(width, height)
    full = simplejpeg.decode_jpeg(data, "RGB")
    expected = cv2.resize(full, (64, 64), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(crop(data, (0, 0, width, height), 64), expected)
    assert difference(full, whole(data)) < 1  # simplejpeg sees what Pillow sees


def test_a_crop_of_the_slots_size_is_cut_out_and_not_resized():
    data = encoded(90, 70)
    full = simplejpeg.decode_jpeg(data, "RGB")
    assert np.array_equal(crop(data, (13, 5, 48, 48), 48), full[5:53, 13:61])


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_of_other_kinds_of_files_is_their_pillow_decode_resized(kind):
    data = encoded(100, 81, *KINDS[kind])
    assert size_of(data) == (100, 81)
    expected = cv2.resize(whole(data)[11:81, 20:80], (48, 48), interpolation=cv2.INTER_LINEAR)
    assert difference(crop(data, (20, 11, 60, 70), 48), expected) < 0.5
    if kind != "grey JPEG":  # which is decoded at a reduced scale
        small = cv2.resize(whole(data)[11:81, 20:80], (16, 16), interpolation=cv2.INTER_AREA)
        assert difference(crop(data, (20, 11, 60, 70), 16), small) < 0.5


BOXES = [
    (0, 0, 640, 480),
    (37, 21, 401, 333),
    (250, 100, 390, 380),
    (111, 222, 258, 257),
    (300, 31, 150, 190),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("progressive", [False, True])
def test_decoding_at_a_reduced_scale_is_close_to_averaging_the_full_decode(box, progressive):
    data = encoded(640, 480, quality=95, progressive=progressive)
    left, top, width, height = box
    full = whole(data)[top : top + height, left : left + width]
    for size, limit in ((32, 5), (64, 2.5), (100, 1.2)):
        here = crop(data, box, size)
        expected = cv2.resize(full, (size, size), interpolation=cv2.INTER_AREA)
        assert difference(here, expected) < limit
        for moved in (
            difference(here[:, 1:], expected[:, :-1]),
            difference(here[1:], expected[:-1]),
        ):
            assert difference(here, expected) < moved


@pytest.mark.skipif(not ORIGINALS, reason="shared/data/imagenet-originals is not here")
def test_a_reduced_scale_is_close_to_the_full_decode_on_imagenets_own_files():
    for path in ORIGINALS[:6]:
        data = path.read_bytes()
        width, height = size_of(data)
        assert (width, height) == Image.open(path).size
        full = cv2.resize(whole(data), (100, 100), interpolation=cv2.INTER_AREA)
        assert difference(crop(data, (0, 0, width, height), 100), full) < 8, path.name


@pytest.mark.parametrize("size", [16, 48])
def test_a_flip_mirrors_left_and_right(size):
    for data in (encoded(100, 81), encoded(100, 81, "RGBA", "PNG")):
        plain, flipped = (crop(data, (20, 11, 60, 70), size, flip) for flip in (False, True))
        assert np.array_equal(flipped, plain[:, ::-1])
        assert not np.array_equal(flipped, plain)


def test_only_the_slot_is_written():
    batch = np.full((3, 32, 32, 3), 77, dtype=np.uint8)
    crop_into(batch[1], encoded(100, 81), (20, 11, 60, 70), True)
    assert (batch[[0, 2]] == 77).all()
    centre_into(batch[2], encoded(100, 81), 36)
    assert (batch[0] == 77).all()
    assert np.array_equal(batch[1], crop(encoded(100, 81), (20, 11, 60, 70), 32, True))
    assert np.array_equal(batch[2], centre(encoded(100, 81), 32, 36))


@pytest.mark.parametrize(
    ("width", "height"), [(3, 100), (100, 3), (1, 1), (17, 13), (9, 31), (33, 7), (2, 5)]
)
def test_a_crop_at_the_edge_of_an_odd_sized_image_is_never_empty(width, height):
    data = simplejpeg.encode_jpeg(np.full((height, width, 3), 200, dtype=np.uint8))
    lengths = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 99, 100}
    for w, h in product(sorted({*lengths, width}), sorted({*lengths, height})):
        if w > width or h > height:
            continue
        for left, top, size in product(
            {0, (width - w) // 2, width - w}, {0, height - h}, (1, 2, 3, 8)
        ):
            slot = crop(data, (left, top, w, h), size)
            assert abs(slot.astype(int) - 200).max() < 4, (left, top, w, h, size)


def test_a_corner_of_a_reduced_image_is_that_corner():
    pixels = np.zeros((401, 403, 3), dtype=np.uint8)
    pixels[:200, 201:], pixels[200:, :201], pixels[200:, 201:] = 80, 160, 240
    data = simplejpeg.encode_jpeg(pixels, quality=98)
    for (left, top), grey in {(0, 0): 0, (203, 0): 80, (0, 201): 160, (203, 201): 240}.items():
        for size in (16, 24, 50, 99):
            assert abs(np.median(crop(data, (left, top, 200, 200), size)) - grey) < 4


# Files that are no images


def damaged_header(kind: str, side: int) -> bytes:
    """A small image whose header says that it is side x side."""
    data = encoded(48, 40, kind=kind)
    if kind == "PNG":
        header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :]


@contextmanager
def at_most_50_mb_more():
    """Of Python's and numpy's memory by tracemalloc, of all that is touched by the process's peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < 50_000_000
    finally:
        tracemalloc.stop()


def ways() -> dict:
    """Each way into decode.py that the loader takes."""
    return {
        "size": size_of,
        "training": lambda data: crop(data, (0, 0, *size_of(data)), 16),
        "evaluation": lambda data: centre(data, 16, 18),
    }


@pytest.mark.parametrize("way", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, world\n" * 50, "not an image (UnidentifiedImageError)"),
        (b"\x00", "not an image (UnidentifiedImageError)"),
        (b"\xff\xd8\xff", "not an image (UnidentifiedImageError)"),
        (encoded(48, 40)[:-300], "damaged: image file is truncated"),
        (encoded(48, 40, kind="PNG")[:-300], "damaged: image file is truncated"),
        (encoded(48, 40, kind="BMP")[:-300], "damaged: image file is truncated"),
        (encoded(48, 40)[:20], "not an image ("),
    ],
)
def test_what_is_no_image_is_a_bad_image_with_its_reason(way, data, reason):
    with pytest.raises(BadImage) as error:
        ways()[way](data)
    assert str(error.value).startswith(reason)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [30_000, 11_000])
def test_a_header_that_claims_a_giant_image_is_refused_before_memory_is_taken(way, kind, side):
    data = damaged_header(kind, side)
    ways()[way](encoded(48, 40, kind=kind))  # what is loaded at first use
    with at_most_50_mb_more(), pytest.raises(BadImage) as error:
        ways()[way](data)
    assert (
        str(error.value)
        == f"{side} x {side} pixels; the limit is 20000 a side and 100000000 in all"
    )


def test_a_long_thin_image_beyond_the_limit_of_a_side_is_refused():
    data = damaged_header("JPEG", 30_000)
    frame = data.index(b"\xff\xc0")
    data = data[: frame + 5] + struct.pack(">HH", 30_000, 2) + data[frame + 9 :]
    for way in ways().values():
        with pytest.raises(BadImage, match="2 x 30000 pixels; the limit is 20000 a side"):
            way(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
def test_a_damaged_file_is_shown_somehow_or_a_bad_image_but_never_another_error(kind):
    data = encoded(40, 30, "P" if kind == "GIF" else "RGB", kind)
    draw = np.random.default_rng(7)
    for k in range(150):
        broken = bytearray(data)
        for spot in draw.integers(0, min(len(data), 200) if k % 2 else len(data), 1 + k % 4):
            broken[spot] = draw.integers(0, 256)
        for way in ways().values():
            with suppress(BadImage):
                assert np.shape(way(bytes(broken))) in ((2,), (16, 16, 3))
