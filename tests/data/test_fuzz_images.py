"""Damaged files of every format that Pillow writes: each is an array of the right shape or a bad image, nothing else.

The mutations follow from a seed, so a failure names what makes it again. Run all of them, with a count for each format:
python -m pytest -m slow -rP tests/data/test_fuzz_images.py
"""

import io
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.config.prepare import Encoding
from alexnet_ddp.data.decode import BadImage, centre_into, crop_into, size_of
from alexnet_ddp.data.image import FORMATS
from alexnet_ddp.prepare.encode import Recipe, Refused, encode
from tests.data.test_image import DEEP, FLOATS, OTHERS

SEED, MUTATIONS, SOME = 0, 2000, 60  # of each format, in the slow test and in the other one
SIDE = 16
RAW = Recipe(None, None, None, Encoding.raw, SIDE, None)
PACKED = Recipe(20, 90, True, Encoding.jpeg, None, None)
CODES = {"empty", "not_an_image", "truncated", "decode_error", "bomb", "sample_type"}

DRAW = np.random.default_rng(SEED)
PHOTO = Image.fromarray(DRAW.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
    (24, 20), Image.Resampling.BICUBIC
)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # formats that Pillow will remove
        image.copy().save(out, kind, **options)
    return out.getvalue()


def more() -> dict[str, object]:
    """What makes a file of several frames. New images each time: saving leaves its settings in an image."""
    return {"save_all": True, "append_images": [PHOTO.rotate(90), PHOTO.rotate(180)]}


def accepted() -> dict[str, list[bytes]]:
    """Format -> small files of it, one for each of the decoder's ways."""
    grey, alpha, palette, bits = (
        PHOTO.convert("L"),
        PHOTO.convert("RGBA"),
        PHOTO.quantize(16),
        PHOTO.convert("1"),
    )
    alpha.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    deep = {
        kind: [data for name, data in DEEP.items() if name.startswith(kind)]
        for kind in ("PNG", "TIFF", "P")
    }
    return {
        "JPEG": [
            saved(PHOTO, "JPEG", exif=exif, comment=b"a comment"),
            saved(PHOTO, "JPEG", progressive=True, quality=60),
            saved(PHOTO, "JPEG", subsampling="4:4:4", restart_marker_blocks=1),
            saved(grey, "JPEG"),
            saved(PHOTO.convert("CMYK"), "JPEG"),
            encode(saved(PHOTO, "PNG"), PACKED).data,  # as in a shard, with its table of segments
            saved(PHOTO, "MPO", **more()),
        ],
        "PNG": [
            *(saved(image, "PNG", exif=exif) for image in (PHOTO, grey, alpha, bits)),
            saved(palette, "PNG", transparency=bytes(range(16))),
            saved(PHOTO, "PNG", **more()),
            *deep["PNG"],
        ],
        "PPM": [
            *(saved(image, "PPM") for image in (PHOTO, grey, bits)),
            b"P3\n# a comment\n3 2\n100\n" + b"1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 100\n",
            b"P1\n9 2\n0 1 1 0 1 0 1 1 1 0 1 0 1 1 0 1 0 1\n",
            b"P6\n24 20\n99\n" + bytes(k % 100 for k in range(1440)),
            FLOATS["PFM"],
            *(data for data in deep["P"] if data[:1] == b"P"),
        ],
        "BMP": [saved(image, "BMP") for image in (PHOTO, grey, alpha, palette, bits)],
        "DIB": [saved(image, "DIB") for image in (PHOTO, grey, palette)],
        "TIFF": [
            *(saved(image, "TIFF", exif=exif) for image in (PHOTO, grey, alpha, palette, bits)),
            *(saved(PHOTO, "TIFF", compression=how) for how in compressions),
            saved(bits, "TIFF", compression="group4"),
            saved(PHOTO.convert("CMYK"), "TIFF"),
            saved(PHOTO.convert("LAB"), "TIFF"),
            saved(PHOTO, "TIFF", big_tiff=True),
            saved(PHOTO, "TIFF", **more()),
            *deep["TIFF"],
            *(data for name, data in FLOATS.items() if name != "PFM"),
        ],
        "WEBP": [
            saved(PHOTO, "WEBP", quality=60),
            saved(alpha, "WEBP", lossless=True, exif=exif),
            saved(PHOTO, "WEBP", **more()),
        ],
        "GIF": [
            saved(palette, "GIF", transparency=3, comment=b"a comment"),
            saved(PHOTO, "GIF", interlace=True, **more()),
        ],
        "AVIF": [
            saved(PHOTO, "AVIF", quality=60),
            saved(alpha, "AVIF", exif=exif),
            saved(PHOTO, "AVIF", **more()),
        ],
    }


def refused() -> dict[str, list[bytes]]:
    modes = {"BLP": "P", "MSP": "1", "SPIDER": "F", "XBM": "1", "PALM": "P"}
    kinds = [*OTHERS, "IM", "XBM", "PALM"]
    return {kind: [saved(PHOTO.convert(modes.get(kind, "RGB")), kind)] for kind in kinds} | {
        "PSD": [b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 20, 24, 8, 3) + bytes(12) + bytes(1440)],
        "FITS": [b"".join(line.ljust(80) for line in (
            b"SIMPLE  =                    T", b"BITPIX  =                    8", b"NAXIS   =                    2",
            b"NAXIS1  =                   24", b"NAXIS2  =                   20", b"END")).ljust(2880) + bytes(2880)],
        "SVG": [b"<svg xmlns='http://www.w3.org/2000/svg' width='24' height='20'><path d='M 0 0'/></svg>" * 4],
    }  # fmt: skip


