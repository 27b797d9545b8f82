"""ImageNet's archives, read in place: the same images, labels and order as the tree extracted from them."""

import gzip
import os
import re
import tarfile
from pathlib import Path

import pytest

from alexnet_ddp.data.sources import tars
from alexnet_ddp.data.sources.imagenet import DEVKIT, TRAIN, VAL, open_imagenet, read_devkit
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.runtime.errors import DataError
from tests.archives import (
    META,
    age,
    extract,
    jpeg,
    lay_out,
    make_archives,
    meta_mat,
    tar,
    val_wnids,
    write,
    write_devkit,
)

MINI = Path(__file__).resolve().parents[4] / "shared" / "data" / "ilsvrc-mini"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return make_archives(tmp_path / "archives")


def file_names(index: SampleIndex) -> list[str]:
    return [re.split("[/:]", index.name(i))[-1] for i in range(len(index))]


def contents(index: SampleIndex) -> list[bytes]:
    return [index.read(i) for i in range(len(index))]


def check_against_tarfile(root: Path) -> None:
    """Names, labels, bytes and order, compared with what tarfile and scipy say."""
    train, val, _ = open_imagenet(root)
    expected = []
    with tarfile.open(root / TRAIN) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                expected += [
                    (Path(member.name).stem, m.name, inner.extractfile(m).read()) for m in inner
                ]
    assert [
        (train.classes[k], *x) for k, *x in zip(train.labels, file_names(train), contents(train))
    ] == sorted(expected)
    wnids = val_wnids(root)
    with tarfile.open(root / VAL) as flat:
        expected = [
            (wnids[int(m.name[15:23]) - 1], m.name, flat.extractfile(m).read()) for m in flat
        ]
    assert [
        (val.classes[k], *x) for k, *x in zip(val.labels, file_names(val), contents(val))
    ] == sorted(expected)
    assert train.classes == val.classes == sorted(train.classes)


def check_against_folders(root: Path, out: Path) -> None:
    """The extracted tree is the same data set."""
    extract(root, out)
    for one, other in zip(open_imagenet(root)[:2], open_imagenet(out)[:2]):
        assert one.classes == other.classes
        assert one.labels.tolist() == other.labels.tolist()
        assert file_names(one) == file_names(other)
        assert contents(one) == contents(other)
        assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("classes", "per_class", "num_val"), [(4, 12, 10), (30, 3, 100), (1, 1, 1)]
)
def test_archives_hold_what_tarfile_and_scipy_say(tmp_path, classes, per_class, num_val):
    check_against_tarfile(make_archives(tmp_path, classes, per_class, num_val))


def test_folders_extracted_from_archives_are_the_same_data(root, tmp_path):
    check_against_folders(root, tmp_path / "tree")


@pytest.mark.slow
@pytest.mark.skipif(not MINI.is_dir(), reason="needs shared/data/ilsvrc-mini")
def test_twenty_real_classes_in_the_archives_of_imagenet(tmp_path):
    check_against_tarfile(MINI)
    check_against_folders(MINI, tmp_path / "tree")
    train, val, names = open_imagenet(MINI)
    assert (len(train), len(val), len(names)) == (10_000, 1_000, 20)
    assert names[0] == "goldfish, Carassius auratus"


def test_names_are_the_devkits_words_and_without_it_the_ids(root, tmp_path):
    train, _, names = open_imagenet(root)
    assert names == [f"thing {wnid}, {wnid} thing" for wnid in train.classes]
    tree = extract(root, tmp_path / "tree")
    assert open_imagenet(tree)[2] == train.classes
    os.link(root / DEVKIT, tree / DEVKIT)
    assert open_imagenet(tree)[2] == names


def test_each_split_comes_from_its_archive_or_else_from_its_folder(root, tmp_path):
    whole = open_imagenet(root)
    tree = extract(root, tmp_path / "tree")
    os.link(root / VAL, tree / VAL)
    assert f"{tree}/val/" in open_imagenet(tree)[1].name(0)  # no labels without the devkit
    os.link(root / DEVKIT, tree / DEVKIT)
    train, val, names = open_imagenet(tree)
    assert (f"{tree}/train/" in train.name(0), VAL in val.name(0)) == (True, True)
    assert [i.fingerprint() for i in (train, val)] == [i.fingerprint() for i in whole[:2]]
    assert names == whole[2]
    os.link(root / TRAIN, tree / TRAIN)
    assert TRAIN in open_imagenet(tree)[0].name(0)


