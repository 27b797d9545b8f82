"""Images as they come: which are packed, which are refused and why, and what their pixels sum up to."""

import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from alexnet_ddp.config import AlexNet2012AugmentConfig
from alexnet_ddp.config.prepare import Encoding
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.sources.sets import colour_basis
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.commit import remove_temporary_files
from alexnet_ddp.prepare.encode import Recipe, Refused, encode
from alexnet_ddp.prepare.write import Statistics
from alexnet_ddp.runtime.errors import DataError
from tests.archives import TRAIN, age_tree, jpeg, make_archives, tar, write
from tests.packing import hashes, pack

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
PHOTO = (
    Image.fromarray(PIXELS).resize((30, 20)).resize((60, 40))
)  # smooth enough for a JPEG to be near it


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def recipe(**knobs: object) -> Recipe:
    given = {"shorter_side": 256, "quality": 90, "keep_original": True, "encoding": Encoding.jpeg}
    return Recipe(**{**given, "size": None, "mean_image": None, **knobs})


def bomb() -> bytes:
    """A PNG that says it is 60,000 x 60,000 pixels."""
    data = bytearray(saved(PHOTO, "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def damaged_png() -> bytes:
    data = bytearray(saved(Image.fromarray(PIXELS), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


BAD = {
    "empty": b"",
    "not_an_image": b"this is no picture at all, but some text",
    "not_an_image ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n",  # Pillow would run Ghostscript
    "not_an_image svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "truncated": saved(PHOTO, "JPEG")[:-300],
    "truncated png": saved(Image.fromarray(PIXELS), "PNG")[:3000],
    "decode_error": damaged_png(),
    "sample_type": saved(Image.new("F", (60, 40), 0.5), "TIFF"),
    "bomb": bomb(),
    "bomb long": saved(Image.new("L", (20_001, 4)), "PNG"),
}

GOOD = {
    "cmyk": saved(PHOTO.convert("CMYK"), "JPEG"),
    "png named jpeg": saved(PHOTO, "PNG"),
    "grey jpeg": saved(PHOTO.convert("L"), "JPEG"),
    "grey 16": saved(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
    "palette": saved(PHOTO.convert("P"), "PNG", transparency=3),
    "alpha": saved(PHOTO.convert("RGBA"), "PNG"),
    "one bit": saved(PHOTO.convert("1"), "PNG"),
    "turned": saved(PHOTO, "JPEG", exif=(lambda e: (e.__setitem__(0x0112, 6), e)[1])(Image.Exif())),
    "gif": saved(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
    "webp": saved(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)], lossless=True),
    "progressive": saved(PHOTO, "JPEG", progressive=True),
    "bmp": saved(PHOTO, "BMP"),
    "tiff": saved(PHOTO, "TIFF"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_has_a_fixed_reason(name):
    for how in (recipe(), recipe(encoding=Encoding.raw, size=32)):
        with pytest.raises(Refused) as caught:
            encode(BAD[name], how)
        assert str(caught.value) == name.split()[0]


def test_the_header_is_checked_before_the_pixels():
    """Else a bomb would be decoded before it is refused."""
    with pytest.raises(Refused, match="bomb"):
        encode(bomb()[:100], recipe())


def test_truncated_images_are_refused_even_if_another_library_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(Refused, match="truncated"):
        encode(BAD["truncated"], recipe())


@pytest.mark.parametrize("name", GOOD)
def test_any_other_image_becomes_rgb(name):
    done = encode(GOOD[name], recipe())
    shown = Image.open(io.BytesIO(done.data))
    assert (shown.format, shown.size, done.pixels.shape) == ("JPEG", (60, 40), (40, 60, 3))
    assert np.array_equal(np.asarray(shown.convert("RGB")), done.pixels)
    if name not in ("palette", "one bit", "grey 16"):
        near = np.abs(
            done.pixels.astype(int)
            - np.asarray(PHOTO if "grey" not in name else PHOTO.convert("L").convert("RGB"))
        )
        assert (
            near.mean() < 12
        )  # the first frame, and not turned: EXIF is not followed, as in training


def test_sixteen_bits_are_scaled_and_not_clipped():
    pixels = encode(GOOD["grey 16"], recipe(encoding=Encoding.raw, size=40)).pixels
    assert pixels.min() < 30
    assert 200 < pixels.max() < 255
    assert len(np.unique(pixels)) > 100


@pytest.mark.parametrize("name", ["grey jpeg", "turned", "progressive"])
def test_a_jpeg_that_needs_no_change_is_copied(name):
    assert encode(GOOD[name], recipe()).data == GOOD[name]
    assert encode(GOOD[name], recipe(shorter_side=40)).data == GOOD[name]
    assert encode(GOOD[name], recipe(shorter_side=None)).data == GOOD[name]
    assert encode(GOOD[name], recipe(shorter_side=39)).data != GOOD[name]
    assert encode(GOOD[name], recipe(keep_original=False)).data != GOOD[name]


@pytest.mark.parametrize("name", ["cmyk", "png named jpeg", "webp"])
def test_an_image_that_is_not_a_plain_jpeg_is_encoded(name):
    assert encode(GOOD[name], recipe()).data[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    ("size", "expected"), [((60, 40), (30, 20)), ((40, 61), (20, 30)), ((10, 15), (10, 15))]
)
def test_larger_images_are_resized_to_the_shorter_side_and_smaller_ones_never(size, expected):
    data = saved(PHOTO.resize(size), "PNG")
    assert Image.open(io.BytesIO(encode(data, recipe(shorter_side=20)).data)).size == expected


@pytest.mark.parametrize("size", [(20_000, 4), (4, 20_000), (400, 13)])
def test_a_very_long_image_becomes_a_square_without_filling_the_memory(size):
    import tracemalloc

    data = saved(Image.new("RGB", size, (9, 8, 7)), "PNG")
    tracemalloc.start()
    pixels = encode(data, recipe(encoding=Encoding.raw, size=64)).pixels
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert pixels.shape == (64, 64, 3)
    assert np.array_equal(np.unique(pixels.reshape(-1, 3), axis=0), [[9, 8, 7]])


def test_a_raw_square_equals_torchvisions():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    pixels = encode(saved(PHOTO, "PNG"), recipe(encoding=Encoding.raw, size=32)).pixels
    resize = v2.Compose([v2.Resize(32), v2.CenterCrop(32)])
    assert np.array_equal(pixels, np.asarray(resize(PHOTO)))


# --- a whole source with bad images in it ---------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Two classes: one of good images in every way, one of bad ones with two good ones among them."""
    for folder, images in (
        ("good", GOOD),
        ("mixed", {**BAD, "fine": jpeg(0, 0), "fine2": jpeg(0, 1)}),
    ):
        where = tmp_path / "tree/train" / folder
        where.mkdir(parents=True)
        for name, data in images.items():
            (where / f"{name}.JPEG").write_bytes(data)
    age_tree(tmp_path / "tree")
    return tmp_path / "tree"


def quarantine(root: Path) -> dict[str, str]:
    lines = (root / "train.quarantine.jsonl").read_text().splitlines()
    return {row["name"]: row["reason"] for row in map(json.loads, lines)}


def test_bad_images_are_quarantined_and_nothing_else_is_lost(tree, tmp_path):
    root = pack(tree, tmp_path / "root", split="train")
    assert quarantine(root) == {f"mixed/{name}.JPEG": name.split()[0] for name in BAD}
    names = (root / "train.names.txt").read_text().splitlines()
    assert names == sorted(
        [*(f"good/{name}.JPEG" for name in GOOD), "mixed/fine.JPEG", "mixed/fine2.JPEG"]
    )
    samples = np.load(root / "train.samples.npy")
    for name, sample in zip(names, samples):
        with open(root / f"train-{sample['shard']:06d}.tar", "rb") as shard:
            shard.seek(int(sample["offset"]))
            image = Image.open(io.BytesIO(shard.read(int(sample["size"]))))
        assert image.size == (sample["width"], sample["height"])
        assert ["good", "mixed"][sample["label"]] == name.split("/")[0]
    stats = json.loads((root / "train.stats.json").read_bytes())
    assert stats["quarantined"] == {
        "bomb": 2, "decode_error": 1, "empty": 1, "not_an_image": 3, "sample_type": 1, "truncated": 2
    }  # fmt: skip
    keys = []
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as shard:
            keys += shard.getnames()
    assert len(keys) == 2 * len(names)
    assert keys == sorted(keys)
    assert (
        int(max(keys)[:9]) > len(names) - 1
    )  # a bad one leaves a gap: the others keep their places


@pytest.mark.slow
def test_temporary_files_that_a_task_still_writes_raise_no_error(tmp_path):
    # Spark ends a cancelled task a moment after the error, which must not be replaced.
    root, folder = Storage(str(tmp_path)), tmp_path / "_tmp"
    loop = 'while :; do mkdir -p "$0"; touch "$0/late-"{1..3000}; done 2>/dev/null'
    tasks = [subprocess.Popen(["bash", "-c", loop, str(folder)]) for _ in range(2)]
    try:
        while not (folder / "late-3000").exists():
            time.sleep(0.01)
        with pytest.raises(OSError, match="_tmp"):
            [root.remove("_tmp") for _ in range(200)]
        remove_temporary_files(root)
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    remove_temporary_files(root)
    assert not folder.exists()


def test_too_many_bad_images_stop_before_the_commit_and_fixing_them_resumes(tree, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(DataError) as caught:
        pack(tree, root, split="train", max_quarantine=2)
    assert str(caught.value).split(" images")[0] in ("3", "4", "5", "6", "7", "8", "9", "10")
    assert (
        f"bad, more than max_quarantine (2); nothing was committed. Their names are in {root}/train.quarantine.jsonl; fix "
        in str(caught.value)
    )
    assert not (root / "index.json").exists()
    assert not (root / "_tmp").exists()
    assert set(quarantine(root)) <= {f"mixed/{name}.JPEG" for name in BAD}
    assert len(quarantine(root)) > 2
    pack(tree, root, split="train", max_quarantine=10)
    before = hashes(root)
    pack(tree, root, split="train", max_quarantine=0, verify=False)  # what is committed stays
    pack(tree, root, split="train", max_quarantine=10, retry_quarantined=True)
    assert hashes(root) == before
    for name in BAD:
        (tree / f"train/mixed/{name}.JPEG").write_bytes(jpeg(1, 1))
    pack(tree, root, split="train", max_quarantine=0)  # their sizes are others now
    assert quarantine(root) == {}
    assert hashes(root) == hashes(pack(tree, tmp_path / "fresh", split="train"))


def test_a_source_of_bad_images_alone_is_refused(tree, tmp_path):
    shutil.rmtree(tree / "train/good")
    for name in ("fine", "fine2"):
        (tree / f"train/mixed/{name}.JPEG").unlink()
    with pytest.raises(
        DataError, match=r"every image of train is bad \(bomb, decode_error, empty, not_an_image, "
    ):
        pack(tree, tmp_path / "root", split="train")


def test_only_the_last_image_of_a_cut_archive_is_truncated(tmp_path):
    archives = make_archives(tmp_path / "archives")
    with tarfile.open(archives / TRAIN) as outer:
        tars = {m.name: outer.extractfile(m).read() for m in outer}
    name = sorted(tars)[1]
    with tarfile.open(fileobj=io.BytesIO(tars[name])) as inner:
        last = inner.getmembers()[-1]
    tars[name] = tars[name][: last.offset_data + last.size - 60]
    write(archives / TRAIN, tar(tars))
    root = pack(archives, tmp_path / "root", split="train")
    assert quarantine(root) == {f"{name[:-4]}/{last.name}": "truncated"}
    assert len((root / "train.names.txt").read_text().splitlines()) == 47


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs", [{}, {"encoding": "raw", "size": 24}, {"shorter_side": 16, "mean_image": 12}]
)
def test_the_sums_equal_numpys_over_the_packed_images(tmp_path, knobs):
    archives = make_archives(tmp_path / "archives")
    root = pack(archives, tmp_path / "root", **knobs)
    stats = json.loads((root / "train.stats.json").read_bytes())
    images = [packed_pixels(root, sample, knobs) for sample in np.load(root / "train.samples.npy")]
    flat = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.int64)
    assert (stats["images"], stats["pixels"]) == (48, len(flat))
    assert stats["sums"] == flat.sum(0).tolist()
    assert stats["products"] == (flat.T @ flat).tolist()
    assert stats["heights"] == [
        sum(i.shape[0] for i in images),
        min(i.shape[0] for i in images),
        max(i.shape[0] for i in images),
    ]
    n = len(flat)
    exact = [[Fraction(n * int(flat[:, i] @ flat[:, j]) - int(flat[:, i].sum()) * int(flat[:, j].sum()), n * n * 255**2)
              for j in range(3)] for i in range(3)]  # fmt: skip
    assert np.allclose(
        stats["covariance"], [[float(x) for x in row] for row in exact], rtol=1e-14, atol=0
    )
    assert stats["mean"] == pytest.approx((flat / 255).mean(0), rel=1e-12)
    assert stats["std"] == pytest.approx((flat / 255).std(0), rel=1e-9)
    vectors, values = np.array(stats["eigenvectors"]), np.array(stats["eigenvalues"])
    assert np.allclose(vectors * values @ vectors.T, stats["covariance"], atol=1e-9)
    assert np.allclose(vectors.T @ vectors, np.eye(3), atol=1e-8)
    assert (np.diff(values) <= 0).all()
    if "mean_image" in knobs:
        assert np.load(root / "train.mean.npy").shape == (12, 12, 3)
        mine = np.mean([square(image, 12) for image in images], axis=0)
        assert np.allclose(np.load(root / "train.mean.npy"), mine, atol=1e-4)


def packed_pixels(root: Path, sample: np.void, knobs: dict) -> np.ndarray:
    with open(root / f"train-{sample['shard']:06d}.tar", "rb") as shard:
        shard.seek(int(sample["offset"]))
        data = io.BytesIO(shard.read(int(sample["size"])))
    return np.load(data) if "encoding" in knobs else np.asarray(Image.open(data).convert("RGB"))


def square(image: np.ndarray, size: int) -> np.ndarray:
    from alexnet_ddp.prepare.encode import square as packed_square

    return packed_square(Image.fromarray(image), size).astype(np.float64)


def test_sums_are_the_same_in_any_order_and_grouping():
    images = [RNG.integers(0, 256, (int(h), 9, 3), dtype=np.uint8) for h in RNG.integers(4, 30, 12)]
    one, parts = Statistics(), [Statistics() for _ in range(4)]
    for k, image in enumerate(images):
        one.add(image)
        parts[k % 4].add(image)
    other = Statistics()
    for part in reversed(parts):
        other.merge(part)
    assert other == one


def test_the_colour_noise_of_alexnet_2012_is_along_the_axes_of_the_packed_data(tmp_path):
    root = pack(make_archives(tmp_path / "archives"), tmp_path / "root")
    values, vectors = colour_basis(Storage(str(root)))
    cfg, indices = AlexNet2012AugmentConfig(), np.arange(20_000)
    noise = build_augment(cfg, 0, 224, 256, (values, vectors)).colour(0, indices)
    covariance = np.cov(noise.T, bias=True)
    expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    assert np.allclose(covariance, expected, atol=0.05 * expected.max())
    imagenet = build_augment(cfg, 0, 224, 256).colour(0, indices)
    assert not np.allclose(noise, imagenet)


def test_without_statistics_the_colour_noise_is_imagenets(tmp_path, caplog):
    for content in (None, "{}", "[]"):
        if content is not None:
            (tmp_path / "train.stats.json").write_text(content)
        caplog.clear()
        assert colour_basis(Storage(str(tmp_path))) is None
        assert "train.stats.json cannot be read" in caplog.text


def test_duplicates_are_found_by_their_source_bytes(tmp_path):
    archives = make_archives(tmp_path / "archives")
    from tests.archives import extract

    tree = extract(archives, tmp_path / "tree")
    a, b = sorted((tree / "train").rglob("*.JPEG"))[:2]
    shutil.copy(a, b)
    shutil.copy(a, a.with_name("z.JPEG"))
    os.utime(a)
    root = pack(tree, tmp_path / "root")
    short = [f"{p.parent.name}/{p.name}" for p in (a, b, a.with_name("z.JPEG"))]
    assert json.loads((root / "train.stats.json").read_bytes())["duplicates"] == [short]
