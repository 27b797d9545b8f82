"""prepare val_fraction=...: a source without val becomes train and val shards, divided as data=folder divides it."""

import shutil
from pathlib import Path

import pytest

from alexnet_ddp.cli import compose
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.prepare import Action
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.plan import ShardTask
from alexnet_ddp.runtime.errors import DataError
from tests.archives import age_tree, jpeg
from tests.packing import act, config, hashes, pack, run

COUNTS = {"ant": 9, "bee": 14, "cat": 1}
DIVIDED = {"val_fraction": 0.3, "shorter_side": None, "num_shards": 1}  # the bytes of the source


def make_photos(root: Path) -> Path:
    for k, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(jpeg(k, i))
    age_tree(root)
    return root


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


def opened(kind: str, root: Path, *overrides: str) -> ImageSets:
    return open_data(compose([f"data={kind}", f"data.root={root}", *overrides]).data)


def fingerprints(data: ImageSets) -> tuple[str, str]:
    """They cover the class, the name and the size of each image."""
    return data.train.fingerprint(), data.val.fingerprint()


@pytest.mark.parametrize("layout", ["classes", "train", "url"])
def test_the_shards_contain_what_the_divided_folder_does(photos, tmp_path, layout):
    source: Path | str = photos
    if layout == "train":
        source = tmp_path / "tree"
        shutil.copytree(photos, source / "train")
    elif layout == "url":
        source = f"memory://{tmp_path.name}"
        for path in photos.rglob("*.jpg"):
            Storage(source).write(str(path.relative_to(photos)), path.read_bytes())
        Storage(source).write("notes.txt", b"x")
    root = pack(source, tmp_path / "shards", **DIVIDED)
    divided = opened("folder", photos, "data.val_fraction=0.3")
    assert len(divided.val) >= 2
    assert fingerprints(opened("shards", root)) == fingerprints(divided)
    act("verify", root)
    before = hashes(root)
    pack(source, root, **DIVIDED)
    assert hashes(root) == before


def test_train_shards_are_divided_as_their_source(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "tree/train")
    whole = pack(tmp_path / "tree", tmp_path / "whole", shorter_side=None)
    with pytest.raises(DataError, match=r"no val shards; .* divide the images with val_fraction"):
        opened("shards", whole)
    root = pack(whole, tmp_path / "shards", **DIVIDED)
    direct = pack(photos, tmp_path / "direct", **DIVIDED)
    assert fingerprints(opened("shards", root)) == fingerprints(opened("shards", direct))


