"""The index of images: its order, its size, and what it says about folders that are not as they should be."""

import os
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from alexnet_ddp.data.sources import tars
from alexnet_ddp.data.sources.index import FileStore, SampleIndex, check_same_classes, index_folder
from alexnet_ddp.data.sources.tars import ArchiveStore
from alexnet_ddp.runtime.errors import DataError
from tests.archives import jpeg, lay_out, names, small, tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_order_and_labels_are_those_of_imagefolder(tmp_path):
    files = [
        "b/2.jpg",
        "b/10.JPG",
        "b/1.jpeg",
        "a/x/y/3.png",
        "a/x-z/1.webp",
        "a/x/2.tif",
        "a/z.bmp",
        "a/Z.ppm",
    ]
    files += [
        "Ä/é.pgm",
        "Ä/z.tiff",
        "c d/new\nline.JPEG",
        "c d/e.f/g.jpg",
        "b/notes.txt",
        "b/anim.gif",
    ]
    lay_out(tmp_path, *(f"train/{f}" for f in files))
    reference = ImageFolder(str(tmp_path / "train"))
    index = index_folder(tmp_path, "train")
    assert index.classes == reference.classes == ["a", "b", "c d", "Ä"]
    assert list(zip(names(index), index.labels.tolist(), strict=True)) == reference.samples
    assert index.labels.dtype == np.int32
    assert index.read(3) == index.name(3).removeprefix(f"{tmp_path}/").encode()


def test_linked_class_folders_are_followed_and_loops_refused(tmp_path):
    small(tmp_path)
    (tmp_path / "train" / "fox").symlink_to(tmp_path / "train" / "cat")
    assert len(index_folder(tmp_path, "train")) == 44
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    with pytest.raises(
        DataError,
        match=r"cat/again links to a folder that contains it, without end; remove that link",
    ):
        index_folder(tmp_path, "train")


def test_hidden_entries_and_other_types_are_ignored_and_reported_in_each_run(tmp_path, caplog):
    small(tmp_path)
    lay_out(
        tmp_path, "train/.cache/x.jpg", "train/cat/.x.jpg", "train/cat/.ipynb_checkpoints/y.jpg"
    )
    lay_out(tmp_path, "train/readme.md", "train/cat/list.csv", "train/stray.jpg")
    for _ in range(2):
        caplog.clear()
        index = index_folder(tmp_path, "train")
        assert len(index) == 33
        assert index.classes == ["cat", "dog", "emu"]
        said = sorted(record.getMessage() for record in caplog.records)
        assert [s.split(", such as")[0] for s in said] == [
            "ignored 1 entry (outside of the class folders)",
            "ignored 2 entries (other types)",
            "ignored 3 entries (hidden)",
        ]
        assert said[0].endswith(f"such as {tmp_path}/train/stray.jpg")


def test_a_class_without_images_is_an_error_in_train_and_a_warning_in_val(tmp_path, caplog):
    for split in ("train", "val"):
        small(tmp_path, split)
        (tmp_path / split / "fox").mkdir()
    with pytest.raises(
        DataError, match=r"train holds no images of fox; add some to its folder, or remove it"
    ):
        index_folder(tmp_path, "train")
    index = index_folder(tmp_path, "val")
    assert (index.classes, index.labels.max()) == (["cat", "dog", "emu", "fox"], 2)
    assert "val holds no images of fox" in caplog.text


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], "train", r"data.root \(.*\) is not a folder; give one that contains train/CLASS/\*$"),
        (
            ["train/a/b.jpg"],
            "val",
            r"data.root \(.*\) contains no folder val; arrange the images as val/CLASS/\*$",
        ),
        (
            ["val/.hidden/a.jpg"],
            "val",
            r"val holds no class folders; move the images into .*/val/CLASS/$",
        ),
        (
            ["val/a.jpg", "val/b.jpg"],
            "val",
            r"val holds 2 images but no class folders; move the images into ",
        ),
        (
            ["val/ILSVRC2012_val_00000001.JPEG"],
            "val",
            r"keep ILSVRC2012_img_val.tar and .*devkit.* in place$",
        ),
        (
            ["val/a/b.txt"],
            "val",
            r"val holds no images of a; add some to its folder, or remove it$",
        ),
    ],
)
def test_layouts_that_are_wrong_are_named_with_a_remedy(tmp_path, files, split, message):
    lay_out(tmp_path / "data", *files) if files else None
    with pytest.raises(DataError, match=message) as caught:
        index_folder(tmp_path / "data", split)
    assert "\n" not in str(caught.value)


def test_classes_of_one_side_only_are_named():
    def index(classes):
        return SampleIndex(classes, np.zeros(1, np.int32), FileStore.pack("/", ["x"]))

    check_same_classes(index(["a", "b"]), index(["a", "b"]))
    with pytest.raises(DataError) as caught:
        check_same_classes(
            index([f"c{i:02d}" for i in range(20)]), index(["c01", "c02", "c05", "z"])
        )
    assert (
        "only train has c00, c03, c04, c06, c07 and 12 more; only val has z; add or remove"
        in str(caught.value)
    )


def test_an_image_that_is_gone_is_named(tmp_path):
    index = index_folder(small(tmp_path), "train")
    os.remove(index.name(3))
    with pytest.raises(
        DataError, match=r"cat/cat_2.jpg cannot be read \(No such file or directory\); put it back"
    ):
        index.read(3)