BASES = {"accepted": cache(accepted), "refused": cache(refused)}
OUTSIDE = (*OTHERS, "IM", "XBM", "PALM", "PSD", "FITS", "SVG")


def mutated(draw: np.random.Generator, bases: list[bytes]) -> bytes:
    """One of `bases`, damaged: bytes or bits changed, a part lost, doubled or from another file, or cut short."""
    data = bytearray(bases[draw.integers(len(bases))])
    reach = len(data) if draw.random() < 0.5 else min(len(data), 160)  # half of them in the header
    at, length = int(draw.integers(reach)), int(draw.integers(1, 40))
    match draw.integers(7):
        case 0:
            for spot in draw.integers(0, reach, draw.integers(1, 6)):
                data[spot] = draw.integers(256)
        case 1:
            for spot in draw.integers(0, reach, draw.integers(1, 4)):
                data[spot] ^= 1 << int(draw.integers(8))
        case 2:
            data = data[:at]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length]
        case 5:
            other = bases[draw.integers(len(bases))]
            start = int(draw.integers(len(other)))
            data = data[:at] + other[start:]
        case 6:  # a number of 2 or 4 bytes that readers may add to, multiply or allocate
            number = [
                0,
                1,
                0x7F,
                0x80,
                0xFF,
                0x7FFF,
                0x8000,
                0xFFFF,
                0x7FFFFFFF,
                0x80000000,
                0xFFFFFFFF,
            ]
            value, order = number[draw.integers(len(number))], "><"[draw.integers(2)]
            wide = (
                struct.pack(f"{order}I", value)
                if draw.random() < 0.5
                else struct.pack(f"{order}H", value & 0xFFFF)
            )
            data[at : at + len(wide)] = wide
    return bytes(data)


def sized(data: bytes, k: int) -> None:
    width, height = size_of(data)
    assert 1 <= width <= 20_000
    assert 1 <= height <= 20_000


def trained(data: bytes, k: int) -> None:
    """A crop of all of it, or of a corner; for every third image the index gives the size of the undamaged file."""
    width, height = (24, 20) if k % 3 == 0 else size_of(data)
    box = (
        (0, 0, width, height)
        if k % 2
        else (width // 2, height // 2, (width + 1) // 2, (height + 1) // 2)
    )
    slot = np.full((SIDE, SIDE, 3), 77, np.uint8)
    crop_into(slot, data, box, bool(k % 2))


def evaluated(data: bytes, k: int) -> None:
    centre_into(np.full((SIDE, SIDE, 3), 77, np.uint8), data, 18)


def prepared(data: bytes, k: int) -> None:
    done = encode(data, RAW if k % 2 else PACKED)
    assert done.pixels.dtype == np.uint8
    assert done.pixels.ndim == 3 or k % 2 == 0  # a grey JPEG that is copied has no channels
    assert done.data


PATHS: tuple[Callable[[bytes, int], None], ...] = (sized, trained, evaluated, prepared)


def fuzz(kind: str, bases: list[bytes], count: int) -> Counter:
    """Outcomes of `count` mutations on all paths. Any exception but those of a bad image fails, and says which."""
    outcomes: Counter = Counter()
    draw = np.random.default_rng([SEED, *kind.encode()])
    for k in range(count):
        data = mutated(draw, bases)
        for path in PATHS:
            try:
                path(data, k)
                outcome = "an image"
            except BadImage as error:
                outcome = error.code
            except Refused as error:
                outcome = str(error)
            except Exception as error:
                raise AssertionError(
                    f"{kind}, mutation {k}, {path.__name__}: {error!r}\n{data[:2000]!r}"
                ) from error
            assert outcome in CODES | {"an image"}
            outcomes[outcome] += 1
    return outcomes


def counts() -> list:
    return [SOME, pytest.param(MUTATIONS, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", counts())
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_an_image_or_a_bad_image_on_every_path(kind, count, caplog):
    bases = BASES["accepted"]()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that is not ignored fails as any other exception
        outcomes = fuzz(kind, bases, count)
    assert outcomes["an image"]  # so the mutations reach the decoders
    assert not caplog.records
    print(
        f"{kind}: {count:,} mutations of {len(bases)} files on {len(PATHS)} paths: {dict(outcomes)}"
    )


@pytest.mark.parametrize("count", counts())
@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_damaged_file_of_another_format_never_reaches_its_decoder(kind, count, monkeypatch):
    Image.init()
    asked = []
    for name, (_, accepts) in list(Image.OPEN.items()):
        if name not in FORMATS:
            monkeypatch.setitem(
                Image.OPEN, name, (lambda *_, name=name: asked.append(name), accepts)
            )
    outcomes = fuzz(kind, BASES["refused"]()[kind], count)
    assert not outcomes[
        "an image"
    ]  # a damaged file may begin like one of another format: DIB has no signature
    assert not asked
    print(f"{kind}: {count:,} mutations on {len(PATHS)} paths: {dict(outcomes)}")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_undamaged_files_are_images(kind):
    num_opened = 0
    for k, data in enumerate(BASES["accepted"]()[kind]):
        if data in FLOATS.values():
            continue
        for path in PATHS:
            path(data, 1 + 3 * k)  # raises if it is not an image; never with another file's size
            num_opened += 1
    assert num_opened >= len(PATHS)
