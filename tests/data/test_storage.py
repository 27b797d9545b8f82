"""A name is there whole or not at all, here and far away; errors say which file they are about."""

import errno
import os
import pickle
import uuid

import pytest

from alexnet_ddp.config import ConfigError
from alexnet_ddp.data.storage import NotAFile, Storage, absolute

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["local", "file", "memory"])
def root(request, tmp_path):
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/root"
    return absolute(
        f"file://{tmp_path}/root" if request.param == "file" else str(tmp_path / "root")
    )


@pytest.fixture
def storage(root):
    return Storage(root)


def test_what_is_written_is_read(storage):
    storage.write("a/b.bin", b"0123456789")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 3, 4) == b"3456"
    assert storage.read("a/b.bin", 8, 4) == b"89"
    assert (storage.size("a/b.bin"), storage.size("a/c.bin")) == (10, None)
    assert b"".join(storage.chunks("a/b.bin")) == b"0123456789"
    assert storage.sha256("a/b.bin").startswith("84d89877f0d4041e")
    assert storage.exists("a/b.bin")
    assert not storage.exists("a/c.bin")


def test_a_file_above_a_limit_is_refused(storage):
    storage.write("a.bin", b"0123456789")
    storage.write("empty", b"")
    assert storage.read("a.bin", 0, None, 10) == b"0123456789"
    assert storage.read("empty", 0, None, 10) == b""
    with pytest.raises(NotAFile, match="an image has at most 9"):
        storage.read("a.bin", 0, None, 9)
    with pytest.raises(FileNotFoundError) as caught:
        storage.read("b.bin", 0, None, 9)
    assert not isinstance(caught.value, NotAFile)


def test_listing_and_removing(storage):
    assert storage.names() == storage.folders() == []
    for name in ("b.txt", "a.txt", "d/x.txt", "d/e/y.txt"):
        storage.write(name, b"x")
    storage.remove("_tmp")
    assert storage.names() == ["a.txt", "b.txt"]
    assert storage.folders() == ["d"]
    assert storage.tree("d") == ["e/y.txt", "x.txt"]
    storage.remove("d")
    storage.remove("a.txt")
    storage.remove("nothing")
    assert (storage.folders(), storage.names()) == ([], ["b.txt"])


def test_a_write_that_fails_leaves_what_was_there(storage):
    storage.write("a", b"old")
    with pytest.raises(ValueError), storage.create("a") as file:  # noqa: PT012
        file.write(b"half of the n")
        raise ValueError
    assert storage.read("a") == b"old"
    with pytest.raises(ValueError), storage.create("b"):
        raise ValueError
    assert not storage.exists("b")
    if storage.is_local:
        assert os.listdir(storage.path("_tmp")) == []


def test_can_be_pickled_and_used_in_another_process(storage):
    storage.write("a", b"x")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"x"


def test_what_is_not_there_is_an_error_of_its_own(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


def test_places_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("x") == f"{tmp_path}/x"
    assert absolute(f"file://{tmp_path}/x/") == f"{tmp_path}/x"
    assert absolute("memory://a/b") == "memory://a/b"
    assert absolute("~/x") == f"{os.path.expanduser('~')}/x"


def test_a_full_disk_names_the_file(tmp_path):
    storage = Storage(str(tmp_path))
    with (
        pytest.raises(OSError) as caught,
        storage.create("a"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert pickle.loads(pickle.dumps(caught.value)).filename == str(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_read_that_fails_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught:
        Storage("/proc/self").read("mem", 0, 10)  # page zero cannot be read: EIO
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "/proc/self/mem")


def test_a_chain_of_file_systems_is_refused():
    """Some of fsspec's file systems run what a file contains."""
    with pytest.raises(ConfigError, match="chains file systems of fsspec"):
        Storage("reference://::file:///x/refs.json").exists()
