"""Opening an image: bit depths, thin images, formats, warnings and files that are none, the same on every path."""

import io
import os
import re
import resource
import socket
import struct
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

import alexnet_ddp
from alexnet_ddp.config import (
    AlexNet2012AugmentConfig,
    BasicAugmentConfig,
    FolderConfig,
    OnBadImage,
)
from alexnet_ddp.config.prepare import Encoding
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.decode import BadImage, centre_into, crop_into, size_of
from alexnet_ddp.data.fill import build_fill
from alexnet_ddp.data.image import FORMATS, read_file
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.data.storage import NotAFile
from alexnet_ddp.prepare.encode import Recipe, Refused, encode
from tests.packing import pack

SIDE = 16
RAW = Recipe(None, None, None, Encoding.raw, SIDE, None)
PACKED = Recipe(256, 90, True, Encoding.jpeg, None, None)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def trained(data: bytes) -> np.ndarray:
    slot = np.zeros((SIDE, SIDE, 3), np.uint8)
    width, height = size_of(data)
    side = min(width, height)
    crop_into(slot, data, ((width - side) // 2, (height - side) // 2, side, side), False)
    return slot


def evaluated(data: bytes) -> np.ndarray:
    slot = np.zeros((SIDE, SIDE, 3), np.uint8)
    centre_into(slot, data, SIDE)
    return slot


def prepared(data: bytes) -> np.ndarray:
    return encode(data, RAW).pixels


PATHS = {"training": trained, "evaluation": evaluated, "preparation": prepared}


# Bit depths


def tiff(
    samples: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, body: bytes = b""
) -> bytes:
    """An uncompressed grey TIFF, in the byte order of `samples`, [height, width]."""
    order = ">" if samples.dtype.byteorder == ">" else "<"
    body = body or samples.tobytes()
    height, width = samples.shape
    shorts = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        277: 1,
        278: height,
        339: sample_format,
    }
    entries = {tag: (3, struct.pack(f"{order}HH", value, 0)) for tag, value in shorts.items()}
    entries |= {
        tag: (4, struct.pack(f"{order}I", value)) for tag, value in {273: 8, 279: len(body)}.items()
    }
    table = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + value
        for tag, (kind, value) in sorted(entries.items())
    )
    magic = b"MM\0*" if order == ">" else b"II*\0"
    head = magic + struct.pack(f"{order}I", 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(entries)) + table + bytes(4)


def png(samples: np.ndarray, colour_type: int) -> bytes:
    """A PNG with 16 bits: samples uint16 [height, width, channels]."""
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def twelve_bits(samples: np.ndarray) -> bytes:
    pairs = samples.reshape(-1, 2).tolist()
    body = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    return tiff(samples.astype("<u2"), 12, body=body)


RAMP = np.linspace(0.1, 0.6, SIDE * SIDE).reshape(
    SIDE, SIDE
)  # never reaches its type's ends: no image's own scale


def ramp(bits: int, kind: str) -> np.ndarray:
    return np.rint(RAMP * (2**bits - 1)).astype(kind)


def pgm(magic: bytes, maxval: int, body: bytes) -> bytes:
    return b"%s\n%d %d\n%d\n" % (magic, SIDE, SIDE, maxval) + body


def colours(channels: int = 3) -> np.ndarray:
    return np.stack([ramp(16, "<u2")] * channels, 2)


