"""Shards as training reads them: the same images in the same order as where they came from, in any thread."""

import json
import os
import pickle
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_ddp.config import (
    BasicAugmentConfig,
    FolderConfig,
    ImageNetConfig,
    OnBadImage,
    ShardsConfig,
)
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import MicroBatch
from alexnet_ddp.data.sources import shard_index
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.data.sources.shard_index import INDEX
from alexnet_ddp.data.sources.shards import open_shards
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.data.views import evaluation_views
from alexnet_ddp.runtime.errors import DataError
from tests.archives import extract, make_archives
from tests.packing import pack
from tests.test_train import SMALL, rows, run

EXACT = {"shorter_side": None, "keep_original": True}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return make_archives(tmp_path_factory.mktemp("shards") / "archives")


@pytest.fixture(scope="module")
def packed(archives, tmp_path_factory):
    """Do not change it."""
    return pack(archives, tmp_path_factory.mktemp("shards") / "packed", **EXACT)


@pytest.fixture
def mine(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "mine"))


def opened(root: Path, **knobs: object) -> tuple:
    return open_shards(ShardsConfig(root=str(root), **knobs))


def test_shards_are_the_data_set_they_came_from(archives, packed, tmp_path):
    ours = open_data(ShardsConfig(root=str(packed)))
    tree = extract(archives, tmp_path / "tree")
    for theirs in (
        open_data(ImageNetConfig(root=str(archives))),
        open_data(FolderConfig(root=str(tree))),
    ):
        for one, other in ((ours.train, theirs.train), (ours.val, theirs.val)):
            assert one.classes == other.classes
            assert one.fingerprint() == other.fingerprint()
            assert [one.read(i) for i in range(len(one))] == [
                other.read(i) for i in range(len(other))
            ]
    assert ours.class_names[0].startswith("thing ")


def test_a_subset_is_the_same_images(archives, packed):
    ours = open_data(ShardsConfig(root=str(packed), limit_train=7, limit_val=3))
    theirs = open_data(ImageNetConfig(root=str(archives), limit_train=7, limit_val=3))
    for one, other in ((ours.train, theirs.train), (ours.val, theirs.val)):
        assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_the_same_pixels_as_from_the_archives(archives, packed, training):
    found = []
    for cfg in (
        ShardsConfig(root=str(packed), image_size=16),
        ImageNetConfig(root=str(archives), image_size=16),
    ):
        augment = build_augment(BasicAugmentConfig(), 0, 16, cfg.eval_resize) if training else None
        index = open_data(cfg).train
        loader = build_loader(cfg, index, augment, 3, torch.device("cpu"))
        micro_batches = [
            MicroBatch(k, 1, np.arange(k * 20, min(48, k * 20 + 20)), True) for k in range(3)
        ]
        found.append([(b.images.clone(), b.labels.clone()) for b in loader.batches(micro_batches)])
        loader.close()
    for (images, labels), (others, their_labels) in zip(*found):
        assert torch.equal(images, others)
        assert torch.equal(labels, their_labels)


@pytest.mark.slow
def test_training_on_shards_writes_the_rows_of_training_on_the_archives(archives, packed, tmp_path):
    common = [
        "data.image_size=64",
        "trainer.max_steps=6",
        "trainer.global_batch_size=8",
        *SMALL[2:],
    ]
    # The default recipes of the two differ in these values.
    common += ["augment.min_scale=0.08", "trainer.epochs=2"]
    for name, root in (("shards", packed), ("imagenet", archives)):
        done = run(
            "train", f"data={name}", f"data.root={root}", f"run.name={name}", *common, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout
    one, other = (
        [
            {
                k: v
                for k, v in row.items()
                if k != "train/images_per_sec" and not k.startswith("time")
            }
            for row in rows(tmp_path / f"runs/{name}", "step")
        ]
        for name in ("shards", "imagenet")
    )
    assert one == other
    assert len(one) >= 7


def test_many_threads_read_at_once(packed):
    train, _, _ = opened(packed)
    expected = [train.read(i) for i in range(len(train))]
    fresh, _, _ = opened(packed)
    order = np.random.default_rng(0).integers(0, len(train), 2_000).tolist()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(fresh.read, order)) == [expected[i] for i in order]
    assert len(fresh.store._open) == 3  # one descriptor a shard


