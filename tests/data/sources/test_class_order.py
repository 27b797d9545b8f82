"""Class names: the order of the labels, and names that only look the same."""

import json
import logging
import shutil
import unicodedata
from pathlib import Path

import pytest

from alexnet_ddp.config import ConfigError, FolderConfig, ImageNetConfig, ShardsConfig
from alexnet_ddp.data.sources.classes import class_difference
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.runtime.errors import DataError
from tests.archives import extract, lay_out, make_archives
from tests.packing import act, pack
from tests.test_train import SMALL, run

NUMBERS = ["1", "2", "10", "11"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbered(root: Path, classes: list[str] = NUMBERS) -> Path:
    return lay_out(
        root,
        *(
            f"{split}/{name}/{i}.jpg"
            for split in ("train", "val")
            for name in classes
            for i in "ab"
        ),
    )


def stated(root: Path, *lines: str) -> str:
    (root / "order.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(root / "order.txt")


def labelled(sets: ImageSets) -> list[tuple[int, str]]:
    """(label, CLASS/FILE) of each training image."""
    names = ["/".join(sets.train.name(i).split("/")[-2:]) for i in range(len(sets.train))]
    return list(zip(sets.train.labels.tolist(), names))


def test_numbers_are_sorted_as_text_with_a_warning_or_by_value_without(tmp_path, caplog):
    root = str(numbered(tmp_path / "data"))
    by_name = open_data(FolderConfig(root=root))
    assert by_name.train.classes == by_name.class_names == ["1", "10", "11", "2"]
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith(
        "class names are whole numbers and are sorted as text: label 1 is class 10, by value it would"
    )
    assert "data.class_order=numeric" in said
    caplog.clear()
    by_value = open_data(FolderConfig(root=root, class_order="numeric"))
    assert by_value.train.classes == by_value.val.classes == by_value.class_names == NUMBERS
    assert labelled(by_value) == [
        (k, f"{name}/{i}.jpg") for k, name in enumerate(NUMBERS) for i in "ab"
    ]
    assert not caplog.records
    assert by_name.train.fingerprint() != by_value.train.fingerprint()
    again = open_data(FolderConfig(root=root))  # from the cache, which keeps both orders apart
    assert again.train.fingerprint() == by_name.train.fingerprint()


@pytest.mark.parametrize("names", [["01", "02", "10"], ["0", "1", "9"], ["a1", "a10", "a2"]])
def test_there_is_no_warning_if_the_orders_agree_or_names_are_no_numbers(tmp_path, caplog, names):
    assert (
        open_data(FolderConfig(root=str(numbered(tmp_path / "data", names)))).train.classes == names
    )
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["1", "2", "cat", "dog"],
            r"class_order=numeric needs class names that are whole numbers, .* has cat, dog; use",
        ),
        (
            ["1", "01", "2"],
            r"/train has 01, 1, which are the same number; rename or merge these classes",
        ),
    ],
)
def test_numeric_order_needs_different_numbers(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        open_data(FolderConfig(root=str(numbered(tmp_path / "data", names)), class_order="numeric"))


def test_a_file_states_the_order(tmp_path):
    cfg = FolderConfig(
        root=str(numbered(tmp_path / "data")), class_order=stated(tmp_path, "10", "2", "1", "11")
    )
    assert open_data(cfg).train.classes == open_data(cfg).val.classes == ["10", "2", "1", "11"]
    assert labelled(open_data(cfg))[:2] == [(0, "10/a.jpg"), (0, "10/b.jpg")]
    (tmp_path / "order.txt").write_bytes("\ufeff11\r\n1\r\n2\r\n10".encode())
    assert open_data(cfg).train.classes == ["11", "1", "2", "10"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["1", "2", "10"],
            r"order.txt does not fit: only .*/data/train has 11; list exactly the classes of",
        ),
        (
            ["1", "2", "10", "11", "12"],
            r"order.txt does not fit: only .*order.txt has 12; list exactly the classes",
        ),
        (["1", "2", "10", "11", "1"], r"order.txt lists 1 more than once; list each class once"),
    ],
)
def test_a_file_that_does_not_list_the_classes_is_refused(tmp_path, lines, message):
    cfg = FolderConfig(root=str(numbered(tmp_path / "data")), class_order=stated(tmp_path, *lines))
    with pytest.raises(DataError, match=message):
        open_data(cfg)


def test_a_file_that_is_not_there_is_a_configuration_error(tmp_path):
    cfg = FolderConfig(root=str(numbered(tmp_path / "data")), class_order="no/such.txt")
    with pytest.raises(
        ConfigError,
        match=r"class_order \(no/such.txt\) must be name, numeric or the path of .*No such",
    ):
        open_data(cfg)


def test_an_evaluation_uses_the_order_of_the_run_without_the_file(tmp_path):
    root = str(numbered(tmp_path / "data"))
    order = ["10", "2", "1", "11"]
    assert (
        open_data(FolderConfig(root=root, class_order="gone.txt"), trained=order).val.classes
        == order
    )
    other = open_data(FolderConfig(root=root, class_order="gone.txt"), trained=["1", "2", "3"])
    assert other.val.classes == sorted(NUMBERS)  # evaluate compares them


def test_the_order_of_a_run_does_not_hide_that_a_stated_order_does_not_fit(tmp_path):
    root = str(numbered(tmp_path / "data"))
    order = ["10", "2", "1", "12"]
    open_data(FolderConfig(root=root), trained=order)  # cached, sorted by name
    open_data(FolderConfig(root=root, class_order="gone.txt"), trained=order)
    with pytest.raises(DataError, match="does not fit"):
        open_data(FolderConfig(root=root, class_order=stated(tmp_path, *order)))


