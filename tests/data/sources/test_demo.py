"""The built-in data set: equal to the byte, whole or absent, and not to be learnt by a linear model."""

import hashlib
import json
import os
import re
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from alexnet_ddp.data.sources import demo
from alexnet_ddp.data.sources.demo import CLASSES, demo_image, demo_jpeg, ensure_demo
from alexnet_ddp.runtime.errors import DataError


@pytest.fixture
def small(monkeypatch):
    """A data set of 40 images, so that writing it takes milliseconds."""
    monkeypatch.setattr(demo, "COUNTS", {"train": 30, "val": 10})


def files(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def test_an_image_is_a_function_of_split_and_index_alone():
    forwards = [demo_jpeg("train", i) for i in range(20)]
    backwards = [demo_jpeg("train", i) for i in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len({*forwards, *(demo_jpeg("val", i) for i in range(20))}) == 40


def test_pixels_and_files_have_the_recorded_checksums():
    """They do not depend on the CPU or on the version of a library. If this fails, raise demo.VERSION."""
    pixels, jpegs = hashlib.sha256(), hashlib.sha256()
    for split in ("train", "val"):
        for i in range(50):
            pixels.update(demo_image(split, i).tobytes())
            jpegs.update(demo_jpeg(split, i))
    assert (demo.VERSION, pixels.hexdigest()) == (
        2,
        "e7302908dd029aa68d07e8ea6af4deaa958d8050ee78865ccf326687bb729e23",
    )
    assert jpegs.hexdigest() == "4ea7d1d577b5a51c3c1a1449806108c191661b6066aba6ddac66bc86f70f665c"


def test_no_library_for_images_draws():
    """OpenCV 4.10 and 4.13 draw different pixels for the same calls, and so may any other version."""
    source = Path(demo.__file__).read_text()
    assert not re.search(r"^\s*(import|from) (cv2|PIL|scipy)", source, re.MULTILINE)


def test_two_sets_are_equal_to_the_byte_and_have_the_promised_layout(tmp_path, small):
    ensure_demo(tmp_path / "a")
    ensure_demo(tmp_path / "deep" / "b")
    made = files(tmp_path / "a")
    assert made == files(tmp_path / "deep" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "train").iterdir()) == sorted(CLASSES)
    assert [n for n in made if n.startswith("val/")] == [
        f"val/{c}/{i:05d}.jpg" for i, c in enumerate(CLASSES)
    ]
    assert len(made) == 41
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "deep"]


def test_files_are_colour_jpegs_of_64_to_80_px_in_many_shapes():
    shapes = set()
    for i in range(50):
        image = cv2.imdecode(np.frombuffer(demo_jpeg("train", i), np.uint8), cv2.IMREAD_UNCHANGED)
        assert image.ndim == 3
        assert 64 <= min(image.shape[:2]) <= max(image.shape[:2]) <= 80
        shapes.add(image.shape)
    assert len(shapes) > 30


def test_a_complete_set_is_not_changed(tmp_path, small):
    ensure_demo(tmp_path / "a")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    ensure_demo(tmp_path / "a")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path, small):
    (tmp_path / "a").mkdir()
    ensure_demo(tmp_path / "a")
    assert len(files(tmp_path / "a")) == 41


def test_racing_writers_leave_one_complete_set_and_no_drafts(tmp_path, small):
    errors = []

    def make():
        try:
            ensure_demo(tmp_path / "a")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert len(files(tmp_path / "a")) == 41


def test_who_loses_the_race_drops_its_copy_quietly(tmp_path, small, monkeypatch):
    real = os.rename

    def lose(source, target):
        monkeypatch.setattr(os, "rename", real)
        ensure_demo(target)  # the other process finishes first
        real(source, target)

    monkeypatch.setattr(os, "rename", lose)
    ensure_demo(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_writer_leaves_no_files(tmp_path, small, monkeypatch):
    def fail(split, index):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "demo_jpeg", fail)
    with pytest.raises(DataError, match=r"No space left on device; choose another data.root"):
        ensure_demo(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused_and_not_touched(tmp_path, small):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(
        DataError,
        match=r"must be absent, empty or contain a finished demo data set .* choose another",
    ):
        ensure_demo(tmp_path / "a")
    assert files(tmp_path / "a") == {"thesis.txt": b"mine"}


def test_a_file_in_the_place_is_refused(tmp_path, small):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(DataError, match=r"must be absent, empty"):
        ensure_demo(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_a_complete_set_of_version_1_is_used_as_it_is(tmp_path, small):
    """A run that began on it resumes on the same images."""
    ensure_demo(tmp_path / "a")
    marker = json.loads((tmp_path / "a" / demo.MARKER).read_text())
    (tmp_path / "a" / demo.MARKER).write_text(json.dumps({**marker, "version": 1}))
    before = files(tmp_path / "a")
    ensure_demo(tmp_path / "a")
    assert files(tmp_path / "a") == before


def test_another_version_is_refused(tmp_path, small):
    ensure_demo(tmp_path / "a")
    marker = json.loads((tmp_path / "a" / demo.MARKER).read_text())
    (tmp_path / "a" / demo.MARKER).write_text(json.dumps({**marker, "version": 0}))
    with pytest.raises(DataError, match=r"another demo\.json .* delete it or choose another"):
        ensure_demo(tmp_path / "a")


def test_a_set_with_lost_images_is_refused(tmp_path, small):
    ensure_demo(tmp_path / "a")
    (tmp_path / "a" / "train" / "star" / "00007.jpg").unlink()
    with pytest.raises(
        DataError, match=r"contains 29 of the 30 train images .* delete it to have it created again"
    ):
        ensure_demo(tmp_path / "a")


@pytest.mark.slow
def test_a_linear_model_on_the_pixels_stays_near_chance():
    """Ridge regression on 16 x 16 px, 1,500 images: 10 % is chance, a small convolutional network reaches over 94 %."""

    def pixels(split, count):
        images = [
            cv2.resize(demo_image(split, i), (16, 16), interpolation=cv2.INTER_AREA)
            for i in range(count)
        ]
        return np.stack(images).reshape(count, -1).astype(np.float64) / 255, np.arange(count) % len(
            CLASSES
        )

    (x, y), (x_val, y_val) = pixels("train", 1500), pixels("val", 500)
    mean = x.mean(0)
    x, x_val = x - mean, x_val - mean
    for strength in (1.0, 10.0, 100.0):
        weight = np.linalg.solve(
            x.T @ x + strength * np.eye(x.shape[1]), x.T @ (np.eye(len(CLASSES))[y] - 0.1)
        )
        assert ((x_val @ weight).argmax(1) == y_val).mean() < 0.25
