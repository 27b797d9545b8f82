"""data.val_fraction and data.fold: one folder of classes becomes a training and a validation set."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.cli import compose
from alexnet_ddp.config import ConfigError
from alexnet_ddp.data.sources.index import FileStore, SampleIndex
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.data.sources.split import split_images
from alexnet_ddp.runtime.errors import DataError
from tests.test_train import SMALL, rows, run


def make_images(root: Path, **counts: int) -> Path:
    for k, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([k, i]).integers(0, 255, (70, 70, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def opened(root: Path, *overrides: str) -> ImageSets:
    return open_data(compose(["data=folder", f"data.root={root}", *overrides]).data)


def names(index: SampleIndex) -> list[str]:
    assert isinstance(index.store, FileStore)
    return [index.store.path(i) for i in range(len(index))]


def index_of(*classes: tuple[str, int]) -> tuple[SampleIndex, FileStore]:
    """An index of files that do not exist: `count` images of each class."""
    paths = [f"{name}/{i}.jpg" for name, count in classes for i in range(count)]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [count for _, count in classes])
    store = FileStore.pack("/data", paths)
    return SampleIndex([name for name, _ in classes], labels, store), store


def test_a_hash_of_the_name_decides_about_each_image():
    index, store = index_of(("a", 4000), ("b", 3000))
    train, val = split_images(index, store, 0.15, None)
    assert sorted(names(train) + names(val)) == sorted(store.path(i) for i in range(7000))
    assert (train.classes, val.classes) == (["a", "b"], ["a", "b"])
    assert len(val) / 7000 == pytest.approx(0.15, abs=0.015)  # 3.5 standard deviations
    for side, index in ((False, train), (True, val)):
        for path, label in zip(names(index), index.labels):
            share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
            assert (share < 0.15) is side
            assert index.classes[label] == path.split("/")[0]


def test_images_stay_in_their_set_when_others_are_added():
    few, more = (split_images(*index_of(("a", n), ("b", n)), 0.2, None) for n in (300, 500))
    for before, after in zip(few, more):
        assert set(names(before)) <= set(names(after))
    assert few[0].fingerprint() != more[0].fingerprint()


def test_the_only_validation_image_of_a_small_class_may_change_when_others_are_added():
    """No hash of three images is below 1e-9, so the lowest one is taken."""
    few, more = (split_images(*index_of(("a", n)), 1e-9, None)[1] for n in (3, 30))
    assert len(names(few)) == len(names(more)) == 1
    assert names(few) != names(more)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_every_class_of_two_images_is_in_both_sets_and_a_single_image_is_trained_on(fraction):
    index, store = index_of(*((f"c{k:03d}", 1 + k % 4) for k in range(200)))
    train, val = split_images(index, store, fraction, None)
    assert set(train.labels) == set(range(200))
    assert set(val.labels) == {k for k in range(200) if k % 4}


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_equal_parts_that_contain_every_image_once(folds):
    counts = {f"c{k:02d}": 1 + k for k in range(40)}
    index, store = index_of(*counts.items())
    parts = [split_images(index, store, None, (k + 1, folds)) for k in range(folds)]
    found = Counter(name for _, val in parts for name in names(val))
    assert found == Counter(path for path in names(index) if not path.startswith("c00/"))
    for train, val in parts:
        assert sorted(names(train) + names(val)) == sorted(names(index))
        assert set(train.labels) == set(range(40))
        sizes = np.bincount(val.labels, minlength=40)[1:]
        for size, count in zip(sizes, range(2, 41)):
            assert count // folds <= size <= -(-count // folds)
    sizes = [len(val) for _, val in parts]  # no part gets the remainder of every class
    assert max(sizes) < 1.15 * min(sizes)


def test_a_folder_of_classes_and_a_folder_with_train_only_are_divided_alike(tmp_path):
    whole = opened(make_images(tmp_path / "whole", a=9, b=7), "data.val_fraction=0.3")
    make_images(tmp_path / "half" / "train", a=9, b=7)
    half = opened(tmp_path / "half", "data.val_fraction=0.3")
    assert names(whole.val) == names(half.val)
    assert whole.train.fingerprint() == half.train.fingerprint()
    assert len(whole.train) + len(whole.val) == 16
    fold = opened(tmp_path / "whole", "data.fold=1/4")
    assert len(fold.val) in (3, 4, 5)


def test_a_layout_that_cannot_be_divided_is_refused_with_a_remedy(tmp_path):
    root = make_images(tmp_path / "x", a=3, b=3)
    with pytest.raises(
        DataError, match=r"contains neither train nor val; .* data.val_fraction=0.15"
    ):
        opened(root)
    above = rf"if it is one class, give the folder above it \({root}\)"
    with pytest.raises(
        DataError, match=rf"contains images and no .*; {above}, and give data.val_frac"
    ):
        opened(root / "a")
    with pytest.raises(DataError, match=rf"holds 3 images but no .*; {above}; otherwise move the"):
        opened(root / "a", "data.val_fraction=0.5")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images of empty"):
        opened(root, "data.val_fraction=0.5")
    make_images(root / "val", a=1)
    with pytest.raises(
        DataError, match=r"contains val, so nothing is divided; leave data.fold out"
    ):
        opened(root, "data.fold=1/2")
    with pytest.raises(DataError, match="is not a folder"):
        opened(tmp_path / "nowhere", "data.val_fraction=0.5")


@pytest.mark.parametrize("source", ["folder", "csv"])
@pytest.mark.parametrize(
    ("count", "option", "line"),
    [
        (1, "data.val_fraction=0.2", "data.val_fraction (0.2) needs a class of two images or more"),
        (1, "data.fold=1/2", "data.fold (1/2) needs a class of two images or more"),
        (2, "data.fold={}/9", "the largest class has 2 images; add images, or give data.fold=K/2"),
    ],
)
def test_a_division_without_validation_images_is_refused(tmp_path, source, count, option, line):
    root = make_images(tmp_path / "x", a=count, b=count)
    if source == "csv":
        lines = [f"{file},{file.parent.name}" for file in sorted(root.glob("*/*"))]
        (tmp_path / "x.csv").write_text("\n".join(["path,label", *lines]))
    options = [f"data={source}", f"data.root={root}{'.csv' * (source == 'csv')}"]
    refused = []
    for k in range(1, 10):
        try:
            open_data(compose([*options, option.format(k)]).data)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) >= 5  # of 9 parts, at most 4 have one of the 4 images
    assert all(line in one and "\n" not in one for one in refused)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.val_fraction=0"], "data.val_fraction (0.0) must be in (0, 1)"),
        (["data.val_fraction=1"], "data.val_fraction (1.0) must be in (0, 1)"),
        (["data.fold=0/5"], "data.fold (0/5) must be K/N with 1 <= K <= N and N at least 2"),
        (["data.fold=6/5"], "data.fold (6/5) must be K/N"),
        (["data.fold=1/1"], "data.fold (1/1) must be K/N"),
        (["data.fold=2"], "data.fold (2) must be K/N"),
        (["data.fold=1/2", "data.val_fraction=0.5"], "both choose the validation set; give one"),
    ],
)
def test_a_wrong_division_is_refused_with_value_and_rule(overrides, line):
    with pytest.raises(ConfigError) as error:
        compose(["data=folder", "data.root=x", *overrides])
    assert line in str(error.value)


@pytest.mark.slow
def test_a_run_on_a_divided_folder_resumes_and_is_evaluated_on_the_same_images(tmp_path):
    root = make_images(tmp_path / "photos", a=20, b=20, c=20)
    options = [*SMALL, "data=folder", f"data.root={root}", "data.val_fraction=0.25", "run.name=r"]
    for steps in (3, 6):
        done = run("train", *options, f"trainer.max_steps={steps}", ranks=2, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    evaluated = rows(tmp_path / "runs/r", "val/top1")
    last, best = evaluated[-1], max(evaluated, key=lambda row: row["val/correct1"])
    expected = len(opened(root, "data.val_fraction=0.25").val)
    assert (last["step"], last["val/num_images"]) == (6, expected)
    done = run("evaluate", "run.name=r", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "runs/r/evaluation.json").read_text())
    assert (found["val/num_images"], found["val/correct1"]) == (expected, best["val/correct1"])
    other = run("train", *options, "data.val_fraction=0.5", cwd=tmp_path)
    assert other.returncode == 64
    assert "run.name=r was started as another run" in other.stdout
