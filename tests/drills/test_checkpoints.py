"""Checkpoints that are interrupted, refused by the disk, cut, flipped or gone."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from alexnet_ddp.checkpoint import format as ckpt
from alexnet_ddp.checkpoint.format import find_newest
from alexnet_ddp.checkpoint.manager import CheckpointManager
from alexnet_ddp.config import CheckpointConfig, Device
from alexnet_ddp.runtime.distributed import session
from tests.drills.harness import Job, assert_same_run
from tests.ranks import SPAWN

pytestmark = pytest.mark.drill


def save_for_ever(run_dir: str, pipe: Connection) -> None:
    """Each value of a checkpoint is its step. Sends the step whose save begins."""
    os.environ.pop("RANK", None)
    with session(Device.cpu) as world:
        checkpoints = CheckpointManager(Path(run_dir), CheckpointConfig(keep_last=2), {}, world)
        state, _ = checkpoints.resume("r", allow_changes=False)
        group = {name: torch.empty(500_000) for name in "ab"}
        while True:
            state.step += 1
            for tensor in group.values():
                tensor.fill_(state.step)
            pipe.send(state.step)
            checkpoints.save(state, {"model": group, "optimizer": group}, is_last=False)
            assert checkpoints.poll(wait=True) is None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_d03_kills_during_a_save_leave_a_loadable_checkpoint(tmp_path, measured, full):
    """The run and its writer are killed together, as when a machine goes down, at random moments of saves of 8 MB."""
    moments, loadable, drafts, newest = random.Random(3), 0, 0, 0
    kills = 200 if full else 25
    for _ in range(kills):
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=save_for_ever, args=(str(tmp_path), there))
        process.start()
        begun = here.recv()
        for _ in range(moments.randrange(3)):
            begun = here.recv()
        time.sleep(moments.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGSTOP)  # so that neither sees the other's end
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.join()
        there.close()
        with contextlib.suppress(EOFError):
            while True:
                begun = here.recv()
        drafts += len(list((tmp_path / "checkpoints").glob(".*")))
        ckpt.clean_up(tmp_path / "checkpoints")
        found = find_newest(tmp_path / "checkpoints")
        step = 0 if found is None else ckpt.step_of(found)
        assert begun >= step >= max(newest, begun - 1), "this one or the one before"
        if found is not None:
            assert all(
                (tensor == step).all() for tensor in ckpt.read_tensors(found, "optimizer").values()
            )
        loadable += found is not None or begun == 1
        newest = step
    measured |= {"kills": kills, "loadable": loadable, "drafts left and cleaned": drafts}
    assert loadable == kills
    assert drafts > kills / 10, "hardly any of the kills met a save"


def writer_of(job: Job) -> int:
    for pid in job.processes():
        try:
            if b"alexnet_ddp.checkpoint.writer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    raise LookupError("there is no writer now")


def drafts(job: Job) -> set[str]:
    """Checkpoints that are being written."""
    return {d.name for d in (job.run_dir / "checkpoints").glob(".tmp-*")}


def test_d03_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(new_job, calm, measured):
    job = new_job("saving").inject("fsync ms=50").start()
    for _ in range(3):
        before = drafts(job)
        job.until(
            lambda before=before: drafts(job) - before, what="a checkpoint that is being written"
        )
        victims, starts = [writer_of(job), job.rank(0)], job.said().count("starting again")
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        job.until(
            lambda starts=starts: job.said().count("starting again") > starts, what="the next start"
        )
    assert job.wait() == 0, job.said()
    measured["killed while saving"] = 3
    assert_same_run(job, calm)


def test_d04_a_writer_that_is_killed_shows_at_once_and_the_next_save_works(new_job, calm, measured):
    job = new_job("writer").inject("fsync ms=50").start()
    job.until(
        lambda: list((job.run_dir / "checkpoints").glob(".tmp-*")),
        what="a checkpoint that is being written",
    )
    before = job.step()
    os.kill(writer_of(job), signal.SIGKILL)
    job.until(
        lambda: "the process that writes checkpoints ended with -9" in job.said(), 90, "the warning"
    )
    measured["shown after, steps"] = job.step() - before
    assert (
        measured["shown after, steps"] <= 2
    )  # the step that was going on, and one that this test was late
    assert job.wait() == 0, job.said()
    assert "training continues, and the checkpoints before it are untouched" in job.said()
    assert [row["checkpoint/num_failed"] for row in job.rows("checkpoint/num_failed")][-1] == 1
    assert_same_run(job, calm)


@pytest.fixture
def small_disk(calm, tmp_path) -> Iterator[Path]:
    """Four checkpoints of calm's run."""
    if os.geteuid() != 0:
        # The real thing or nothing: a patched write would test the patch.
        pytest.skip("needs root: it mounts a file system")
    place = tmp_path / "runs"
    place.mkdir()
    size = 4 * size_of_checkpoint(calm) + 10_000_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:  # root of a container may not mount; on a machine of one's own it may
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def size_of_checkpoint(job: Job) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in job.checkpoints()[-1].iterdir())


