"""Processes that die, hang, are asked to stop at bad moments, or crash again and again."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.drills.harness import PROJECT, Job, assert_same_run

pytestmark = pytest.mark.drill

EVERY = 5  # steps between two checkpoints of the runs that are killed


@dataclass
class Kills:
    times: int
    overrides: list[str]  # of a run that is long enough for so many
    calm: Job  # that run without a fault


@pytest.fixture(scope="module")
def kills(images, tmp_path_factory, request) -> Kills:
    """20 kills in 416 steps, or without --full 3 in 78."""
    times, epochs = (20, 16) if request.config.getoption("full") else (3, 3)
    overrides = [f"trainer.epochs={epochs}", f"checkpoint.save_every_steps={EVERY}"]
    job = Job(tmp_path_factory.mktemp("calm"), "long", f"data.root={images}", *overrides)
    assert job.run() == 0, job.said()
    return Kills(times, overrides, job)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def failure(job: Job) -> dict:
    return json.loads((job.run_dir / "failure.json").read_text())


def kill_often(job: Job, rank: int, times: int, measured: dict) -> float:
    """SIGKILL to `rank` at random steps, a checkpoint or more after each start; the launcher does the rest.

    Return the seconds after which the other rank had ended, at most.
    """
    moments, gone, repeated = random.Random(rank), [], []
    job.start()
    start = 0
    for _ in range(times):
        job.until(
            lambda start=start: job.checkpoints() and step_of(job) > start,
            what="a newer checkpoint",
        )
        job.until_step(step_of(job) + moments.randint(1, 4))
        other, before = job.rank(1 - rank), len(job.said())
        victim = job.hit(signal.SIGKILL, rank)
        reached = job.step()
        gone.append(
            job.until(lambda other=other: not alive(other), 60, "the end of the other rank")
        )
        job.until(lambda before=before: "; step " in job.said()[before:], what="the next start")
        start = int(job.said()[before:].partition("; step ")[2].split()[0])
        repeated.append(reached - start)
        assert failure(job)["rank"] == rank
        assert failure(job)["pid"] == victim
    assert job.wait() == 0, job.said()
    measured |= {
        "kills": times,
        "others gone after, s": round(max(gone), 2),
        "steps repeated, at most": max(repeated),
    }
    assert (
        max(repeated) <= 4 * EVERY
    )  # one distance, and what is trained while a checkpoint is being written
    return max(gone)


def step_of(job: Job) -> int:
    """Of the newest checkpoint."""
    found = job.checkpoints()
    return int(found[-1].name[5:]) if found else 0


@pytest.mark.parametrize("rank", [pytest.param(1, id="D01"), pytest.param(0, id="D02")])
def test_d01_d02_a_rank_that_is_killed_is_replaced_and_nothing_changes(
    rank, new_job, kills, measured, limit
):
    job = new_job("killed", *kills.overrides)
    assert kill_often(job, rank, kills.times, measured) < limit(5)
    assert_same_run(job, kills.calm)


def test_d05_a_rank_that_is_stopped_is_found_named_and_replaced(new_job, calm, measured, limit):
    job = new_job("stopped", "trainer.hang_timeout_s=8").start()
    job.until_step(12)
    victim = job.hit(signal.SIGSTOP, 1)
    measured["detected after, s"] = round(
        job.until(lambda: not alive(victim), 90, "the end of the rank"), 1
    )
    assert measured["detected after, s"] < limit(10)
    assert job.wait() == 0, job.said()
    found = failure(job)
    assert (found["rank"], found["pid"]) == (1, victim)
    assert "it is stopped (SIGSTOP)" in found["cause"]
    assert found["indices"]
    stacks = Path(found["stacks"]).read_text()
    assert "alexnet_ddp/training/trainer.py" in stacks
    assert (
        "alexnet_ddp/data" in stacks or "concurrent/futures/thread.py" in stacks
    )  # those that load images, too
    assert_same_run(job, calm)


def test_d06_a_rank_that_hangs_with_the_gil_is_found_named_and_replaced(
    new_job, calm, tmp_path, measured, limit
):
    go = tmp_path / "go"
    job = new_job("gil", "trainer.hang_timeout_s=8").inject(f"gil rank=1 when={go}").start()
    job.until_step(12)
    victim = job.rank(1)
    go.touch()
    measured["detected after, s"] = round(
        job.until(lambda: not alive(victim), 90, "the end of the rank"), 1
    )
    assert job.wait() == 0, job.said()
    assert (failure(job)["rank"], failure(job)["pid"]) == (1, victim)
    assert "a thread holds the GIL" in failure(job)["cause"]
    assert "sitecustomize.py" in Path(failure(job)["stacks"]).read_text()
    assert measured["detected after, s"] < limit(11)
    assert_same_run(job, calm)


def test_d13_signals_at_bad_moments_stop_all_ranks_at_one_step_and_tear_nothing(
    new_job, calm, measured
):
    job = new_job("asked").start()
    job.until_step(7)
    job.hit(signal.SIGTERM, 1)  # one rank only
    assert job.wait() == 75, job.said()
    assert step_of(job) == job.step()  # saved where it stopped

    job.start()
    job.until(lambda: job.step() >= 26, what="the end of the epoch")
    job.process.send_signal(signal.SIGTERM)  # in the evaluation, or a step beside it
    assert job.wait() == 75, job.said()

    job.inject("fsync ms=50").start()
    job.until(
        lambda: list((job.run_dir / "checkpoints").glob(".tmp-*")),
        what="a checkpoint that is being written",
    )
    began = time.monotonic()
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 75, job.said()
    measured["stopped and saved after, s"] = round(time.monotonic() - began, 1)

    job.inject("").start()
    job.until_step(job.step() + 2)
    job.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    job.process.send_signal(signal.SIGTERM)  # twice
    assert job.wait() in (75, 0), job.said()
    assert job.run() == 0, job.said()
    assert_same_run(job, calm)


def test_d35_a_busy_port_is_named_with_its_holder_and_one_node_alone_takes_another(
    new_job, measured
):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        env = {
            "NNODES": "1",
            "RDZV_ENDPOINT": f"127.0.0.1:{port}",
            "RDZV_ID": "x",
            "NODE_RANK": "0",
        }
        several = new_job("several", env={**env, "NPROC_PER_NODE": "1"})
        began = time.monotonic()
        several.start(launcher=[str(PROJECT / "launch/node.sh")])
        assert several.wait() == 64
        measured["refused after, s"] = round(time.monotonic() - began, 1)
        assert (
            f"port {port} of this host is not available (Address already in use; process {os.getpid()} has"
            in (several.said())
        )
        alone = new_job("alone", "trainer.max_steps=1", ranks=1, env={"MASTER_PORT": str(port)})
        assert alone.run() == 0, alone.said()


def test_d45_an_image_that_kills_each_time_ends_after_three_restarts(new_job, images, measured):
    victim = sorted(images.glob("train/class2/*.jpg"))[20]
    job = new_job("cursed").inject(f"kill at={victim.parent.name}/{victim.name}")
    began = time.monotonic()
    assert job.run(timeout_s=240) == 93, job.said()
    measured |= {
        "restarts": job.said().count("starting again"),
        "given up after, s": round(time.monotonic() - began),
    }
    assert measured["restarts"] >= 3
    assert (
        "no newer checkpoint after three restarts; see failure.json in the run's folder"
        in job.said()
    )
    assert failure(job)["cause"] == "died"
    assert len(failure(job)["indices"]) > 0


@pytest.mark.parametrize("what", ["torchrun", "launcher"])
def test_d47_nothing_of_a_killed_launcher_remains(what, new_job, measured, limit):
    job = new_job("orphan").start()
    job.until_step(7)
    if what == "launcher":
        victim = job.process.pid
    else:
        running = {pid for pid in job.processes() if b"launch/torchrun.py" in command(pid)}
        (victim,) = running - {job.rank(0), job.rank(1)}
    os.kill(victim, signal.SIGKILL)
    measured["nothing left after, s"] = round(
        job.until(lambda: not job.processes(), 90, "the end of all"), 1
    )
    assert measured["nothing left after, s"] < limit(10)
    assert job.run() == 0, job.said()


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_two_trainings_of_one_run_at_once_are_refused(new_job):
    job = new_job(
        "twice", "trainer.epochs=50", ranks=1
    ).start()  # it still runs when the second one has started
    job.until_step(2)
    again = [
        sys.executable,
        "-m",
        "alexnet_ddp.train",
        f"run.root={job.root}/runs",
        "run.name=twice",
        *job.overrides,
    ]
    done = subprocess.run(
        again, cwd=job.root, env=job.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 64
    assert f"run.name=twice is being trained by process {job.rank(0)} on " in done.stderr
    assert job.status()["state"] == "running"
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