def test_pickles_without_open_files(packed):
    train, _, _ = opened(packed)
    first = train.read(0)
    again = pickle.loads(pickle.dumps(train))
    assert not again.store._open
    assert again.read(0) == first
    assert again.fingerprint() == train.fingerprint()


def test_files_are_closed_when_nobody_reads_any_more(packed):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        train, val, _ = opened(packed)
        train.read(0)
        val.read(0)
        del train, val
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_low_limit_of_open_files_is_raised(packed):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        opened(packed)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 6 + 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


DAMAGE = {
    "no index": (
        lambda root: (root / INDEX).unlink(),
        r"holds no index.json; give the root of a finished preparation",
    ),
    "no such root": (
        shutil.rmtree,
        r"holds no index.json; give the root of a finished preparation",
    ),
    "damaged index": (
        lambda root: (root / INDEX).write_text("{}"),
        r"index.json is damaged \('format'\); remove",
    ),
    "newer format": (
        lambda root: change(root, "format", 2),
        r"index.json is damaged \(format 2 instead of 1\)",
    ),
    "no val": (
        lambda root: change(root, "splits", {}),
        r"has no train shards; prepare them: split=train",
    ),
    "shard gone": (
        lambda root: (root / "val-000001.tar").unlink(),
        r"val-000001.tar is missing; copy it again, or",
    ),
    "shard cut": (
        lambda root: os.truncate(root / "train-000002.tar", 999),
        r"train-000002.tar has 999 bytes instead of [\d,]+; copy it again, or prepare it again",
    ),
    "samples gone": (
        lambda root: (root / "val.samples.npy").unlink(),
        "val.samples.npy cannot be read",
    ),
    "samples cut": (
        lambda root: os.truncate(root / "val.samples.npy", 300),
        "val.samples.npy cannot be read",
    ),
    "samples of another": (
        lambda root: shutil.copy(root / "val.samples.npy", root / "train.samples.npy"),
        "train.samples.npy is not the one that index.json was written for; copy all files again from one",
    ),
}


def change(root: Path, key: str, value: object) -> None:
    found = json.loads((root / INDEX).read_bytes())
    (root / INDEX).write_text(json.dumps(found | {key: value}))


@pytest.mark.parametrize("damage", DAMAGE)
def test_shards_that_are_not_whole_are_refused_at_the_start(mine, damage):
    spoil, message = DAMAGE[damage]
    spoil(mine)
    with pytest.raises(DataError, match=message) as caught:
        opened(mine)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_later_is_named(mine):
    train, _, _ = opened(mine)
    name = train.name(0).rsplit(":", 1)[0]
    os.truncate(name, 600)
    with pytest.raises(
        DataError, match=rf"{name}:\d+ cannot be read \(the file ends at byte [\d,]+, inside"
    ):
        train.read(0)


def test_raw_shards_are_read_by_rows(archives, tmp_path):
    root = pack(archives, tmp_path / "raw", encoding="raw", size=24)
    train, _, _ = opened(root)
    image = np.frombuffer(train.read(3)[128:], np.uint8).reshape(24, 24, 3)
    part = np.empty((7, 24, 3), np.uint8)
    train.store.read_rows(3, 5, part)
    assert np.array_equal(part, image[5:12])


def test_crops_of_raw_shards_are_their_corners_and_mirror_images(archives, tmp_path):
    root = pack(archives, tmp_path / "raw", encoding="raw", size=24)
    train, _, _ = opened(root)
    cfg = ShardsConfig(root=str(root), image_size=21, eval_resize=24)
    views = evaluation_views(10, False)
    loader = build_loader(cfg, train, None, 1, torch.device("cpu"), views=views)
    batch = next(loader.batches([MicroBatch(0, 0, np.array([3]), True)]))
    found = batch.images.numpy().reshape(10, 21, 21, 3)
    image = np.frombuffer(train.read(3)[128:], np.uint8).reshape(24, 24, 3)
    corners = [(0, 0), (0, 3), (3, 0), (3, 3), (2, 2)]  # top, left; torchvision rounds 1.5 to 2
    for k, (top, left) in enumerate(corners):
        for slot, source in ((found[k], image), (found[5 + k], image[:, ::-1])):
            assert np.array_equal(slot, source[top : top + 21, left : left + 21])
    loader.close()