@pytest.mark.parametrize(
    ("gone", "lacks"),
    [
        ((TRAIN,), TRAIN),
        ((VAL, DEVKIT), f"{VAL}, {DEVKIT}"),
        ((DEVKIT,), DEVKIT),
        ((TRAIN, VAL), f"{TRAIN}, {VAL}"),
    ],
)
def test_missing_archives_are_named(root, gone, lacks):
    for name in gone:
        (root / name).unlink()
    with pytest.raises(
        DataError,
        match=re.escape(f"({root}) lacks {lacks}; put them there as distributed, or arrange"),
    ):
        open_imagenet(root)


def test_a_missing_root_and_a_flat_val_are_explained(root, tmp_path):
    with pytest.raises(
        DataError, match=r"is not a folder; give the one that contains ILSVRC2012_img_train.tar, "
    ):
        open_imagenet(tmp_path / "nowhere")
    (root / VAL).unlink()
    lay_out(root, "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(
        DataError,
        match=r"1 images but no class folders; keep ILSVRC2012_img_val.tar and .* in place",
    ):
        open_imagenet(root)


def test_the_second_start_reads_no_header_until_size_or_mtime_change(root, monkeypatch):
    first = open_imagenet(root)
    walked, header = [], tars._header
    monkeypatch.setattr(
        tars, "_header", lambda fd, path, *at: walked.append(path.name) or header(fd, path, *at)
    )
    second = open_imagenet(root)
    assert not walked
    assert [contents(i) for i in second[:2]] == [contents(i) for i in first[:2]]
    age(root / VAL, seconds=1800)
    open_imagenet(root)
    assert set(walked) == {VAL}
    (root / TRAIN).write_bytes((root / TRAIN).read_bytes() + bytes(512))
    age(root / TRAIN)
    open_imagenet(root)
    assert set(walked) == {VAL, TRAIN}


@pytest.mark.parametrize("size", [0, 100, 512, 700, 20_000, 30_720, 40_000])
def test_a_train_archive_cut_short_names_the_file_and_the_place(root, size):
    os.truncate(root / TRAIN, size)
    with pytest.raises(
        DataError, match=r"img_train.tar is cut short .*at byte [\d,]+; compare its size and MD5"
    ) as caught:
        open_imagenet(root)
    assert int(str(caught.value).split("byte ")[1].split(";")[0].replace(",", "")) <= size


def test_a_class_archive_cut_short_inside_a_whole_archive_is_noticed(root):
    whole = tar({f"x_{j}.JPEG": jpeg(0, j) for j in range(4)})
    second = whole.index(b"x_1.JPEG")
    for cut, what in (
        (second, "is cut short"),
        (second - 400, "is cut short in the file that begins"),
    ):
        write(root / TRAIN, tar({"n1.tar": whole[:cut], "n2.tar": whole}))
        with pytest.raises(DataError, match=rf"{what} at byte [\d,]+;"):
            open_imagenet(root)


def test_a_damaged_header_is_noticed(root):
    data = bytearray((root / TRAIN).read_bytes())
    data[512 + 130] ^= 1
    write(root / TRAIN, bytes(data))
    with pytest.raises(DataError, match=r"img_train.tar holds no valid tar header at byte 512;"):
        open_imagenet(root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b"x"}, "must contain one .tar for each class, got none; copy it again"),
        (
            {"a/n1.tar": tar({"x.JPEG": b"x"}), "n1.tar": tar({"x.JPEG": b"x"})},
            "one .tar for each class, got n1, n1;",
        ),
        (
            {"n1.tar": tar({"x.txt": b"x"}), "n2.tar": tar({"x.JPEG": b"x"})},
            "contains no images of n1; copy it again",
        ),
        (
            {"n1.tar": tar({"a/x.JPEG": b"x", "x.JPEG": b"y"})},
            "img_train.tar:n1.tar contains x.JPEG twice; copy it again",
        ),
    ],
)
def test_train_archives_that_are_not_imagenets_are_refused(root, files, message):
    write(root / TRAIN, tar(files))
    with pytest.raises(DataError, match=message):
        open_imagenet(root)


