"""Packing data sets of Hugging Face: tables with the bytes of images, which pyarrow writes here."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.config import ConfigError, ShardsConfig
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.prepare import command
from alexnet_ddp.runtime.errors import DataError, Preempted
from tests.packing import act, hashes, pack

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CLASSES = ["dog", "cat"]  # not in alphabetical order
EXACT = {"shorter_side": None, "keep_original": True, "num_shards": 2}


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 10 + seed, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def table(images: list, labels: list, classes: list[str] | None = CLASSES, **more: list):
    """A table in the form of the library `datasets`: images are bytes or None."""
    rows = [None if data is None else {"bytes": data, "path": None} for data in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(rows, struct), "label": pa.array(labels)}
    found = pa.table(columns | {name: pa.array(values) for name, values in more.items()})
    if classes is None:
        return found
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    return found.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def save(content, path: Path, arrow: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not arrow:
        parquet.write_table(content, path, row_group_size=2)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
        stream.write_table(content, max_chunksize=2)


IMAGES = [jpeg(k) for k in range(8)]
LABELS = [0, 1, 1, 0, 0, 1, 0, 1]


def packed_images(root: Path) -> dict[bytes, str]:
    """Image -> class of both splits, as training reads them."""
    data = open_data(ShardsConfig(root=str(root)))
    return {
        index.read(i): index.classes[index.labels[i]]
        for index in (data.train, data.val)
        for i in range(len(index))
    }


LAYOUTS = {
    "hub": ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet"),
    "plain": ("train/a.parquet", "train/b.parquet", "validation/a.parquet"),
    "save_to_disk": ("train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow",
                     "test/data-00000-of-00001.arrow"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_is_packed_with_its_classes(tmp_path, layout, caplog):
    source = tmp_path / "source"
    for path, rows in zip(LAYOUTS[layout], (slice(0, 3), slice(3, 6), slice(6, 8))):
        save(table(IMAGES[rows], LABELS[rows]), source / path, path.endswith(".arrow"))
    with caplog.at_level("INFO"):
        root = pack(source, tmp_path / "shards", **EXACT)
    assert "is packed as val" in caplog.text
    assert open_data(ShardsConfig(root=str(root))).train.classes == CLASSES
    assert packed_images(root) == {
        image: CLASSES[label] for image, label in zip(IMAGES, LABELS, strict=True)
    }
    assert not (root / "_source").exists()
    act("verify", root)


def test_labels_may_be_texts_or_numbers_without_names(tmp_path):
    texts = [CLASSES[label] for label in LABELS]
    found = []
    for k, (labels, classes) in enumerate(((texts, None), (LABELS, None))):
        for split, rows in (("train", slice(0, 6)), ("val", slice(6, 8))):
            content = table(IMAGES[rows], labels[rows], classes)
            save(content, tmp_path / f"source{k}/{split}.parquet")
        root = pack(tmp_path / f"source{k}", tmp_path / f"shards{k}", **EXACT)
        data = open_data(ShardsConfig(root=str(root)))
        found.append(data.train.classes)
        names = dict(zip((0, 1), data.train.classes)) | {name: name for name in CLASSES}
        assert packed_images(root) == dict(zip(IMAGES, (names[label] for label in labels)))
    assert found == [["cat", "dog"], ["class0", "class1"]]


def test_a_stopped_preparation_continues_with_the_same_bytes(tmp_path, monkeypatch):
    source = tmp_path / "source"
    save(table(IMAGES[:6], LABELS[:6]), source / "train.parquet")
    save(table(IMAGES[6:], LABELS[6:]), source / "val.parquet")
    whole = pack(source, tmp_path / "whole", **EXACT)
    with monkeypatch.context() as patch:

        def stop(task):
            raise KeyboardInterrupt

        patch.setattr(command, "write_shard", stop)
        with pytest.raises(Preempted):
            pack(source, tmp_path / "stopped", **EXACT)
    (copy,) = (tmp_path / "stopped/_source").rglob("*.bin")
    assert copy.read_bytes() == b"".join(IMAGES[:6])
    written = copy.stat().st_ino
    seen = []
    real = command.commit

    def commit(plan, tasks):
        seen.append(copy.exists() and copy.stat().st_ino)
        real(plan, tasks)

    monkeypatch.setattr(command, "commit", commit)
    assert hashes(pack(source, tmp_path / "stopped", **EXACT)) == hashes(whole)
    assert seen == [written, False]  # the copy was used again, then removed


def test_a_table_beside_class_folders_is_not_the_data_set(tmp_path):
    for k, (split, name) in enumerate((split, name) for split in ("train", "val") for name in "ab"):
        (tmp_path / f"source/{split}/{name}").mkdir(parents=True)
        (tmp_path / f"source/{split}/{name}/{k}.jpg").write_bytes(IMAGES[k])
        save(pa.table({"file_name": ["x"]}), tmp_path / f"source/{split}/metadata.parquet")
    root = pack(tmp_path / "source", tmp_path / "shards", **EXACT)
    assert packed_images(root) == dict(zip(IMAGES[:4], "abab"))


def test_a_row_without_an_image_is_left_out_and_listed(tmp_path):
    save(table([*IMAGES[:4], None], [*LABELS[:4], 1]), tmp_path / "source/train.parquet")
    root = pack(tmp_path / "source", tmp_path / "shards", split="train", **EXACT)
    lines = (root / "train.quarantine.jsonl").read_text().splitlines()
    assert [(json.loads(line)["name"], json.loads(line)["reason"]) for line in lines] == [
        ("cat/train/00000004", "empty")
    ]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (table([None], [0]), {}, "contains no image in column image; write the data set with the"),
        (table(IMAGES[:1], [-1]), {}, "column label of train has the label -1, and labels must be"),
        (table(IMAGES[:2], [0, None]), {}, "column label of train has rows without a label"),
        (table(IMAGES[:2], ["a", ""]), {}, "column label of train has rows without a label"),
        (table(IMAGES[:1], [0.5]), {}, "has labels of type double, and they must be integers or"),
        (table(IMAGES[:1], [0]).drop_columns("label"), {}, "must have one column of labels, and"),
        (
            table(IMAGES[:1], [0]).rename_columns(["a", "label"]).append_column("b", [IMAGES[:1]]),
            {},
            "must have one column of images, and has a, b (columns: a, label, b); name it image",
        ),
        (b"PAR1, but no more", {}, "train.parquet cannot be read as Parquet ("),
        (table(IMAGES[:1], [0]), {"class_order": "numeric"}, "class_order (numeric) would be ign"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(tmp_path, content, options, message):
    path = tmp_path / "source/train.parquet"
    if isinstance(content, bytes):
        path.parent.mkdir()
        path.write_bytes(content)
    else:
        save(content, path)
    with pytest.raises((DataError, ConfigError)) as error:
        pack(path.parent, tmp_path / "shards", split="train", **EXACT | options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