def test_parquet_files_without_a_validation_set_are_divided(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [jpeg(0, i) for i in range(20)]
    rows = {"image": [{"bytes": image} for image in images], "label": ["ant", "bee"] * 10}
    (tmp_path / "source").mkdir()
    parquet.write_table(pa.table(rows), tmp_path / "source/train.parquet")
    data = opened("shards", pack(tmp_path / "source", tmp_path / "shards", **DIVIDED))
    found = [index.read(i) for index in (data.train, data.val) for i in range(len(index))]
    assert sorted(found) == sorted(images)
    assert set(data.val.labels) == set(data.train.labels) == {0, 1}
    assert not (tmp_path / "shards/_source").exists()


def test_a_source_with_val_or_without_images_is_not_divided(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "tree/val")
    with pytest.raises(DataError, match=r"contains val, so val_fraction \(0.3\) divides nothing"):
        pack(tmp_path / "tree", tmp_path / "shards", **DIVIDED)
    with pytest.raises(DataError, match=r"source \(.*\) does not exist"):
        pack(tmp_path / "nowhere", tmp_path / "shards", **DIVIDED)
    (tmp_path / "single").mkdir()
    shutil.copytree(photos / "cat", tmp_path / "single/cat")
    with pytest.raises(
        DataError, match=r"^val_fraction \(0.3\) needs a class of two images or more"
    ):
        pack(tmp_path / "single", tmp_path / "shards", **DIVIDED)
    with pytest.raises(ConfigError, match=r"would be a class of source .*; give a directory outs"):
        pack(photos, photos / "shards", **DIVIDED)
    assert not (tmp_path / "shards").exists()


def test_one_folder_of_classes_is_refused_with_the_option_that_packs_it(photos, tmp_path, caplog):
    with pytest.raises(DataError, match=r"no images to pack; .*; val_fraction=0.15 divides CLASS"):
        pack(photos, tmp_path / "shards")
    shutil.copytree(photos, tmp_path / "tree/train")
    pack(tmp_path / "tree", tmp_path / "shards")
    assert "only train is packed; training needs both; val_fraction=0.15 divides it" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, r"val_fraction \(0.0\) must be in \(0, 1\)"),
        ({"val_fraction": 0.2, "split": "val"}, "packs train and val together, but split is val"),
        (
            {"val_fraction": 0.2, "action": Action.verify},
            "is only read by action=prepare, this is verif",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        config("photos", "shards", **options)


def test_shards_of_two_divisions_never_form_a_data_set(photos, tmp_path, monkeypatch):
    """A preparation that is stopped after train would otherwise leave the val of the old division."""
    root = pack(photos, tmp_path / "shards", **DIVIDED)
    smaller = DIVIDED | {"val_fraction": 0.1}
    with pytest.raises(ConfigError, match="contains train shards of another plan"):
        pack(photos, root, **smaller)
    seen = []

    def stop(task: ShardTask) -> None:
        seen.append((root / "index.json").exists())
        raise DataError("enough")

    with monkeypatch.context() as patch:
        patch.setattr("alexnet_ddp.prepare.command.write_shard", stop)
        with pytest.raises(DataError, match="enough"):
            pack(photos, root, **smaller, overwrite=True)
    assert seen == [False]
    pack(photos, root, **smaller, overwrite=True)
    divided = opened("folder", photos, "data.val_fraction=0.1")
    assert fingerprints(opened("shards", root)) == fingerprints(divided)


def test_a_division_is_not_extended_by_the_undivided_images(photos, tmp_path):
    """The val shards of the division would be a part of the new train shards."""
    shutil.copytree(photos, tmp_path / "tree/train")
    root = pack(tmp_path / "tree", tmp_path / "shards", **DIVIDED)
    before = hashes(root)
    rule = (
        r"val shards in root \(.*\) are a part of a division \(val_fraction=0.3\), and 6 of their"
    )
    for options in ({}, {"split": "train"}):
        with pytest.raises(ConfigError, match=rule):
            pack(tmp_path / "tree", root, **options, overwrite=True)
    assert hashes(root) == before
    shutil.copytree(photos, tmp_path / "renamed/train")
    for path in (tmp_path / "renamed/train").rglob("*.jpg"):
        path.rename(path.with_name(f"other-{path.name}"))
    pack(tmp_path / "renamed", root, overwrite=True)
    assert len(opened("shards", root).train) == sum(COUNTS.values())


def test_both_old_splits_are_withdrawn_before_undivided_ones_are_packed(
    photos, tmp_path, monkeypatch
):
    root = pack(photos, tmp_path / "shards", **DIVIDED)
    shutil.copytree(photos, tmp_path / "tree/train")
    shutil.copytree(photos, tmp_path / "tree/val")
    seen = []

    def stop(task: ShardTask) -> None:
        seen.append((root / "index.json").exists())
        raise DataError("enough")

    monkeypatch.setattr("alexnet_ddp.prepare.command.write_shard", stop)
    with pytest.raises(DataError, match="enough"):
        pack(tmp_path / "tree", root, overwrite=True)
    assert seen == [False]


@pytest.mark.slow
def test_the_command_divides_with_two_processes_as_with_one(photos, tmp_path):
    one = pack(photos, tmp_path / "one", val_fraction=0.3)
    code, _, err = run(
        f"source={photos}", f"root={tmp_path}/two", "val_fraction=0.3", "num_shards=3",
        "engine.workers=2",
    )  # fmt: skip
    assert code == 0, err
    assert hashes(tmp_path / "two") == hashes(one)