DEEP = {
    "PNG grey 16": saved(Image.fromarray(ramp(16, "<u2")), "PNG"),
    "PNG grey and alpha 16": png(colours(2), 4),
    "PNG RGB 16": png(colours(), 2),
    "PNG RGBA 16": png(colours(4), 6),
    "TIFF grey 16": saved(Image.fromarray(ramp(16, "<u2")), "TIFF"),
    "TIFF grey 16 LZW": saved(Image.fromarray(ramp(16, "<u2")), "TIFF", compression="tiff_lzw"),
    "TIFF grey 16 big-endian": tiff(ramp(16, ">u2"), 16),
    "TIFF grey 16 white is zero": tiff(65_535 - ramp(16, "<u2"), 16, photometric=0),
    "TIFF grey 16 signed": tiff(ramp(15, "<i2"), 16, 2),
    "TIFF grey 16 signed big-endian": tiff(ramp(15, ">i2"), 16, 2),
    "TIFF grey 12": twelve_bits(ramp(12, "<u2")),
    "TIFF grey 32": tiff(ramp(32, "<u4"), 32),
    "TIFF grey 32 signed": tiff(ramp(31, "<i4"), 32, 2),
    "TIFF grey 32 signed, as Pillow writes mode I": saved(Image.fromarray(ramp(31, "<i4")), "TIFF"),
    "TIFF grey 8 signed": tiff(ramp(7, "i1"), 8, 2),
    "PGM 16": pgm(b"P5", 65_535, ramp(16, ">u2").tobytes()),
    "PGM 12": pgm(b"P5", 4095, ramp(12, ">u2").tobytes()),
    "PGM 10, plain": pgm(b"P2", 1023, " ".join(map(str, ramp(10, "<u2").ravel())).encode()),
    "PPM 16": pgm(b"P6", 65_535, colours().astype(">u2").tobytes()),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DEEP)
def test_samples_are_scaled_by_their_declared_depth(name, path):
    assert size_of(DEEP[name]) == (SIDE, SIDE)
    pixels = PATHS[path](DEEP[name]).astype(int)
    differ = np.abs(pixels - np.rint(RAMP * 255)[..., None]).max()
    assert differ <= 1, f"by {differ}"
    if "grey 16" in name and "alpha" not in name and "signed" not in name:
        assert np.array_equal(pixels[..., 0], np.rint(ramp(16, "<u2") / 257))


FLOATS = {
    "TIFF 32-bit floats": saved(Image.fromarray(RAMP.astype("<f4")), "TIFF"),
    "PFM": saved(Image.fromarray(RAMP.astype("<f4")), "PPM"),
    "negative 16-bit samples": tiff(ramp(15, "<i2") - 9000, 16, 2),
    "negative 32-bit samples": tiff(-ramp(31, "<i4"), 32, 2),
    "negative bytes": tiff(-ramp(7, "i1"), 8, 2),
}


@pytest.mark.parametrize("name", FLOATS)
def test_samples_without_a_natural_scale_are_refused_with_a_remedy(name):
    for path in (trained, evaluated):
        with pytest.raises(
            BadImage, match="samples; convert them to unsigned integers of 8 or 16 bits"
        ) as caught:
            path(FLOATS[name])
        assert (caught.value.code, caught.value.kind) == ("sample_type", "sample type")
    with pytest.raises(Refused) as refused:
        prepared(FLOATS[name])
    assert str(refused.value) == "sample_type"


