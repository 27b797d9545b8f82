"""Shards as others read them: tar, webdataset, timm, DALI, wids; nothing here uses our own readers."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.archives import extract, make_archives
from tests.packing import pack


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    base = tmp_path_factory.mktemp("formats")
    return extract(make_archives(base / "archives"), base / "tree")


@pytest.fixture(scope="module")
def root(tree, tmp_path_factory):
    return pack(tree, tmp_path_factory.mktemp("formats") / "root")


@pytest.fixture(scope="module")
def raw(tree, tmp_path_factory):
    return pack(tree, tmp_path_factory.mktemp("formats") / "raw", encoding="raw", size=24)


def expected(tree: Path, split: str) -> list[tuple[int, bytes]]:
    """(label, bytes as they came) of each image, sorted: small JPEGs are copied."""
    classes = sorted(path.name for path in (tree / split).iterdir())
    return sorted(
        (classes.index(path.parent.name), path.read_bytes())
        for path in (tree / split).rglob("*.JPEG")
    )


def samples(root: Path, split: str, suffix: str = "jpg") -> dict[str, tuple[int, bytes]]:
    """KEY -> (label, bytes), by Python's own tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(root.glob(f"{split}-*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                key, kind = member.name.split(".")
                found.setdefault(key, {})[kind] = shard.extractfile(member).read()
    return {key: (int(parts["cls"]), parts[suffix]) for key, parts in found.items()}


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_images_and_labels_are_in_the_tars(root, tree, split):
    found = samples(root, split)
    assert sorted(found.values()) == expected(tree, split)
    assert list(found) == [f"{k:09d}" for k in range(len(found))]


def test_the_systems_tar_lists_and_checks_them(root):
    for path in root.glob("*.tar"):
        listed = subprocess.run(
            ["tar", "--numeric-owner", "-tvf", path], capture_output=True, text=True, check=True
        )
        assert listed.stderr == ""
        for line in listed.stdout.splitlines():
            assert line.startswith("-r--r--r-- 0/0 ")
            assert "1970-01-01 00:00" in line
        assert path.stat().st_size % 10_240 == 0


def test_members_are_plain_ustar_files(root):
    with tarfile.open(next(root.glob("train-*.tar"))) as shard:
        for member in shard:
            assert (member.mode, member.uid, member.gid, member.mtime, member.type) == (
                0o444,
                0,
                0,
                0,
                tarfile.REGTYPE,
            )
            assert not member.pax_headers


def test_dalis_index_points_at_the_bytes(root, raw):
    for place, suffix in ((root, "jpg"), (raw, "npy")):
        for idx in place.glob("*.idx"):
            with tarfile.open(idx.with_suffix(".tar")) as shard:
                members = {m.name: (m.offset_data, m.size) for m in shard}
            head, *lines = idx.read_text().splitlines()
            assert head == f"v1.2 {len(members) // 2}"
            assert len(lines) == len(members) // 2
            for line in lines:
                kinds = line.split(" ")
                assert (kinds[0], kinds[4]) == ("cls", suffix)
                for at in (0, 4):
                    kind, offset, size, name = kinds[at : at + 4]
                    assert members.pop(name) == (int(offset), int(size))
                    assert name.endswith(f".{kind}")
            assert not members


def test_timms_info_and_wids_list_every_shard(root):
    info = json.loads((root / "_info.json").read_bytes())["splits"]
    for split, count in (("train", 48), ("val", 10)):
        names = sorted(path.name for path in root.glob(f"{split}-*.tar"))
        assert info[split]["filenames"] == names
        assert info[split]["num_samples"] == sum(info[split]["shard_lengths"]) == count
        assert info[split]["name"] == split
        wids = json.loads((root / f"{split}.wids.json").read_bytes())
        assert (wids["__kind__"], wids["wids_version"]) == ("wids-shard-index-v1", 1)
        assert [(s["url"], s["nsamples"]) for s in wids["shardlist"]] == list(
            zip(names, info[split]["shard_lengths"])
        )


def test_the_webdataset_library_reads_all_samples_with_their_labels(root, tree):
    wds = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(root.glob("train-*.tar"))]
    found = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).to_tuple("cls", "jpg"))
    assert sorted((int(label), data) for label, data in found) == expected(tree, "train")
    decoded = (
        wds.WebDataset(urls, shardshuffle=False, empty_check=False)
        .decode("pil")
        .to_tuple("jpg", "cls")
    )
    image, label = next(iter(decoded))
    assert isinstance(label, int)
    assert image.size == (20, 16)


def test_raw_images_are_npy_files_with_a_header_of_128_bytes(raw):
    for _, data in samples(raw, "train", "npy").values():
        assert len(data) == 128 + 24 * 24 * 3
        assert np.array_equal(
            np.load(io.BytesIO(data)), np.frombuffer(data[128:], np.uint8).reshape(24, 24, 3)
        )


def test_the_samples_index_finds_each_image(root):
    with open(root / "train.samples.npy", "rb") as file:
        index = np.load(file)
    names = (root / "train.names.txt").read_text().splitlines()
    assert index.dtype.itemsize == 28
    keys = samples(root, "train")
    by_bytes = {data: label for label, data in keys.values()}
    for sample, name in zip(index, names):
        with open(root / f"train-{sample['shard']:06d}.tar", "rb") as shard:
            shard.seek(int(sample["offset"]))
            data = shard.read(int(sample["size"]))
        assert by_bytes[data] == sample["label"]
        assert Image.open(io.BytesIO(data)).size == (sample["width"], sample["height"])
        assert name.endswith(".JPEG")


def test_foreign_webdataset_tars_are_a_source(root, tmp_path):
    """As another writer makes them: other members beside, keys in folders, several suffixes."""
    source = tmp_path / "foreign"
    source.mkdir()
    images = [data for _, data in samples(root, "train").values()][:6]
    for name, part in (("train-a.tar", range(4)), ("train-b.tar", range(4, 6))):
        with tarfile.open(source / name, "w") as shard:
            for k in part:
                parts = {
                    "jpg": images[k],
                    "json": b"{}",
                    "seg.png": b"mask",
                    "cls": b"%d\n" % (k % 2),
                }
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"sub/{k:04d}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    out = pack(source, tmp_path / "out", split="train", num_shards=2)
    assert sorted(samples(out, "train").values()) == sorted(
        (k % 2, data) for k, data in enumerate(images)
    )
    names = (out / "train.names.txt").read_text().splitlines()
    assert names[0] == "class0/train-a/sub/0000.jpg"
    assert json.loads((out / "index.json").read_bytes())["classes"] == ["class0", "class1"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x"}, "contains a without both an image and a label; fix or remove the tar"),
        (
            {"a.jpg": b"x", "a.cls": b"cat"},
            "a.cls must contain the label as a number below 1,000,000, got b'cat'",
        ),
        ({"a.txt": b"x"}, "contains no pair of KEY.cls and an image; it is not a WebDataset tar"),
    ],
)
def test_tars_that_are_no_webdataset_are_explained(tmp_path, members, message):
    from alexnet_ddp.runtime.errors import DataError
    from tests.archives import tar, write

    (tmp_path / "source").mkdir()
    write(tmp_path / "source/train-0.tar", tar(members))
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "source", tmp_path / "out", split="train", num_shards=1)


def test_raw_shards_are_not_packed_again(raw, tmp_path):
    from alexnet_ddp.runtime.errors import DataError

    with pytest.raises(
        DataError,
        match="contains raw pixels, which cannot be packed again; give the source of these",
    ):
        pack(raw, tmp_path / "out")
