"""Shards from far away on the disk of a node: fetched once, verified, evicted by size."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from alexnet_ddp.config import BasicAugmentConfig, ConfigError, ShardsConfig, Shuffle
from alexnet_ddp.config.prepare import LocalEngineConfig, PrepareConfig, Split
from alexnet_ddp.data import cache
from alexnet_ddp.data.cache import NodeCache
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.data.sources.shards import ShardStore
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.command import prepare
from alexnet_ddp.runtime.errors import DataError


class Faraway(LocalFileSystem):
    """Files of this machine under a protocol of their own: an object store, as far as the code can tell."""

    protocol = "faraway"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faraway://"))


fsspec.register_implementation("faraway", Faraway, clobber=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards of the images of a folder: 4 in train, 2 in val."""
    from tests.conftest import make_folder

    top = tmp_path_factory.mktemp("far")
    make_folder(top / "images", num_train=40, num_val=20)
    for split, count in (("train", 4), ("val", 2)):
        prepare(
            PrepareConfig(
                source=str(top / "images"),
                root=str(top / "shards"),
                split=Split(split),
                num_shards=count,
                engine=LocalEngineConfig(workers=1),
                augment=BasicAugmentConfig(),
            )
        )
    return top / "shards"


def far(shards: Path, tmp_path: Path, **knobs) -> ShardsConfig:
    return ShardsConfig(root=f"faraway://{shards}", cache_dir=str(tmp_path / "cache"), **knobs)


def names_in(folder: Path) -> set[str]:
    """Whole files; locks and drafts left out."""
    return {path.name for path in folder.iterdir() if len(path.name) == 64}


def test_images_of_remote_shards_equal_those_of_local_shards(shards, tmp_path):
    here, there = open_data(ShardsConfig(root=str(shards))), open_data(far(shards, tmp_path))
    assert here.class_names == there.class_names
    for near, distant in ((here.train, there.train), (here.val, there.val)):
        assert near.fingerprint() == distant.fingerprint()
        assert [near.read(i) for i in range(len(near))] == [
            distant.read(i) for i in range(len(distant))
        ]
    assert (
        len(names_in(tmp_path / "cache")) == 4 + 2 + 2
    )  # the shards, and the samples of each split


def test_the_second_start_fetches_no_shard(shards, tmp_path, monkeypatch):
    first = open_data(far(shards, tmp_path)).train
    data = [first.read(i) for i in range(len(first))]
    monkeypatch.setattr(NodeCache, "_copy", lambda *_: pytest.fail("fetched again"))
    again = open_data(far(shards, tmp_path)).train
    assert [again.read(i) for i in range(len(again))] == data


def read_all(arguments: tuple[ShardsConfig, str]) -> int:
    """In a process of its own: read every image; count the files this process fetched."""
    cfg, log = arguments
    copy = NodeCache._copy

    def counted(self, name, sha256, path):
        with open(log, "a") as file:
            file.write(f"{name}\n")
        return copy(self, name, sha256, path)

    NodeCache._copy = counted
    index = open_data(cfg).train
    with ThreadPoolExecutor(4) as pool:
        return sum(len(data) for data in pool.map(index.read, range(len(index))))


@pytest.mark.slow
def test_the_processes_of_a_node_fetch_each_file_once(shards, tmp_path):
    log = tmp_path / "fetched"
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        sizes = pool.map(read_all, [(far(shards, tmp_path), str(log))] * 3)
    assert len(set(sizes)) == 1
    fetched = log.read_text().split()
    tars = [f"train-{k:06d}.tar" for k in range(4)]
    assert sorted(fetched) == [*tars, "train.samples.npy", "val.samples.npy"]


def test_a_file_that_is_not_the_one_of_the_index_is_refused_and_not_kept(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "_PAUSE_S", 0.0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((copy / "train-000001.tar").read_bytes())
    damaged[2000] ^= 1
    (copy / "train-000001.tar").write_bytes(damaged)
    index = open_data(far(copy, tmp_path)).train
    i = int(np.flatnonzero(index.store.shards == 1)[0])
    with pytest.raises(
        DataError, match=r"000001.tar:\d+ cannot be read \(its SHA-256 is not the one in the index"
    ):
        index.read(i)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith("tmp")]
    other = int(np.flatnonzero(index.store.shards == 2)[0])
    assert index.read(other)