def test_classes_of_devkit_and_archive_must_be_the_same(root):
    write_devkit(root / DEVKIT, meta_mat(["n10000000", "n10007919", "n10015838", "n3"]), [1] * 10)
    expected = f"only {DEVKIT} has n3; only the training set has n10023757; take all files of {root} from one release"
    with pytest.raises(DataError, match=re.escape(expected)):
        open_imagenet(root)


def test_labels_and_validation_images_must_fit(root):
    wnids, meta = open_imagenet(root)[0].classes, meta_mat(open_imagenet(root)[0].classes)
    assert read_devkit(root / DEVKIT).wnids.keys() == {1, 2, 3, 4}
    write_devkit(root / DEVKIT, meta, [1, 2, 3, 4])
    with pytest.raises(
        DataError,
        match=r"the 10 images of .*val.tar must be numbered 1 to 4, as many as .* has labels",
    ):
        open_imagenet(root)
    write_devkit(root / DEVKIT, meta, [1, 2, 5, 77, 4, 1, 1, 1, 1, 1])  # 5 is the inner node
    with pytest.raises(
        DataError, match=r"labels images with ids it has no class for \(5, 77\); copy it again"
    ):
        open_imagenet(root)
    write_devkit(root / DEVKIT, meta, [len(wnids)])
    write(root / VAL, tar({"ILSVRC2012_val_1.JPEG": b"x"}))
    with pytest.raises(
        DataError,
        match=r"contains ILSVRC2012_val_1.JPEG; images must be named ILSVRC2012_val_00000001",
    ):
        open_imagenet(root)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (gzip.compress(b"x" * 999), "cannot be read"),
        (tar({META: b"MATLAB"}, "w:gz"), "cannot be read"),
        (tar({"a/b": b""}, "w:gz"), "lacks 'data/meta.mat'; copy it again"),
        (
            tar({META: meta_mat(["n1"])}, "w:gz"),
            "lacks 'data/ILSVRC2012_validation_ground_truth.txt'; copy it again",
        ),
        (tar({META: meta_mat(["n1"])}, "w:gz")[:-50], "cannot be read"),
        (
            tar({META: meta_mat(["n1"])}, "w:gz")[:-8] + bytes(8),
            r"cannot be read \(CRC check failed",
        ),
    ],
    ids=["empty", "no tar", "no meta.mat inside", "no meta.mat", "no ground truth", "cut", "CRC"],
)
def test_a_damaged_devkit_is_named_in_one_line(root, data, message):
    write(root / DEVKIT, data)
    with pytest.raises(DataError, match=rf"{DEVKIT} {message}") as caught:
        open_imagenet(root)
    assert "\n" not in str(caught.value)


def test_names_in_archives_never_become_paths_and_other_files_are_reported(root, tmp_path, caplog):
    plain = {"./evil.JPEG": jpeg(0, 0), "etc/b.JPEG": jpeg(0, 1), "._x.JPEG": b"", "list.txt": b"x"}
    classes = open_imagenet(root)[0].classes
    write(root / TRAIN, tar({"._n0.tar": b"x"} | {f"{wnid}.tar": tar(plain) for wnid in classes}))
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    assert contents(open_imagenet(root)[0])[:2] == [jpeg(0, 1), jpeg(0, 0)]
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before
    assert "ignored 5 entries (hidden)" in caplog.text
    assert "ignored 4 entries (other types)" in caplog.text


@pytest.mark.parametrize("name", [TRAIN, VAL])
@pytest.mark.parametrize("in_place", [True, False])
def test_an_archive_with_the_size_and_time_of_another_is_scanned_again(
    root, tmp_path, name, in_place
):
    first = open_imagenet(root)
    path, other = root / name, tmp_path / "other.tar"
    status, data = path.stat(), bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmembers()[0].offset_data if name == TRAIN else 0  # the header of an image
    header = tarfile.TarInfo.frombuf(bytes(data[at : at + 512]), "utf-8", "strict")
    header.size -= 1
    data[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    (path if in_place else other).write_bytes(data)
    if not in_place:
        os.replace(other, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    second = open_imagenet(root)
    k = [TRAIN, VAL].index(name)
    assert second[k].fingerprint() != first[k].fingerprint()
    assert second[1 - k].fingerprint() == first[1 - k].fingerprint()
