"""Walks through tar archives, and the cache of what was found."""

import io
import logging
import os
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alexnet_ddp.data.sources import index as index_module
from alexnet_ddp.data.sources import scan
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.data.sources.tars import Member, tar_members
from alexnet_ddp.runtime.errors import DataError
from tests.archives import lay_out, names, small


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "alexnet_ddp" / "index"


def test_the_second_start_reads_the_cache_and_any_change_of_a_folder_ends_it(tmp_path, monkeypatch):
    lay_out(small(tmp_path), "train/cat/deep/x.jpg")
    first = index_folder(tmp_path, "train")
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", None)
        second = index_folder(tmp_path, "train")
        assert names(second) == names(first)
        assert second.fingerprint() == first.fingerprint()
    (tmp_path / "train/cat/deep/y.jpg").touch()
    assert len(index_folder(tmp_path, "train")) == len(first) + 1
    (tmp_path / "train/cat/deep/y.jpg").unlink()
    (tmp_path / "train/emu").rename(tmp_path / "train/fox")
    assert index_folder(tmp_path, "train").classes == ["cat", "dog", "fox"]


def test_what_changed_just_now_is_not_cached(tmp_path, cache):
    small(tmp_path)
    os.utime(tmp_path / "train" / "dog")
    index_folder(tmp_path, "train")
    assert not cache.exists()


def times_of(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}


def set_times(times: dict[Path, int]) -> None:
    """As tar, rsync -a and cp -p restore them."""
    for path, mtime in times.items():
        if path.exists():
            os.utime(path, ns=(mtime, mtime))


@pytest.mark.parametrize("how", ["added", "removed", "renamed", "moved away and made again"])
def test_other_content_under_the_same_folder_times_is_noticed(tmp_path, how):
    folder = small(tmp_path) / "train/cat"
    first, times = index_folder(tmp_path, "train"), times_of(tmp_path / "train")
    if how == "added":
        (folder / "more.jpg").write_bytes(b"x")
    elif how == "removed":
        (folder / "cat_3.jpg").unlink()
    elif how == "renamed":
        (folder / "cat_3.jpg").rename(folder / "a.jpg")
    else:
        folder.rename(tmp_path / "old")
        lay_out(tmp_path, *(f"train/cat/other_{i}.jpg" for i in range(11)))
    set_times(times)
    found = index_folder(tmp_path, "train")
    assert names(found) == [str(path) for path in sorted((tmp_path / "train").rglob("*.jpg"))]
    assert found.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("checked", [50_000, 1])
def test_a_file_that_is_written_again_in_place_is_noticed(tmp_path, monkeypatch, checked):
    """Its folder's times stay. Of a large index a sample is compared, here all."""
    monkeypatch.setattr(index_module, "_CHECKED", checked)
    monkeypatch.setattr(index_module, "_SAMPLED", 33)
    first = index_folder(small(tmp_path), "train")
    before = times_of(tmp_path / "train")
    (tmp_path / "train/dog/dog_7.jpg").write_bytes(b"another image")
    set_times(before)
    second = index_folder(tmp_path, "train")
    assert second.fingerprint() != first.fingerprint()
    assert second.store.sizes[names(second).index(f"{tmp_path}/train/dog/dog_7.jpg")] == len(
        b"another image"
    )


def test_of_a_large_index_an_evenly_spread_sample_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_CHECKED", 1)
    monkeypatch.setattr(index_module, "_SAMPLED", 5)
    first, compared = index_folder(small(tmp_path), "train"), []
    size_of = index_module.size_of
    monkeypatch.setattr(
        index_module, "size_of", lambda path: compared.append(path) or size_of(path)
    )
    second = index_folder(tmp_path, "train")
    assert compared == names(first)[::6]
    assert names(second) == names(first)


def test_files_added_on_a_file_system_without_folder_times_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "stamp", lambda path: [0, 1, 1, 1])
    first = index_folder(small(tmp_path), "train")
    (tmp_path / "train/cat/more.jpg").write_bytes(b"x")
    assert len(index_folder(tmp_path, "train")) == len(first) + 1
    lay_out(tmp_path, "train/fox/1.jpg")
    assert index_folder(tmp_path, "train").classes == ["cat", "dog", "emu", "fox"]


def test_a_link_without_a_target_is_listed_and_reported_when_it_is_read(tmp_path):
    cat = small(tmp_path) / "train/cat"
    (cat / "cat_99.jpg").symlink_to(tmp_path / "nowhere")
    (cat / "loop.jpg").symlink_to(cat / "loop.jpg")
    for _ in range(2):
        found = index_folder(tmp_path, "train")
        with pytest.raises(
            DataError, match=r"cat_99.jpg cannot be read \(it is a link without a target\)"
        ):
            found.read(names(found).index(f"{tmp_path}/train/cat/cat_99.jpg"))
        with pytest.raises(DataError, match=r"loop.jpg cannot be read"):
            found.read(names(found).index(f"{tmp_path}/train/cat/loop.jpg"))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "garbage", "pickle"])