def test_subset_is_fixed_sorted_and_keeps_the_classes(tmp_path):
    index = index_folder(small(tmp_path), "train")
    part = index.subset(7)
    assert names(part) == sorted(names(part), key=names(index).index)
    assert [index.classes[k] for k in part.labels] == [name.split("/")[-2] for name in names(part)]
    assert names(part) == names(index.subset(7))
    assert set(names(part)) < set(names(index.subset(8)))
    assert part.classes == index.classes
    assert part.read(0) == index.read(names(index).index(part.name(0)))
    assert index.subset(None) is index.subset(33) is index.subset(99) is index


def test_fingerprint_depends_on_classes_labels_names_and_sizes_but_not_on_the_path(tmp_path):
    one = index_folder(small(tmp_path / "x"), "train")
    assert one.fingerprint() == index_folder(small(tmp_path / "y"), "train").fingerprint()
    assert re.fullmatch("v2:[0-9a-f]{64}", one.fingerprint())
    (small(tmp_path / "name") / "train/cat/cat_3.jpg").rename(
        tmp_path / "name/train/cat/cat_3a.jpg"
    )
    (small(tmp_path / "size") / "train/cat/cat_3.jpg").write_bytes(b"more bytes than before")
    others = [
        one.subset(32),
        replace(one, classes=["cat", "dog", "fox"]),
        replace(one, labels=one.labels[::-1].copy()),
        *(index_folder(tmp_path / other, "train") for other in ("name", "size")),
        *(index_folder(tmp_path / other, "train").subset(32) for other in ("name", "size")),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 8
    assert (
        one.subset(32).fingerprint()
        == index_folder(tmp_path / "y", "train").subset(32).fingerprint()
    )


@pytest.mark.slow
def test_imagenets_size_takes_less_than_100_megabytes_and_a_few_seconds():
    n = 1_281_167
    begin = time.perf_counter()
    files = FileStore.pack(
        "/data", (f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(n))
    )
    labels = np.arange(n, dtype=np.int32) // 1300
    folders = SampleIndex([f"n{k:08d}" for k in range(1000)], labels, files)
    archives = SampleIndex(
        folders.classes, labels, ArchiveStore("/x.tar", np.arange(n) * 512, np.full(n, 9))
    )
    assert folders.name(n - 1) == "/data/n00000985/n00000985_1281166.JPEG"
    assert max(folders.nbytes, archives.nbytes) < 100e6
    assert len(folders.subset(1000)) == 1000
    assert time.perf_counter() - begin < 20


def archive(path: Path, n: int = 20) -> SampleIndex:
    path.write_bytes(tar({f"{i}.JPEG": jpeg(0, i) for i in range(n)}))
    fd = os.open(path, os.O_RDONLY)
    members = list(tars.tar_members(fd, path, 0, path.stat().st_size))
    os.close(fd)
    offsets, sizes = (np.array([getattr(m, what) for m in members]) for what in ("offset", "size"))
    return SampleIndex(["x"], np.zeros(n, np.int32), ArchiveStore(str(path), offsets, sizes))


def open_files(path: Path) -> int:
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(link) and os.path.samefile(link, path) for link in links)


def test_an_archive_is_opened_once_and_read_by_threads_forks_and_copies(tmp_path):
    index = archive(tmp_path / "a.tar")
    assert open_files(tmp_path / "a.tar") == 0

    def right(index):
        return all(index.read(i) == jpeg(0, i) for i in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: right(index), range(16)))
    assert open_files(tmp_path / "a.tar") == 1
    assert index.name(7) == f"{tmp_path}/a.tar:7.JPEG"
    copy = pickle.loads(pickle.dumps(index))
    assert open_files(tmp_path / "a.tar") == 1
    assert right(copy)
    del copy
    assert open_files(tmp_path / "a.tar") == 1
    child = os.fork()
    if child == 0:
        os._exit(0 if right(index) else 1)
    assert right(index)
    assert os.waitpid(child, 0)[1] == 0


def test_an_archive_cut_short_after_it_was_indexed_names_the_image(tmp_path):
    index = archive(tmp_path / "a.tar")
    os.truncate(tmp_path / "a.tar", int(index.store.offsets[5]) + 10)
    with pytest.raises(
        DataError, match=r"a.tar:5.JPEG cannot be read \(the file ends at byte .*\); put it back"
    ):
        index.read(5)
    with pytest.raises(DataError, match=r"a.tar:\d+ cannot be read"):
        index.read(9)
    os.remove(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a.tar:\d+ cannot be read \(No such file or directory\)"):
        pickle.loads(pickle.dumps(index)).read(0)


def test_a_pipe_and_a_hole_without_end_are_no_images_and_cost_neither_time_nor_memory(tmp_path):
    folder = tmp_path / "train/cat"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "a.jpg")
    with (folder / "b.jpg").open("wb") as file:
        file.truncate(1 << 40)
    index = index_folder(tmp_path, "train")
    with pytest.raises(DataError, match=r"a.jpg cannot be read \(it is no regular file\)"):
        index.read(0)
    with pytest.raises(
        DataError, match=r"b.jpg cannot be read \(1,099,511,627,776 bytes, an image has at most"
    ):
        index.read(1)