def test_an_unreadable_raw_image_is_skipped_if_the_option_allows_it(archives, tmp_path):
    root = pack(archives, tmp_path / "raw", encoding="raw", size=24, num_shards=1)
    sets = {
        choice: opened(root, on_bad_image=choice)[0]
        for choice in (OnBadImage["raise"], OnBadImage.skip)
    }
    last = int(np.argmax(sets[OnBadImage.skip].store.samples["offset"]))
    os.truncate(
        root / "train-000000.tar", int(sets[OnBadImage.skip].store.samples["offset"][last]) + 200
    )
    indices, cpu = np.array([last, (last + 1) % 3, (last + 2) % 3]), torch.device("cpu")
    for choice, train in sets.items():
        cfg = ShardsConfig(root=str(root), image_size=16, on_bad_image=choice)
        loader = build_loader(cfg, train, build_augment(BasicAugmentConfig(), 0, 16, 18), 1, cpu)
        batches = loader.batches([MicroBatch(0, 0, indices, True)])
        if choice is OnBadImage.skip:
            assert next(batches).indices.tolist() == indices[1:].tolist()
        else:
            with pytest.raises(
                DataError, match=r"train-000000.tar:\d+ cannot be read \(the file ends at byte"
            ):
                next(batches)
        loader.close()


def test_the_colour_axes_of_the_shards_come_with_them(packed, archives):
    values, vectors = open_data(ShardsConfig(root=str(packed))).colour_basis
    assert (values.shape, vectors.shape) == ((3,), (3, 3))
    assert open_data(ImageNetConfig(root=str(archives))).colour_basis is None