def test_a_damaged_cache_is_rebuilt_with_a_line_in_the_log(tmp_path, cache, caplog, damage):
    first = index_folder(small(tmp_path), "train")
    (file,) = cache.iterdir()
    good = file.read_bytes()
    middle = good.index(b"cat/cat_3")
    bad = {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "flipped": good[:middle] + b"d" + good[middle + 1 :],
        "garbage": b"x" * 100,
        "pickle": pickle.dumps([1]),
    }[damage]
    file.write_bytes(bad)
    assert names(index_folder(tmp_path, "train")) == names(first)
    assert "is unreadable" in caplog.text
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(index_folder(small(tmp_path), "train")) == 33
    assert "cannot be cached" in caplog.text
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * len(caplog.records)


def test_many_may_build_the_cache_at_once(tmp_path, cache):
    small(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: names(index_folder(tmp_path, "train")), range(16)))
    assert all(f == found[0] for f in found)
    assert [f.suffix for f in cache.iterdir()] == [".npz"]


def members(data: bytes, tmp_path: Path) -> list[Member]:
    with io.FileIO(tmp_path / "x.tar", "w+") as file:
        file.write(data)
        return list(tar_members(file.fileno(), Path(file.name), 0, len(data)))


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_headers_are_read_as_tarfile_reads_them(tmp_path, tar_format):
    long = "x" * 90 + "/" + "y" * 90 + ".JPEG"
    names = ["a.JPEG", long] + (
        [] if tar_format == tarfile.USTAR_FORMAT else [f"{long}/é/{long}", "Ω.JPEG", "z"]
    )
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tar_format, pax_headers={"comment": "global"}
    ) as archive:
        for i, name in enumerate(names):
            for kind in (tarfile.DIRTYPE, tarfile.REGTYPE):
                member = tarfile.TarInfo(name)
                member.type = kind
                member.size = 500 * i if kind == tarfile.REGTYPE else 0
                archive.addfile(member, io.BytesIO(bytes(member.size)))
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert members(stream.getvalue(), tmp_path) == expected
    assert len(expected) == len(names)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../a.JPEG", tarfile.REGTYPE),
        ("a/../../b.JPEG", tarfile.REGTYPE),
        ("/etc/a.JPEG", tarfile.REGTYPE),
        ("a.JPEG", tarfile.SYMTYPE),
        ("a.JPEG", tarfile.LNKTYPE),
        ("a.JPEG", tarfile.CHRTYPE),
        ("a.JPEG", tarfile.BLKTYPE),
        ("a.JPEG", tarfile.FIFOTYPE),
    ],
)
def test_links_devices_and_paths_out_of_an_archive_are_refused_by_name(
    tmp_path, tar_format, name, kind
):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = (
        kind,
        "/etc/" + "passwd" * (15 if tar_format == tarfile.USTAR_FORMAT else 18),
    )
    with pytest.raises(
        DataError, match=re.escape(f"holds a link, a device or a path out of it ({name!r}) at byte")
    ):
        members(member.tobuf(tar_format) + bytes(1024), tmp_path)


def test_large_sizes_in_gnu_and_pax_headers_are_understood(tmp_path):
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        member = tarfile.TarInfo("big.tar")
        member.size = 147_897_477_120
        with pytest.raises(DataError, match=r"x.tar is cut short in the file that begins at byte "):
            members(member.tobuf(tar_format) + bytes(1024), tmp_path)
        path, end = tmp_path / "sparse.tar", 147_897_477_120 + len(member.tobuf(tar_format))
        path.write_bytes(member.tobuf(tar_format))
        os.truncate(path, end + 1024)
        with open(path, "rb") as file:
            (found,) = tar_members(file.fileno(), path, 0, end + 1024)
        assert (found.size, found.offset + found.size) == (member.size, end)


def test_sparse_members_are_refused(tmp_path):
    member = tarfile.TarInfo("a.JPEG")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with pytest.raises(DataError, match=r"x.tar holds a sparse file or an overlong header at byte"):
        members(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024), tmp_path)


def test_the_progress_bar_passes_everything_on_and_stays_silent_off_a_terminal(capfd):
    assert list(scan.watched(iter(range(5)), 5, "counting")) == [0, 1, 2, 3, 4]
    assert capfd.readouterr() == ("", "")
