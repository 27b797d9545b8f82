"""Packing: every engine, source and restart gives the same bytes; one commit; no silent replacement."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from alexnet_ddp.config import ConfigError
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare import checks, plan, write
from alexnet_ddp.prepare.command import prepare
from alexnet_ddp.prepare.sources import open_source, shards_source
from alexnet_ddp.runtime.errors import DataError, MachineError
from tests.archives import DEVKIT, VAL, age_tree, extract, jpeg, lay_out, make_archives
from tests.conftest import make_folder
from tests.packing import act, config, hashes, hit, members_of_group, pack, run, start, times


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """48 training and 10 validation images of 4 classes."""
    return make_archives(tmp_path_factory.mktemp("packing") / "archives")


@pytest.fixture(scope="module")
def folder(archives, tmp_path_factory):
    return extract(archives, tmp_path_factory.mktemp("packing") / "tree")


@pytest.fixture(scope="module")
def packed(archives, tmp_path_factory):
    """Shared by all tests: copy it (fixture `mine`) before changing it."""
    return pack(archives, tmp_path_factory.mktemp("packing") / "packed")


@pytest.fixture
def mine(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "mine"))


def without_names(found: dict[str, str]) -> dict[str, str]:
    """Without index.json: it has the class names of the devkit, which a folder does not have."""
    return {name: digest for name, digest in found.items() if name != "index.json"}


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_a_folder_and_the_archives_it_came_from_give_the_same_shards(packed, folder, tmp_path):
    other = pack(folder, tmp_path / "other")
    assert without_names(hashes(other)) == without_names(hashes(packed))
    one, two = (json.loads((root / "index.json").read_bytes()) for root in (packed, other))
    assert one.pop("class_names")[0].startswith("thing ")
    assert two.pop("class_names") == one["classes"]
    assert one == two


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(archives, packed, tmp_path):
    code, _, err = run(
        f"source={archives}", f"root={tmp_path}/two", "engine.workers=2", "num_shards=3"
    )
    assert code == 0, err
    assert hashes(tmp_path / "two") == hashes(packed)


def test_packing_train_then_val_equals_packing_both(archives, packed, tmp_path):
    pack(archives, tmp_path, split="train")
    assert list(json.loads((tmp_path / "_info.json").read_bytes())["splits"]) == ["train"]
    pack(archives, tmp_path, split="val")
    assert hashes(tmp_path) == hashes(packed)


def test_shards_packed_again_keep_names_classes_and_order(packed, tmp_path):
    again = pack(packed, tmp_path / "again")
    assert hashes(again) == hashes(packed)  # keep_original: small JPEGs are copied


def test_the_index_contains_no_times_hosts_or_paths(packed):
    text = (packed / "index.json").read_text() + (packed / "_info.json").read_text()
    for part in (
        str(packed),
        str(packed.parent),
        os.uname().nodename,
        time.strftime("%Y-%m-%d"),
        "workers",
    ):
        assert part not in text


def test_shard_sizes_differ_by_at_most_one_and_each_image_is_packed_once(packed):
    index = json.loads((packed / "index.json").read_bytes())
    assert [s["images"] for s in index["splits"]["train"]["shards"]] == [16, 16, 16]
    assert [s["images"] for s in index["splits"]["val"]["shards"]] == [4, 3, 3]
    names = (packed / "train.names.txt").read_text().splitlines()
    assert len(set(names)) == 48
    assert names == sorted(names)


def test_the_seed_changes_the_order_and_nothing_else(archives, packed, tmp_path):
    other = pack(archives, tmp_path, shuffle_seed=1)
    same = {name for name, digest in hashes(other).items() if hashes(packed).get(name) == digest}
    assert {"train.names.txt", "train.stats.json", "val.stats.json"} <= same
    assert "train-000000.tar" not in same


# --- stopped and started again --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """400 images that take a few milliseconds each."""
    return make_folder(tmp_path_factory.mktemp("packing") / "larger", 360, 40, size=200)


LARGER = ("shorter_side=64", "num_shards=20")


@pytest.fixture(scope="module")
def larger_packed(larger, tmp_path_factory):
    return pack(
        larger, tmp_path_factory.mktemp("packing") / "larger_packed", shorter_side=64, num_shards=20
    )


@pytest.fixture
def endless(larger, tmp_path):
    """The same images, but Pillow needs a minute to read the header of one: packing never finishes."""
    source = Path(shutil.copytree(larger, tmp_path / "endless"))
    slow = sorted(source.glob("train/*/*"))[100]
    slow.write_bytes(b"P5 #")
    os.truncate(slow, 390_000_000)  # a comment that never ends; Pillow reads it byte by byte
    return source


def replace_endless(endless: Path, larger: Path) -> None:
    slow = max(endless.glob("train/*/*"), key=lambda path: path.stat().st_size)
    shutil.copy(larger / slow.relative_to(endless), slow)


LATER = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, *LATER])
def test_a_stopped_run_leaves_no_temporary_files_and_resumes(
    endless, larger, larger_packed, tmp_path, number
):
    root = tmp_path / "root"
    process = start(f"source={endless}", f"root={root}", "engine.workers=2", *LARGER)
    code, err = hit(process, number, root, 4)
    assert not (root / "index.json").exists()
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 75
        last = "alexnet_ddp: stopped; rerun the same command to resume\n"
        assert err.endswith(last)
        assert err.count("\n") == 2  # and the headline of train
        assert not (root / "_tmp").exists()
    deadline = time.monotonic() + 10
    while members_of_group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members_of_group(process.pid)
    before = {path: path.stat().st_mtime_ns for path in root.glob("_state/*/*.json")}
    assert 4 <= len(before) < 20
    replace_endless(endless, larger)
    pack(endless, root, shorter_side=64, num_shards=20)
    assert hashes(root) == hashes(larger_packed)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


@pytest.mark.slow
def test_a_lost_worker_is_reported_in_one_line_with_code_74(endless, tmp_path):
    process = start(f"source={endless}", f"root={tmp_path}/root", "engine.workers=2", *LARGER)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("root/_state/*/*.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    worker = max(pid for pid in members_of_group(process.pid) if "spawn_main" in command_line(pid))
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 74
    assert err.splitlines()[-1] == (
        "alexnet_ddp: a worker process was lost; it may have run out of memory: use fewer engine.workers "
        "and rerun the same command to resume"
    )
    assert not (tmp_path / "root/_tmp").exists()


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_second_run_verifies_and_changes_nothing(archives, mine):
    before = times(mine)
    pack(archives, mine)
    assert times(mine) == before


DAMAGE = {
    "flipped byte in a shard": lambda root: flip(root / "train-000001.tar"),
    "shard cut short": lambda root: os.truncate(root / "val-000000.tar", 1000),
    "shard gone": lambda root: (root / "val-000002.tar").unlink(),
    "flipped byte in an idx": lambda root: flip(root / "train-000000.idx"),
    "idx gone": lambda root: (root / "train-000000.idx").unlink(),
    "samples gone": lambda root: (root / "train.samples.npy").unlink(),
    "samples flipped": lambda root: flip(root / "val.samples.npy"),
    "names gone": lambda root: (root / "val.names.txt").unlink(),
    "stats cut": lambda root: os.truncate(root / "train.stats.json", 10),
    "wids gone": lambda root: (root / "train.wids.json").unlink(),
    "timm's gone": lambda root: (root / "_info.json").unlink(),
    "quarantine gone": lambda root: (root / "train.quarantine.jsonl").unlink(),
    "a sidecar's samples": lambda root: flip(next(root.glob("_state/train-*/train-000002.npy"))),
    "a sidecar cut": lambda root: os.truncate(
        next(root.glob("_state/train-*/train-000002.json")), 10
    ),
    "all sidecars": lambda root: shutil.rmtree(root / "_state"),
    "the index": lambda root: (root / "index.json").unlink(),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_or_missing_files_are_written_again(archives, packed, mine, damage):
    DAMAGE[damage](mine)
    pack(archives, mine)
    assert hashes(mine) == hashes(packed)


def test_a_damaged_index_is_reported_with_a_remedy(archives, packed, mine):
    (mine / "index.json").write_text("{")
    with pytest.raises(
        DataError, match=r"index.json is damaged \(.*\); remove it and prepare again: whole shards"
    ):
        pack(archives, mine)
    (mine / "index.json").unlink()
    pack(archives, mine)
    assert hashes(mine) == hashes(packed)


def test_temporary_files_of_a_killed_run_are_removed(archives, packed, mine):
    (mine / "_tmp").mkdir()
    (mine / "_tmp/train-000000.tar.abc").write_bytes(b"half")
    pack(archives, mine)
    assert hashes(mine) == hashes(packed)
    assert not (mine / "_tmp").exists()


def test_two_runs_cannot_share_a_root(archives, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(
        MachineError,
        match=r"another preparation is writing to .*; wait for it, or give another root",
    ):
        pack(archives, tmp_path)
    os.close(folder)
    pack(archives, tmp_path)


# --- another recipe -------------------------------------------------------------------------------------------------


def test_shards_of_another_recipe_are_only_replaced_on_demand(archives, packed, mine, tmp_path):
    stale, before = {"quality": 80, "shorter_side": 8, "num_shards": 2}, hashes(packed)
    with pytest.raises(ConfigError) as caught:
        pack(archives, mine, **stale)
    assert str(caught.value) == (
        f"{mine} contains train shards of another plan (recipe.shorter_side 8 instead of 256, recipe.quality 80 "
        "instead of 90, num_shards 2 instead of 3); give another root, or replace them with overwrite=true"
    )
    assert hashes(mine) == before
    pack(archives, mine, **stale, overwrite=True, split="train")
    assert not list(mine.glob("train-000002.*"))  # one shard fewer
    assert len(list(mine.glob("_state/train-*"))) == 1
    found = hashes(mine)
    assert {name: found[name] for name in before if name.startswith("val")} == {
        name: digest for name, digest in before.items() if name.startswith("val")
    }
    pack(archives, mine, **stale, overwrite=True)
    assert hashes(mine) == hashes(pack(archives, tmp_path / "fresh", **stale))


def test_the_old_shards_are_withdrawn_before_the_first_new_one_is_written(
    archives, mine, monkeypatch
):
    seen = []

    def fail(task: plan.ShardTask) -> None:
        info = json.loads((mine / "_info.json").read_bytes())["splits"]
        seen.append((list(json.loads((mine / "index.json").read_bytes())["splits"]), list(info)))
        raise DataError("enough")

    monkeypatch.setattr("alexnet_ddp.prepare.command.write_shard", fail)
    with pytest.raises(DataError, match="enough"):
        pack(archives, mine, quality=80, overwrite=True)
    assert seen == [(["val"], ["val"])]
    assert not (mine / "train.wids.json").exists()


def test_another_encoder_does_not_replace_shards_without_overwrite(archives, mine, monkeypatch):
    before = hashes(mine)
    for module in (plan, write):
        monkeypatch.setattr(module, "fingerprint", lambda: "Pillow 99")
    with pytest.raises(
        ConfigError, match=r"of another plan \(encoder Pillow 99 instead of Pillow [\d.]+, libjpeg"
    ):
        pack(archives, mine)
    assert hashes(mine) == before


def test_a_worker_with_another_encoder_is_refused(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "fingerprint", lambda: "Pillow 99")
    with pytest.raises(
        DataError, match=r"a worker has Pillow 99, the driver has .*; install the same Pillow"
    ):
        pack(archives, tmp_path)


def test_splits_must_have_the_same_classes(tmp_path, packed, mine):
    tree = lay_out(tmp_path / "tree", "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg")
    with pytest.raises(
        DataError, match="train and val must have the same classes, but only train has dog"
    ):
        pack(tree, tmp_path / "root", num_shards=1)
    with pytest.raises(
        DataError, match="contains train shards of other classes; give another root"
    ):
        pack(tree, mine, num_shards=1, split="val")


# --- the source -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), r"source \(.*\) does not exist; give the directory or the URL"),
        (
            ("x.jpg",),
            "contains no images to pack; it must have ILSVRC2012_img_train.tar, train/CLASS/",
        ),
        (("train/x.jpg",), "1 images but no class folders; move the images into .*/train/CLASS/"),
        (("train/a/x\ny.jpg",), r"'a/x\\ny.jpg' has a line break in its name, .*; rename it"),
    ],
)
def test_sources_that_cannot_be_packed_are_explained(tmp_path, paths, message):
    lay_out(tmp_path / "source", *paths) if paths else None
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "source", tmp_path / "root", num_shards=1)
    assert not (tmp_path / "root").exists()


def test_more_shards_than_images_are_refused(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"num_shards \(49\) exceeds the 48 images of train; use at most 48"
    ):
        pack(folder, tmp_path, num_shards=49)


def test_a_source_without_val_is_packed_with_a_warning(folder, tmp_path, caplog):
    shutil.copytree(folder / "train", tmp_path / "tree/train")
    age_tree(tmp_path / "tree")
    root = pack(tmp_path / "tree", tmp_path / "root")
    assert "contains no val images: only train is packed; training needs both" in caplog.text
    assert list(json.loads((root / "index.json").read_bytes())["splits"]) == ["train"]


def test_a_val_archive_without_its_labels_is_not_left_out_silently(archives, tmp_path):
    shutil.copytree(archives, tmp_path / "copy")
    (tmp_path / "copy" / DEVKIT).unlink()
    with pytest.raises(
        DataError, match=f"lacks {DEVKIT}, which contains the labels of {VAL}; add it"
    ):
        pack(tmp_path / "copy", tmp_path / "root")


def test_a_folder_wins_over_tars_beside_it(folder, tmp_path):
    tree = Path(shutil.copytree(folder, tmp_path / "tree"))
    (tree / "train-backup.tar").write_bytes(b"not ours")
    assert len(open_source(str(tree), "train")) == 48


def test_a_folder_without_an_index_is_no_source_of_shards(tmp_path):
    with pytest.raises(DataError, match=r"contains no index\.json"):
        shards_source(Storage(str(tmp_path)), "train")


def test_the_root_must_not_be_the_source(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match=r"must not be the source itself; give another directory"):
        pack(folder, tmp_path / "link")


def test_names_that_are_not_utf8_are_kept(folder, tmp_path):
    tree = Path(shutil.copytree(folder, tmp_path / "tree"))
    some = next((tree / "train").rglob("*.JPEG"))
    strange = os.fsencode(some.parent) + b"/z\xff.JPEG"
    os.rename(os.fsencode(some), strange)
    root = pack(tree, tmp_path / "root")
    assert b"/z\xff.JPEG\n" in (root / "train.names.txt").read_bytes()


def test_an_image_that_was_replaced_by_one_of_another_size_is_packed_again(folder, tmp_path):
    tree = Path(shutil.copytree(folder, tmp_path / "tree"))
    root = pack(tree, tmp_path / "root")
    before = hashes(root)
    some = sorted((tree / "train").rglob("*.JPEG"))[5]
    some.write_bytes(jpeg(7, 7) + b"trailing")
    pack(tree, root)
    after = hashes(root)
    assert after == hashes(pack(tree, tmp_path / "fresh"))
    assert (
        len([name for name in before if name.endswith(".tar") and before[name] != after[name]]) == 1
    )


# --- before anything is written -------------------------------------------------------------------------------------


def test_a_dry_run_reports_the_work_and_writes_nothing(archives, tmp_path, caplog):
    caplog.set_level("INFO")
    pack(archives, tmp_path / "root", dry_run=True, **RAW)
    assert not (tmp_path / "root").exists()
    assert (
        "train: 48 images of 4 classes in 3 shards; 3 shards to write, 0.00 GB, 0 exist"
        in caplog.messages
    )
    pack(archives, tmp_path / "root", **RAW)
    before = times(tmp_path / "root")
    pack(archives, tmp_path / "root", dry_run=True, **RAW)
    assert times(tmp_path / "root") == before
    assert (
        "train: 48 images of 4 classes in 3 shards; 0 shards to write, 0.00 GB, 3 exist"
        in caplog.messages
    )


RAW = {"encoding": "raw", "size": 32}


@pytest.mark.parametrize("knobs", [RAW, {"shorter_side": None}])
def test_the_space_for_shards_is_checked_if_it_can_be_computed(
    archives, tmp_path, knobs, monkeypatch
):
    cfg = config(archives, tmp_path / "root", **knobs)
    tasks = [
        task
        for split in ("train", "val")
        for task in plan.make_plan(cfg, cfg.root, split, open_source(cfg.source, split)).tasks()
    ]
    needed = checks.bytes_needed(tasks)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, needed - 1)
    )
    with pytest.raises(
        MachineError,
        match=r"root has 0.00 GB free, the 6 shards to write need 0.00; free some space, or",
    ):
        prepare(cfg)
    assert not (tmp_path / "root").exists()
    monkeypatch.undo()
    pack(archives, tmp_path / "root", **knobs)
    used = sum(path.stat().st_size for path in (tmp_path / "root").glob("*.tar"))
    assert needed - 6 * 1024 <= used - 6 * 1024 <= needed + 6 * 10_240  # tar fills its last record


def test_the_space_is_not_estimated_for_encoded_images(archives, tmp_path):
    cfg = config(archives, tmp_path)
    tasks = list(plan.make_plan(cfg, cfg.root, "train", open_source(cfg.source, "train")).tasks())
    assert checks.bytes_needed(tasks) is None


# --- URLs -----------------------------------------------------------------------------------------------------------


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            Storage(url).write(str(path.relative_to(folder)), path.read_bytes())


def test_urls_are_sources_and_roots(folder, packed, tmp_path):
    url = f"memory://{tmp_path.name}"
    upload(folder, f"{url}/tree")
    Storage(f"{url}/tree").write("train/.hidden/x/1.jpg", b"x")
    Storage(f"{url}/tree").write("train/stray.jpg", b"x")
    Storage(f"{url}/tree").write("train/n10000000/notes.txt", b"x")
    here = pack(f"{url}/tree", tmp_path / "here")
    assert without_names(hashes(here)) == without_names(hashes(packed))
    pack(folder, f"{url}/out")
    there = Storage(f"{url}/out")
    assert {name: there.sha256(name) for name in there.tree("")} == hashes(here)
    pack(folder, f"{url}/out")  # verifies
    act("verify", f"{url}/out")
    act("diff", f"{url}/out", other=str(here))
    pack(f"{url}/out", tmp_path / "again")  # packed shards at a URL are a source, too
    assert hashes(tmp_path / "again") == hashes(here)
    pack(f"file://{folder}", f"file://{tmp_path}/file")
    assert hashes(tmp_path / "file") == hashes(here)


def test_memory_urls_need_one_process_and_tars_a_local_disk(folder, tmp_path):
    url = f"memory://{tmp_path.name}"
    with pytest.raises(
        ConfigError, match=r"memory://.* is in the memory of this process, .*; use engine.workers=1"
    ):
        pack(folder, f"{url}/out", workers=2)
    Storage(url).write("train-0.tar", b"x")
    with pytest.raises(
        DataError,
        match=r"has tars at a URL, which cannot be packed; copy them to this machine first",
    ):
        pack(url, tmp_path / "out", split="train")


# --- a disk that fails ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_code_74_and_not_a_bad_image(larger, tmp_path):
    root = tmp_path / "full"
    root.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=300k tmpfs {root} 2>/dev/null"):
        # The real thing or nothing: /dev/full cannot contain a folder, and a patched write would test the patch.
        pytest.skip("needs root, to mount a small file system")
    try:
        overrides = (
            f"source={larger}",
            f"root={root}/out",
            "num_shards=3",
            "shorter_side=null",
            "keep_original=false",
        )
        code, _, err = run(*overrides, "engine.workers=2")
        assert code == 74, err
        assert re.fullmatch(
            rf"alexnet_ddp: {root}/out/(train-00000\d.tar|_state.*): No space left on device; "
            "fix it and rerun the same command to resume",
            err.splitlines()[-1],
        )
        assert "Traceback" not in err
        assert not (root / "out/_tmp").exists()
        assert not list(root.rglob("*quarantine*"))
    finally:
        os.system(f"umount {root}")


def test_a_disk_that_cannot_be_read_is_raised_and_not_quarantined(folder, tmp_path, monkeypatch):
    real = Storage.read

    def failing(self: Storage, name: str, *args: object) -> bytes:
        if name.endswith("_7.JPEG"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.path(name))
        return real(self, name, *args)

    monkeypatch.setattr(Storage, "read", failing)
    with pytest.raises(
        MachineError,
        match=r"_7.JPEG: Input/output error; fix it and rerun the same command to resume",
    ):
        pack(folder, tmp_path / "root")
    assert not (tmp_path / "root/index.json").exists()
    assert not (tmp_path / "root/_tmp").exists()
    monkeypatch.undo()
    pack(folder, tmp_path / "root")
    assert (tmp_path / "root/train.quarantine.jsonl").read_text() == ""


def test_an_image_that_vanishes_after_the_listing_is_named(folder, tmp_path):
    tree = Path(shutil.copytree(folder, tmp_path / "tree"))
    cfg = config(tree, tmp_path / "root", workers=1)
    source = open_source(str(tree), "train")
    task = next(iter(plan.make_plan(cfg, cfg.root, "train", source).tasks()))
    (tree / task.files[0]).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        write.write_shard(task)
    assert caught.value.filename == str(tree / task.files[0])


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_reports_its_work(archives, tmp_path):
    code, out, err = run(
        f"source={archives}", f"root={tmp_path}/root", "num_shards=2", "engine.workers=1"
    )
    assert code == 0
    assert err == (
        "train: 48 images of 4 classes in 2 shards; 2 shards to write, 0 exist\n"
        "val: 10 images of 4 classes in 2 shards; 2 shards to write, 0 exist\n"
    )
    assert str(tmp_path / "root") in out


def test_the_command_starts_without_torch():
    import subprocess
    import sys

    code = "import sys, alexnet_ddp.prepare.command; print(sorted({'torch', 'pyspark', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