def test_archives_folders_and_shards_in_a_stated_order_are_the_same_data(tmp_path):
    archives = make_archives(tmp_path / "archives")
    tree, wnids = (
        extract(archives, tmp_path / "tree"),
        open_data(ImageNetConfig(root=str(archives))).train.classes,
    )
    order = stated(tmp_path, *reversed(wnids))
    exact = {"shorter_side": None, "class_order": order}
    sets = [
        open_data(ImageNetConfig(root=str(root), class_order=order)) for root in (archives, tree)
    ]
    sets += [open_data(FolderConfig(root=str(tree), class_order=order))]
    for name, source in (("a", archives), ("b", tree)):
        sets.append(open_data(ShardsConfig(root=str(pack(source, tmp_path / name, **exact)))))
    for split in ("train", "val"):
        of = [getattr(one, split) for one in sets]
        assert len({index.fingerprint() for index in of}) == 1
        assert all(index.classes == wnids[::-1] for index in of)
        assert [of[0].read(i) for i in range(10)] == [of[-1].read(i) for i in range(10)]


def test_prepare_refuses_an_order_that_would_be_ignored(tmp_path, image_folder):
    order = stated(tmp_path, *(f"class{k}" for k in range(5)))
    shards = pack(image_folder, tmp_path / "shards")
    with pytest.raises(
        ConfigError,
        match=r"would be ignored: the shards of source \(.*\) contain the labels; leave it out",
    ):
        pack(shards, tmp_path / "again", class_order=order)
    with pytest.raises(ConfigError, match=r"class_order \(numeric\) is not read by action=stats"):
        act("stats", shards, class_order="numeric")


def test_prepare_adds_no_split_in_another_order(tmp_path, image_folder):
    shards = pack(image_folder, tmp_path / "shards", split="train")
    order = stated(tmp_path, *(f"class{k}" for k in (1, 0, 2, 3, 4)))
    with pytest.raises(
        DataError,
        match="contains train shards of another class order; give another root, or the class_order",
    ):
        pack(image_folder, shards, split="val", class_order=order)


CAFE = "caf\u00e9"


def test_names_that_differ_only_in_their_unicode_form_are_said_to():
    nfd = unicodedata.normalize("NFD", CAFE)
    found = class_difference("train", [CAFE, "bar"], "val", [nfd, "bar"], "add or remove them")
    assert found.startswith(
        f"{CAFE} of train and of val differ only in Unicode normalisation (NFC in train, NFD in val);"
    )
    assert "rename the folders of one of them, for example with convmv" in found
    assert "add or remove" not in found
    found = class_difference("train", [CAFE, "pub"], "val", [nfd, "bar"], "add or remove them")
    assert found.startswith("only train has pub; only val has bar; add or remove them; ")
    assert class_difference("train", [CAFE], "val", [CAFE]) == ""


def test_each_comparison_of_class_names_knows_unicode_forms(tmp_path, caplog):
    nfd = unicodedata.normalize("NFD", CAFE)
    root = lay_out(tmp_path / "data", f"train/{CAFE}/1.jpg", f"val/{nfd}/1.jpg")
    message = r"must have the same classes, but .* differ only in Unicode normalisation \(NFC in train, NFD in val\)"
    with pytest.raises(DataError, match=message):
        open_data(FolderConfig(root=str(root)))
    with pytest.raises(DataError, match=message):
        pack(root, tmp_path / "shards", num_shards=1)
    with pytest.raises(
        DataError,
        match=r"does not fit: .* differ only in Unicode normalisation \(NFD in .*order.txt",
    ):
        open_data(FolderConfig(root=str(root), class_order=stated(tmp_path, nfd)))
    lay_out(root, f"train/{nfd}/1.jpg", f"val/{CAFE}/1.jpg")
    caplog.clear()
    open_data(FolderConfig(root=str(root)))
    assert f"several classes are named {CAFE}, in different Unicode forms" in caplog.text


@pytest.mark.slow
def test_a_run_keeps_its_class_order_and_refuses_other_images_of_the_same_count(
    tmp_path, image_folder
):
    root, classes = (
        Path(shutil.copytree(image_folder, tmp_path / "data")),
        [f"class{k}" for k in (3, 1, 4, 0, 2)],
    )
    stated(tmp_path, *classes)
    common = ["data=folder", "data.root=data", "run.name=a", *SMALL[2:], "data.image_size=64"]
    common += ["trainer.global_batch_size=24", "data.class_order=order.txt"]
    done = run("train", *common, "trainer.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "runs/a/classes.json").read_bytes())["ids"] == classes
    (tmp_path / "order.txt").unlink()
    done = run("evaluate", "run.name=a", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (
        list(json.loads((tmp_path / "runs/a/evaluation.json").read_bytes())["per_class"]) == classes
    )
    stated(tmp_path, *sorted(classes))
    done = run("train", *common, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 64, done.stdout
    stated(tmp_path, *classes)
    some = sorted((root / "train/class1").iterdir())[0]
    some.write_bytes(sorted((root / "train/class1").iterdir())[1].read_bytes())
    done = run("train", *common, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 64, done.stdout
    assert "was started as another run" in done.stdout
    done = run("train", *common, "trainer.max_steps=2", "resume.allow_changes=true", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
