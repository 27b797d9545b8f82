"""data=csv: images that are listed with their labels in a CSV, TSV or Parquet file."""

import os
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from alexnet_ddp.cli import compose
from alexnet_ddp.config import ConfigError
from alexnet_ddp.data.sources.index import FileStore, SampleIndex
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.runtime.errors import DataError

WITH_SPLIT = """path,label,split
b/2.jpg,dog,train
b/1.jpg,dog,val
a/1.jpg,"cat, small",train
a/2.jpg,"cat, small",val
a/3.jpg,"cat, small",train
"""


def table(folder: Path, text: str, name: str = "labels.csv") -> Path:
    """Write the table, and a file for each path that it lists."""
    for line in text.splitlines()[1:]:
        path = folder / line.partition("\t" if name.endswith("tsv") else ",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line)
    (folder / name).write_text(text, encoding="utf-8-sig")
    return folder / name


def opened(file: Path, *overrides: str, trained: list[str] | None = None) -> ImageSets:
    return open_data(compose(["data=csv", f"data.root={file}", *overrides]).data, trained=trained)


def content(index: SampleIndex) -> list[tuple[str, str]]:
    assert isinstance(index.store, FileStore)
    return [(index.store.path(i), index.classes[label]) for i, label in enumerate(index.labels)]


def test_the_column_split_divides_the_images_which_are_sorted_by_label_and_path(tmp_path):
    data = opened(table(tmp_path, WITH_SPLIT))
    assert data.class_names == ["cat, small", "dog"]
    assert content(data.train) == [
        ("a/1.jpg", "cat, small"),
        ("a/3.jpg", "cat, small"),
        ("b/2.jpg", "dog"),
    ]
    assert content(data.val) == [("a/2.jpg", "cat, small"), ("b/1.jpg", "dog")]
    assert data.train.read(2) == b"b/2.jpg,dog,train"


def test_other_columns_a_tab_and_another_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    text = "id\tfile\tclass\n" + "".join(f"{i}\t{i}.jpg\t{i % 3}\n" for i in range(30))
    for i in range(30):
        (tmp_path / f"images/{i}.jpg").write_text(f"{i}")
    file = tmp_path / "labels.tsv"
    file.write_text(text)
    columns = ["data.path_column=file", "data.label_column=class"]
    places = [f"data.images={tmp_path}/images", "data.fold=1/5"]
    data = opened(file, *columns, *places, "data.class_order=numeric")
    assert (len(data.train), len(data.val), data.class_names) == (24, 6, ["0", "1", "2"])
    assert all(int(path[:-4]) % 3 == int(name) for path, name in content(data.train))
    other = opened(file, *columns, places[0], "data.fold=2/5", trained=["2", "0", "1"])
    assert other.class_names == ["2", "0", "1"]
    assert not set(content(other.val)) & set(content(data.val))


def test_a_parquet_file_is_the_same_data(tmp_path):
    data = opened(table(tmp_path, WITH_SPLIT))
    split = {"path": [], "label": [], "split": []}
    for index, name in ((data.train, "train"), (data.val, "val")):
        for path, label in content(index):
            for column, value in zip(split.values(), (path, label, name)):
                column.append(value)
    columns = {"number": list(range(5)), **split}
    parquet.write_table(pyarrow.table(columns), tmp_path / "labels.parquet")
    same = opened(tmp_path / "labels.parquet")
    assert same.train.fingerprint() == data.train.fingerprint()
    assert same.val.fingerprint() == data.val.fingerprint()


def test_a_change_of_the_table_or_of_an_image_is_seen_and_is_other_data(tmp_path):
    file = table(tmp_path, WITH_SPLIT)
    for path in (file, *tmp_path.rglob("*.jpg")):
        os.utime(path, (1, 1))  # old enough for the cache
    first = opened(file).train.fingerprint()
    assert opened(file).train.fingerprint() == first
    (tmp_path / "a/1.jpg").write_text("another size")
    second = opened(file).train.fingerprint()
    table(
        tmp_path,
        WITH_SPLIT.replace("b/2.jpg,dog", "b/2.jpg,wolf").replace("1.jpg,dog", "1.jpg,wolf"),
    )
    assert len({first, second, opened(file).train.fingerprint()}) == 3


def test_rows_of_neither_set_are_counted_and_a_missing_file_is_a_bad_image(tmp_path, caplog):
    file = table(tmp_path, WITH_SPLIT + "c/1.jpg,dog,test\nc/2.jpg,dog,test\n")
    (tmp_path / "a/1.jpg").unlink()
    data = opened(file)
    assert (len(data.train), len(data.val)) == (3, 2)
    assert f"{file}: only rows with train or val in split are used, not 2 of 'test'" in caplog.text
    with pytest.raises(DataError, match=r"a/1\.jpg cannot be read"):
        data.train.read(0)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("", [], "has no column path, it is empty; give data.path_column=NAME"),
        ("path,label\n", ["data.fold=1/2"], "lists no images to use"),
        ("file,label\na,b\n", [], "has no column path, it has file, label"),
        ("path,class\na,b\n", [], "has no column label, it has path, class"),
        ("path,label\na,b\n", [], "has no column split; add one with train and val, or give data."),
        (WITH_SPLIT, ["data.val_fraction=0.2"], "has a column split; leave data.val_fraction and"),
        ("path,label\na,b\na,c\n", ["data.fold=1/2"], "lines 2 and 3 are both of a; remove one"),
        ("path,label\na,\n", ["data.fold=1/2"], "line 2 has no label; complete the line"),
        ("path,label\na,b,c\n", ["data.fold=1/2"], "line 2 has 3 values for 2 columns; quote"),
        ('path,label\na,"b\n', ["data.fold=1/2"], "line 2 is not CSV (unexpected end of data)"),
        (WITH_SPLIT.replace("val", "train"), [], "has no validation images; add rows with val"),
        (WITH_SPLIT.replace("2.jpg,dog,train", "2.jpg,dog,val"), [], "no training images of dog"),
        (WITH_SPLIT, ["data.images=/nowhere"], "such as /nowhere/a/1.jpg; give data.images=DIR"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, text, overrides, words):
    file = table(tmp_path, text)
    with pytest.raises(DataError) as caught:
        opened(file, *overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is not a file; give a CSV, TSV or Parquet file"):
        opened(tmp_path, "data.fold=1/2")
    (tmp_path / "bad.parquet").write_text("path,label")
    with pytest.raises(DataError, match="is not a Parquet file"):
        opened(tmp_path / "bad.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs pyarrow, which is missing; pip install"):
        opened(tmp_path / "bad.parquet")


def test_a_table_of_a_folder_is_the_same_data_in_the_same_order(image_folder, tmp_path):
    lines = [
        f"{path.relative_to(image_folder)},{path.parent.name},{split}"
        for split in ("train", "val")
        for path in (image_folder / split).rglob("*.jpg")
    ]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["path,label,split", *lines]))
    data = opened(file, f"data.images={image_folder}")
    same = open_data(compose(["data=folder", f"data.root={image_folder}"]).data)
    for split in ("train", "val"):
        ours, theirs = getattr(data, split), getattr(same, split)
        assert [(path.removeprefix(f"{split}/"), name) for path, name in content(ours)] == content(
            theirs
        )
        assert ours.classes == theirs.classes
        assert ours.read(7) == theirs.read(7)
