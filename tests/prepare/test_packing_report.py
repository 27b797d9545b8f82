"""Actions on finished shards: inspect, verify, stats, diff, sheet."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.config import AlexNet2012AugmentConfig, NoAugmentConfig
from alexnet_ddp.data.picture import draw
from alexnet_ddp.runtime.errors import ConfigError, DataError
from tests.archives import age_tree, extract, make_archives
from tests.packing import act, hashes, pack, run, times


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    base = tmp_path_factory.mktemp("report")
    return extract(make_archives(base / "archives"), base / "tree")


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    """Do not change it."""
    return pack(tree, tmp_path_factory.mktemp("report") / "packed")


@pytest.fixture
def mine(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "mine"))


def said(capsys: pytest.CaptureFixture) -> str:
    return re.sub(r"[│┃ ]+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("action", ["inspect", "verify", "stats", "sheet"])
def test_without_a_commit_every_action_is_refused(action, tmp_path):
    with pytest.raises(
        DataError,
        match=r"index.json does not exist: no shards were committed; finish the preparation",
    ):
        act(action, tmp_path)


def test_inspect_shows_splits_and_recipe(packed, capsys):
    act("inspect", packed)
    out = said(capsys)
    assert "train 48 4 3 0.2 0" in out
    assert "train: shorter_side=256 quality=90 keep_original=True encoding=jpeg\n" in out
    assert "val: 3 to 4 images per shard; written by Pillow" in out


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_reads_everything_and_changes_nothing(mine, capsys):
    shutil.rmtree(mine / "_state")  # not needed
    before = times(mine)
    act("verify", mine)
    assert re.search(
        r": 6 shards, 0.2 MB: every byte is what was written\n", capsys.readouterr().out
    )
    assert times(mine) == before


def spoil_image(root: Path) -> None:
    """One bit of the image of the first name."""
    sample = np.load(root / "train.samples.npy")[0]
    with open(root / f"train-{sample['shard']:06d}.tar", "r+b") as shard:
        shard.seek(int(sample["offset"]) + 30)
        byte = shard.read(1)[0]
        shard.seek(int(sample["offset"]) + 30)
        shard.write(bytes([byte ^ 1]))


BROKEN = {
    "an image": (spoil_image, r"train-00000\d.tar is damaged: n10000000/n10000000_0.JPEG"),
    "a shard cut": (
        lambda root: os.truncate(root / "val-000001.tar", 5000),
        "val-000001.tar is damaged: n1",
    ),
    "a shard gone": (
        lambda root: (root / "val-000001.tar").unlink(),
        "val-000001.tar does not exist",
    ),
    "an idx": (
        lambda root: (root / "val-000001.idx").write_text("v1.2 0\n"),
        "has a damaged val-000001.idx",
    ),
    "names": (
        lambda root: (root / "train.names.txt").write_text(""),
        "train.names.txt is not what was written",
    ),
    "statistics gone": (
        lambda root: (root / "val.stats.json").unlink(),
        "val.stats.json is not what was written",
    ),
    "timm's": (
        lambda root: (root / "_info.json").write_text("{}"),
        "_info.json is not what was written",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_verify_names_the_broken_files(mine, caplog, what):
    spoil, line = BROKEN[what]
    spoil(mine)
    with pytest.raises(
        DataError,
        match=r"mine: .* broken; rerun the command that prepared them to write them again",
    ):
        act("verify", mine)
    assert len(caplog.messages) == 1
    assert re.search(line, caplog.messages[0])


@pytest.mark.slow
def test_verify_exits_65_from_two_processes(mine):
    spoil_image(mine)
    (mine / "val-000000.tar").unlink()
    code, out, err = run("action=verify", f"root={mine}", "engine.workers=2")
    assert (code, out) == (65, "")
    assert len(err.splitlines()) == 3
    assert re.search(
        r"^alexnet_ddp: .*: train-00000\d.tar, val-000000.tar broken; rerun the command",
        err,
        re.MULTILINE,
    )


# --- stats ----------------------------------------------------------------------------------------------------------


def test_stats_show_counts_sizes_colours_and_classes(packed, capsys):
    act("stats", packed)
    out = said(capsys)
    found = json.loads((packed / "train.stats.json").read_bytes())
    assert "images 48 10" in out
    assert "width, pixels 20 to 20, mean 20.0" in out
    assert f"mean RGB {' '.join(f'{x:.4f}' for x in found['mean'])}" in out
    assert "fewest images per class 12 (n10000000) 2 (n1" in out
    assert "across splits: 0 images are in more than one" in out


def test_stats_find_images_of_val_in_train(tree, tmp_path, capsys):
    copy = Path(shutil.copytree(tree, tmp_path / "tree"))
    a, b = sorted((copy / "train").rglob("*.JPEG"))[3:5]
    v = min((copy / "val").rglob("*.JPEG"))
    shutil.copy(a, v)
    shutil.copy(a, b)
    age_tree(copy)
    root = pack(copy, tmp_path / "root")
    act("stats", root)
    out = said(capsys)
    assert (
        f"train: 1 images occur more than once\n {a.parent.name}/{a.name}, {b.parent.name}/{b.name}"
        in out
    )
    assert f"across splits: 1 images are in more than one\n train:{a.parent.name}/{a.name}, " in out
    assert f"val:{v.parent.name}/{v.name}" in out
    shutil.rmtree(next(root.glob("_state/val-*")))
    act("stats", root)
    assert "duplicates across splits: unknown, as val has no sidecars in _state/" in said(capsys)


# --- diff -----------------------------------------------------------------------------------------------------------


def test_diff_of_the_same_shards_is_none(packed, mine, capsys):
    shutil.rmtree(mine / "_state")
    act("diff", packed, other=str(mine))
    assert capsys.readouterr().out == f"{packed} and {mine} are identical, byte for byte\n"


def test_diff_of_a_place_and_itself_is_refused(packed, tmp_path):
    (tmp_path / "link").symlink_to(packed)
    for other in (packed, tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"^other \(.*\) is the same place as root; give"):
            act("diff", packed, other=str(other))


def test_diff_names_recipe_images_shards_and_files(packed, tree, tmp_path, capsys):
    copy = Path(shutil.copytree(tree, tmp_path / "tree"))
    gone = min((copy / "train").rglob("*.JPEG"))
    gone.unlink()
    age_tree(copy)
    other = pack(copy, tmp_path / "other", shorter_side=8, num_shards=2)
    with pytest.raises(DataError, match=r"packed and .*other differ"):
        act("diff", packed, other=str(other))
    lines = capsys.readouterr().out.splitlines()
    assert "train: recipe.shorter_side 256 instead of 8" in lines
    assert "train: num_shards 3 instead of 2" in lines
    assert f"train: only root has {gone.parent.name}/{gone.name}" in lines
    assert "train: shards with other bytes: train-000000.tar, train-000001.tar" in lines
    assert any(line.startswith("train: other bytes in train.names.txt, ") for line in lines)


def test_diff_names_classes_and_splits(packed, tree, tmp_path, capsys):
    copy = Path(shutil.copytree(tree, tmp_path / "tree"))
    name = min(path.name for path in (copy / "train").iterdir())
    shutil.rmtree(copy / "train" / name)
    shutil.rmtree(copy / "val")
    age_tree(copy)
    other = pack(copy, tmp_path / "other")
    with pytest.raises(DataError):
        act("diff", packed, other=str(other))
    out = capsys.readouterr().out
    assert f"classes: only root has {name}" in out
    assert "only root has val" in out


# --- sheet ----------------------------------------------------------------------------------------------------------


def test_the_sheet_shows_what_the_first_epoch_shows(packed, tmp_path, capsys):
    act("sheet", packed, output=str(tmp_path / "a" / "s.png"), image_size=32)
    assert capsys.readouterr().out == f"{tmp_path}/a/s.png\n"
    picture = Image.open(tmp_path / "a" / "s.png")
    assert picture.size == (10 + 8 * 42, 34 + 6 * (32 + 20 + 10))
    act("sheet", packed, output=str(tmp_path / "b.png"), image_size=32)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a/s.png").read_bytes()
    act("sheet", packed, output=str(tmp_path / "c.png"), image_size=32, seed=1)
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("augment", [NoAugmentConfig(), AlexNet2012AugmentConfig()])
def test_the_sheet_of_a_folder_equals_that_of_its_shards(tree, tmp_path, augment):
    """But for the colour noise: before packing, the axes of the colours are not known."""
    root = pack(tree, tmp_path / "root", split="train", shorter_side=None)
    act("sheet", root, augment=augment)
    act("sheet", root, source=str(tree), augment=augment, output=str(tmp_path / "folder.png"))
    one, other = (
        np.asarray(Image.open(path)) for path in (root / "train.sheet.png", tmp_path / "folder.png")
    )
    cells = slice(34, None)
    assert np.array_equal(one[cells], other[cells]) == isinstance(augment, NoAugmentConfig)


def test_a_sheet_of_no_folder_is_refused_with_the_option(tmp_path):
    with pytest.raises(DataError, match=r"^source \(.*nowhere\) is not a folder; give one that co"):
        act("sheet", tmp_path, source=str(tmp_path / "nowhere"))


def test_a_sheet_does_not_change_what_was_committed(packed, mine):
    act("sheet", mine, image_size=16)
    found = hashes(mine)
    assert found.pop("train.sheet.png")
    assert found == hashes(packed)


def test_the_sheet_shows_bad_images_and_long_or_strange_names():
    names = ["a" * 300, "Ω\udcff\n", "", "cat", "cat"]
    page = draw([np.full((40, 40, 3), 9, np.uint8), None, None, None, None], names, "t" * 500)
    assert page.size == (10 + 5 * 50, 34 + 40 + 20 + 10)
    assert page.getpixel((60 + 20, 34 + 30)) == (225, 225, 225)