@pytest.mark.slow
def test_a_run_with_colour_noise_is_another_run_if_the_colours_differ(packed, tmp_path):
    root = Path(shutil.copytree(packed, tmp_path / "shards"))
    overrides = [
        "data=shards",
        f"data.root={root}",
        "run.name=a",
        "data.image_size=64",
        "trainer.global_batch_size=24",
    ]
    overrides += ["augment=alexnet_2012", *SMALL[2:]]
    assert run("train", *overrides, "trainer.max_steps=1", cwd=tmp_path).returncode == 0
    stats = json.loads((root / "train.stats.json").read_bytes())
    (root / "train.stats.json").write_text(json.dumps(stats | {"eigenvalues": [0.2, 0.1, 0.01]}))
    done = run("train", *overrides, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 65
    assert (
        "train.stats.json is not the one that index.json was written for; copy all files again"
        in done.stdout
    )
    index = json.loads((root / INDEX).read_bytes())
    index["splits"]["train"]["files"]["train.stats.json"] = Storage(str(root)).sha256(
        "train.stats.json"
    )
    (root / INDEX).write_text(json.dumps(index))
    done = run("train", *overrides, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 64
    assert (
        "run.name=a was started as another run: augment.colour_basis=[[0.2, 0.1, 0.01], ["
        in done.stdout
    )
    (root / "train.stats.json").unlink()
    done = run("train", *overrides, "trainer.max_steps=2", cwd=tmp_path)
    assert "augment.colour_basis=unset (was [[" in done.stdout


# --- files of two preparations in one folder ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(archives, tmp_path_factory) -> tuple[Path, Path]:
    """Raw shards of the same counts, sizes and class names from other images. Do not change them."""
    top = tmp_path_factory.mktemp("two")
    tree = extract(archives, top / "tree")
    one = pack(tree, top / "one", encoding="raw", size=24)
    paths = sorted((tree / "train").rglob("*.JPEG")) + sorted((tree / "val").rglob("*.JPEG"))
    data = [path.read_bytes() for path in paths]
    for path, content in zip(paths, data[1:] + data[:1]):
        path.write_bytes(content)
    return one, pack(tree, top / "two", encoding="raw", size=24)


MIXED = {
    "index and samples are new, shards are old": (
        ["index.json", "*.samples.npy"],
        r"train.stats.json is not the one that index.json was written for; copy all",
    ),
    "index, samples and statistics are new, shards are old": (
        ["*.json", "*.npy", "*.txt"],
        r"train-000000.tar \(other bytes",
    ),
    "all but a shard is new": (
        ["*.json", "*.npy", "*.txt", "*0000.tar", "val-*.tar", "train-000001.tar"],
        r"root/train-000002.tar \(other bytes at [\d,]+\) do not match train.samples.npy and index.json; copy",
    ),
    "only a shard is new": (
        ["val-000001.tar"],
        r"val-000001.tar \(other bytes at [\d,]+\) do not match val.samples",
    ),
    "only the index is new": (
        ["index.json"],
        r"train.samples.npy is not the one that index.json was written for",
    ),
    "only the samples are new": (
        ["val.samples.npy"],
        r"val.samples.npy is not the one that index.json was written for",
    ),
    "only the colours are new": (
        ["train.stats.json"],
        r"train.stats.json is not the one that index.json was written",
    ),
    "train is new, val is old": (
        ["train*", "index.json"],
        r"val.samples.npy is not the one that index.json was written",
    ),
}


def mixed(two: tuple[Path, Path], root: Path, patterns: list[str]) -> Path:
    """The first of two, and over it the files of the second that match, with the times of the first."""
    shutil.copytree(two[0], root)
    for path in {path for pattern in patterns for path in two[1].glob(pattern)}:
        times = (root / path.name).stat()
        shutil.copy(path, root / path.name)
        os.utime(root / path.name, ns=(times.st_atime_ns, times.st_mtime_ns))
    return root


def test_two_preparations_have_files_of_the_same_sizes(two):
    one, other = ({path.name: path.stat().st_size for path in top.glob("*.tar")} for top in two)
    assert one == other
    sets = [opened(root)[:2] for root in two]
    assert sets[0][0].fingerprint() != sets[1][0].fingerprint()


@pytest.mark.parametrize("mixture", MIXED)
def test_files_of_two_preparations_are_refused(two, tmp_path, mixture):
    patterns, message = MIXED[mixture]
    root = mixed(two, tmp_path / "root", patterns)
    with pytest.raises(DataError, match=message) as caught:
        open_data(ShardsConfig(root=str(root)))
    assert "\n" not in str(caught.value)


def test_files_of_another_preparation_are_noticed_after_a_start_that_found_all_right(two, tmp_path):
    root = Path(shutil.copytree(two[0], tmp_path / "root"))
    for path in root.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    opened(root)
    status = (root / "train-000001.tar").stat()
    shutil.copy(two[1] / "train-000001.tar", root)
    os.utime(root / "train-000001.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"train-000001.tar \(other bytes at"):
        opened(root)


def test_what_was_found_right_is_not_read_again(two, tmp_path, monkeypatch):
    root = Path(shutil.copytree(two[0], tmp_path / "root"))
    for path in root.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    first = opened(root)[0]
    monkeypatch.setattr(shard_index, "wrong_shards", lambda *_: pytest.fail("read again"))
    assert opened(root)[0].fingerprint() == first.fingerprint()


@pytest.mark.parametrize("name", ["train.names.txt", "train.samples.npy", "train-000002.tar"])
def test_shards_of_two_preparations_are_no_source_either(archives, packed, tmp_path, name):
    other = pack(archives, tmp_path / "other", **EXACT, shuffle_seed=1)
    (other / "train.names.txt").write_text("an/other.JPEG\n")
    root = mixed((packed, other), tmp_path / "mixed", [name])
    rule = (
        "do not match"
        if name.endswith(".tar")
        else "is not the one that index.json was written for"
    )
    with pytest.raises(DataError, match=rf"{name} .*{rule}"):
        pack(root, tmp_path / "out")


def test_shards_that_hold_other_bytes_than_the_images_are_another_data_set(
    archives, packed, tmp_path
):
    train = open_data(ImageNetConfig(root=str(archives))).train.fingerprint()
    assert opened(packed)[0].fingerprint() == train
    small = pack(archives, tmp_path / "small", shorter_side=8)
    raw = pack(archives, tmp_path / "raw", encoding="raw", size=24)
    assert len({train, opened(small)[0].fingerprint(), opened(raw)[0].fingerprint()}) == 3