def test_what_was_used_least_recently_gives_way_and_comes_back_when_it_is_needed(shards, tmp_path):
    near, index = (
        open_data(ShardsConfig(root=str(shards))).train,
        open_data(far(shards, tmp_path)).train,
    )
    limit = int(2.5 * max(path.stat().st_size for path in shards.glob("train-*.tar")))
    small = replace(index.store.files, cache=replace(index.store.files.cache, limit=limit))
    index = replace(index, store=ShardStore(small, index.store.samples, None))
    first = [int(np.flatnonzero(index.store.shards == k)[0]) for k in range(4)]
    folder = tmp_path / "cache"
    for i in (*first, *first):
        assert index.read(i) == near.read(i)
        assert sum((folder / name).stat().st_size for name in names_in(folder)) <= limit
        time.sleep(0.02)
    kept = [sha256 for sha256 in small.sha256 if (folder / sha256).exists()]
    assert len(kept) == 2
    assert small.sha256[3] in kept


def test_a_hint_fetches_in_the_background(shards, tmp_path):
    index = open_data(far(shards, tmp_path)).train
    before = names_in(tmp_path / "cache")
    index.will_need(np.flatnonzero(index.store.shards == 2)[:1])
    deadline = time.monotonic() + 10
    while names_in(tmp_path / "cache") == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert names_in(tmp_path / "cache") - before == {index.store.files.sha256[2]}


def test_a_remote_root_needs_a_cache_that_is_large_enough_for_the_shuffle(shards, tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.root \(faraway://.*\) needs a folder on each node .*cache_dir=DIR"
    ):
        open_data(ShardsConfig(root=f"faraway://{shards}"))
    with pytest.raises(
        ConfigError, match=r"data.cache_gb \(1e-06\) must hold all shards for data.shuffle=full"
    ):
        open_data(far(shards, tmp_path, cache_gb=1e-6))
    with pytest.raises(
        ConfigError, match=r"data.cache_gb \(1e-06\) must hold the val shards and two windows"
    ):
        open_data(far(shards, tmp_path, cache_gb=1e-6, shuffle=Shuffle.window, window_shards=1))


def test_an_address_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^nosuch://x/y cannot be reached; .* install the driver .*Protocol not known",
    ):
        open_data(ShardsConfig(root="nosuch://x/y", cache_dir=str(tmp_path / "cache")))
    with pytest.raises(DataError, match=r"holds no index\.json"):
        open_data(
            ShardsConfig(root=f"faraway://{tmp_path}/none", cache_dir=str(tmp_path / "cache"))
        )


def test_a_cache_pickles_without_its_threads(tmp_path):
    import pickle

    far_away = NodeCache(Storage("faraway:///x"), str(tmp_path), None)
    assert far_away._wanted.empty()  # starts its threads
    assert pickle.loads(pickle.dumps(far_away)) == far_away


@pytest.mark.parametrize("damage", ["cut", "first image", "last image", "samples"])
def test_a_file_of_the_cache_that_was_damaged_is_fetched_again(shards, tmp_path, damage, caplog):
    index = open_data(far(shards, tmp_path)).train
    data = [index.read(i) for i in range(len(index))]
    store = index.store
    rows = np.flatnonzero(store.shards == 1)
    offsets = store.samples["offset"][rows]
    path = tmp_path / "cache" / store.files.sha256[1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "samples":
        path = next(
            p for p in (tmp_path / "cache").iterdir() if p.read_bytes().startswith(b"\x93NUMPY")
        )
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    else:
        at = int(offsets.min() if damage == "first image" else offsets.max()) + 100
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
    again = open_data(far(shards, tmp_path)).train
    assert [again.read(i) for i in range(len(again))] == data
    assert "fetching it again" in caplog.text