def test_an_mpo_file_of_a_phone_is_its_first_picture():
    picture = Image.linear_gradient("L").convert("RGB").resize((32, 32))
    data = saved(picture, "MPO", save_all=True, append_images=[picture.rotate(90)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for path in PATHS.values():
        assert np.abs(path(data).astype(int) - path(saved(picture, "PNG"))).mean() < 4


# Thin images


@contextmanager
def little_memory():
    """At most 60 MB more than the process has held so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 3), (7, 19_999)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_thin_images_are_cheap_on_every_path(size, kind):
    data = saved(Image.new("RGB", size, (9, 99, 199)), kind)
    colour = evaluated(saved(Image.new("RGB", (8, 8), (9, 99, 199)), kind))[0, 0].astype(int)
    slot = np.zeros((224, 224, 3), np.uint8)
    assert size_of(data) == size
    with little_memory():
        centre_into(slot, data, 256)
        assert np.abs(slot - colour).max() <= 1
        for cfg in (BasicAugmentConfig(), AlexNet2012AugmentConfig()):
            views = build_augment(cfg, 0, 224, 256).views(
                0, np.arange(8), *(np.full(8, side) for side in size)
            )
            for box in np.stack([views.left, views.top, views.width, views.height], 1).tolist():
                crop_into(slot, data, box, True)
                assert np.abs(slot - colour).max() <= 1
        assert (
            np.abs(
                encode(data, Recipe(None, None, None, Encoding.raw, 256, None)).pixels - colour
            ).max()
            <= 1
        )
        assert encode(data, PACKED).pixels.shape == (size[1], size[0], 3)


def test_a_thin_image_shows_its_middle():
    pixels = np.zeros((2, 9000, 3), np.uint8)
    pixels[:, 4498:4502] = 255
    for path in PATHS.values():
        shown = path(saved(Image.fromarray(pixels), "PNG"))
        assert shown[:, 3:-3].min() > 200


# Formats


OTHERS = (
    "BLP",
    "DDS",
    "EPS",
    "ICNS",
    "ICO",
    "JPEG2000",
    "MSP",
    "PCX",
    "PDF",
    "QOI",
    "SGI",
    "SPIDER",
    "TGA",
)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_and_never_given_to_their_decoder(kind, monkeypatch):
    mode = {"BLP": "P", "MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    data = saved(Image.linear_gradient("L").convert(mode).resize((32, 32)), kind)
    Image.init()
    asked = []
    for name, (_, accepts) in list(Image.OPEN.items()):
        if name not in FORMATS:
            monkeypatch.setitem(
                Image.OPEN, name, (lambda *_, name=name: asked.append(name), accepts)
            )
    for path in (size_of, trained, evaluated):
        with pytest.raises(
            BadImage, match=r"^not an image .*; accepted formats are JPEG, PNG, PPM, BMP"
        ):
            path(data)
    with pytest.raises(Refused, match="not_an_image"):
        prepared(data)
    assert not asked


def test_a_postscript_file_never_starts_ghostscript(tmp_path, monkeypatch):
    log, gs = tmp_path / "log", tmp_path / "bin/gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\necho started >> {log}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n%%EndComments\nshowpage\n"
    with pytest.raises(OSError):
        Image.open(io.BytesIO(data)).load()
    assert log.exists()  # so Pillow would start it
    log.unlink()
    for path in (trained, evaluated, prepared):
        with pytest.raises((BadImage, Refused)):
            path(data)
    assert not log.exists()


def test_only_one_module_opens_images():
    package = Path(alexnet_ddp.__file__).parent
    opens = r"\bImage\.open\(|\bim(read|decode)\("
    files = [path for path in package.rglob("*.py") if re.search(opens, path.read_text())]
    in_text = package / "export/examples.py"  # of a README, for programs without this package
    assert set(files) == {package / "data/image.py", in_text}
    assert "formats=FORMATS" in (package / "data/image.py").read_text()


# Pillow's global settings, and what its readers raise


def damaged_tag() -> bytes:
    """A good TIFF that makes Pillow warn about one of its tags."""
    data = bytearray(
        saved(Image.new("RGB", (SIDE, SIDE), (50, 60, 70)), "TIFF", description="x" * 40)
    )
    at = data.index(struct.pack("<HHI", 270, 2, 41))
    data[at + 4 : at + 8] = struct.pack("<I", 9999)
    return bytes(data)


def test_warnings_of_pillow_are_neither_shown_nor_errors():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(damaged_tag())).load()
    assert seen  # so Pillow warns
    for action in ("always", "error"):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter(action)
            for path in PATHS.values():
                assert np.unique(path(damaged_tag())).tolist() == [50, 60, 70]
        assert not seen


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_another_library_that_wants_truncated_images_does_not_get_them_on_any_path(
    kind, monkeypatch
):
    data = saved(Image.effect_noise((64, 64), 90).convert("RGB"), kind)[:-500]
    for path in (trained, evaluated):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with pytest.raises(BadImage, match="damaged: image file is truncated") as caught:
            path(data)
        assert caught.value.code == "truncated"
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(Refused, match="truncated"):
        prepared(data)


@pytest.mark.parametrize("error", [TypeError, RuntimeError, SystemError, RecursionError, struct.error, OverflowError,
                                   EOFError, AttributeError, KeyError, OSError, AssertionError])  # fmt: skip
def test_any_exception_of_a_decoder_is_a_bad_image(error, monkeypatch):
    def failing(*_: object) -> None:
        raise error("<object at 0x7f0011223344>")

    data = saved(Image.new("RGB", (SIDE, SIDE)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", failing)
    for path in (trained, evaluated):
        with pytest.raises(BadImage, match=f"^damaged: {error.__name__}$"):
            path(data)
    with pytest.raises(Refused, match="decode_error"):
        prepared(data)


def test_a_lack_of_memory_is_never_a_bad_image(monkeypatch):
    def failing(*_: object) -> None:
        raise MemoryError

    data = saved(Image.new("RGB", (SIDE, SIDE)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", failing)
    for path in PATHS.values():
        with pytest.raises(MemoryError):
            path(data)


# Files that are none


def odd_files(folder: Path) -> dict[str, str]:
    """Entries named as images that are no files, or too large: their names, and what is said of them."""
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        listening.bind("socket.jpg")
        os.chdir(here)
    os.symlink("/dev/zero", folder / "device.jpg")
    os.symlink("/nowhere/x.jpg", folder / "dangling.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    (folder / "hole.jpg").touch()
    os.truncate(folder / "hole.jpg", 3 << 30)
    return {
        "pipe.jpg": "it is no regular file",
        "socket.jpg": "it is no regular file",
        "device.jpg": "it is no regular file",
        "dangling.jpg": "it is a link without a target",
        "loop.jpg": "it is a link without a target",
        "hole.jpg": "3,221,225,472 bytes, an image has at most 400,000,000",
    }


def test_what_is_no_file_is_named_at_once_by_every_reader(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (20, 20), (k, 9, 9)).save(tmp_path / f"train/{label}/{k}.jpg")
    odd = odd_files(tmp_path / "train/a")
    with little_memory():
        for name, reason in odd.items():
            with pytest.raises(NotAFile) as caught:
                read_file(f"{tmp_path}/train/a/{name}")
            assert str(caught.value) == reason
        with pytest.raises(NotAFile, match="it is no regular file"):
            read_file(str(tmp_path))
        (tmp_path / "train/a/loop.jpg").unlink()  # os.scandir() fails for it
        del odd["loop.jpg"]
        index = index_folder(tmp_path, "train")
        fill = build_fill(FolderConfig(image_size=SIDE, on_bad_image=OnBadImage.skip), index, None)
        bad = fill(np.zeros((len(index), SIDE, SIDE, 3), np.uint8), np.arange(len(index)), 0)
        assert {one.reason for one in bad} == {
            f"{tmp_path}/train/a/{name} cannot be read ({reason}); put it back, or start again without it"
            for name, reason in odd.items()
        }
        root = pack(tmp_path, tmp_path / "root", split="train")
    lines = (root / "train.quarantine.jsonl").read_text().splitlines()
    codes = {name: "bomb" if name == "hole.jpg" else "unreadable" for name in odd}
    assert sorted(lines) == sorted(
        f'{{"name": "a/{name}", "label": 0, "reason": "{codes[name]}"}}' for name in odd
    )


def test_a_file_that_is_missing_or_cannot_be_opened_is_the_machines_fault(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_file(f"{tmp_path}/x.jpg")
    assert not isinstance(caught.value, NotAFile)


def test_images_are_opened_in_many_threads_at_once():
    results, data = [], [saved(Image.new("RGB", (SIDE, SIDE), (k, k, k)), "PNG") for k in range(8)]

    def work(k: int) -> None:
        results.append(all((evaluated(data[k]) == k).all() for _ in range(50)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