def fill_up(place: Path, leave: int) -> Path:
    """Leave so many bytes free."""
    ballast = place / "ballast"
    free = shutil.disk_usage(place).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)
    return ballast


def test_d14_a_full_disk_is_survived_twice_and_the_third_time_ends_with_74(
    small_disk, new_job, calm, measured
):
    job = new_job("full", "checkpoint.keep_last=1").start()
    job.until(lambda: len(job.checkpoints()) >= 1, what="a checkpoint")
    ballast = fill_up(small_disk, size_of_checkpoint(calm) // 2)
    assert job.wait() == 74, job.said()
    said = job.said()
    measured["failures survived"] = said.count(
        "training continues, and the checkpoints before it are untouched"
    )
    assert measured["failures survived"] == 2
    reason = r"No space left on device\); it needs \d+ MB, \d+ MB are free; free some space in"
    assert re.search(reason, said), said
    assert find_newest(job.run_dir / "checkpoints") is not None
    assert not list((job.run_dir / "checkpoints").glob(".*"))
    assert job.status()["exit_code"] == 74
    assert job.run() == 74  # before its first step
    reason = (
        r"has \d+ MB free, a checkpoint needs \d+ MB; free some space, or choose another run.root"
    )
    assert re.search(reason, job.said()), job.said()
    ballast.unlink()
    assert job.run() == 0, job.said()
    assert_same_run(job, calm)


def test_d15_a_disk_that_turns_read_only_is_survived_twice_and_the_third_time_ends_with_74(
    small_disk, new_job, calm, measured
):
    job = new_job("readonly", "checkpoint.keep_last=1", "trainer.epochs=20").start()
    job.until(lambda: len(job.checkpoints()) >= 1, what="a checkpoint")
    checkpoints = job.run_dir / "checkpoints"
    job.process.send_signal(
        signal.SIGTERM
    )  # files that are open for writing hold off the remount: a mount of its own
    assert job.wait() == 75, job.said()
    subprocess.run(["mount", "--bind", str(checkpoints), str(checkpoints)], check=True)
    try:
        before = len(job.said())
        job.start()
        job.until_step(job.step() + 1)
        remount = ["mount", "-o", "remount,bind,ro", str(checkpoints)]
        job.until(  # it fails while a checkpoint is being written
            lambda: subprocess.run(remount, stderr=subprocess.DEVNULL, check=False).returncode == 0,
            what="the remount",
        )
        assert job.wait() == 74, job.said()
        measured["failures survived"] = job.said()[before:].count(
            "training continues, and the checkpoints before it"
        )
        assert measured["failures survived"] == 2
        assert "Read-only file system" in job.said()[before:]
        assert find_newest(checkpoints) is not None
    finally:
        subprocess.run(["umount", "-l", str(checkpoints)], check=True)


def stopped_copy(calm: Job, job: Job) -> Job:
    """`job` as calm's run was when it had two checkpoints, of which it can lose one."""
    shutil.copytree(calm.run_dir, job.run_dir)
    assert len(job.checkpoints()) >= 2
    return job


def test_d16_a_newest_checkpoint_that_is_cut_is_named_and_the_one_before_is_used(
    new_job, calm, measured
):
    job = stopped_copy(calm, new_job("cut"))
    newest, before = job.checkpoints()[-1], job.checkpoints()[-2]
    os.truncate(
        newest / "optimizer.safetensors", (newest / "optimizer.safetensors").stat().st_size // 2
    )
    assert job.run() == 0, job.said()
    assert f"checkpoint {newest.name} is rejected: optimizer.safetensors has " in job.said()
    measured["steps repeated"] = int(newest.name[5:]) - int(before.name[5:])
    assert f"step {int(before.name[5:])} of 52" in job.said()
    assert_same_run(job, calm)


def test_d17_two_hundred_flipped_bytes_are_all_rejected(calm, tmp_path, measured):
    directory = tmp_path / calm.checkpoints()[-1].name
    shutil.copytree(calm.checkpoints()[-1], directory)
    paths = sorted(directory.iterdir())
    moments, rejected = random.Random(17), 0
    for k in range(200):
        path = paths[k % len(paths)]
        with path.open("r+b") as file:
            offset = moments.randrange(path.stat().st_size)
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ moments.randrange(1, 256)]))
            file.flush()
            try:
                ckpt.verify(directory)
            except ckpt.Rejected:
                rejected += 1
            file.seek(offset)
            file.write(bytes([byte]))
    ckpt.verify(directory)
    measured["rejected of 200"] = rejected
    assert rejected == 200


def test_d18_a_run_whose_checkpoints_are_all_corrupt_does_not_start_from_scratch(new_job, calm):
    job = stopped_copy(calm, new_job("corrupt"))
    for checkpoint in job.checkpoints():
        (checkpoint / "MANIFEST.json").write_text(json.dumps({"schema_version": 1}))
    rows = job.rows("step")
    assert job.run() == 66, job.said()
    assert f"none of the {len(job.checkpoints())} checkpoints in " in job.said()
    assert "is usable; restore one, or choose another run.name to start afresh" in job.said()
    assert job.rows("step") == rows
    assert job.status()["exit_code"] == 66
