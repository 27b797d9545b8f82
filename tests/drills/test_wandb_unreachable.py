"""Drill D36: wandb's server refuses, hangs or answers 500, at the start of a run, in its middle, at its end."""

import os
import time

import pytest

from tests.drills.harness import PROJECT
from tests.drills.wandb_server import WandbServer

pytestmark = pytest.mark.drill

# A run that needs wandb at its start, or in its middle, must last longer than wandb's start.
STEPS = {"init": 100, "middle": 100, "finish": 12}


def _start(new_job, name, steps, server=None):
    """One rank on one core: runs beside each other must not slow each other's steps by fighting for threads."""
    env, wandb = {}, "disabled"
    if server:
        env, wandb = (
            {"WANDB_MODE": "online", "WANDB_API_KEY": "c" * 40, "WANDB_BASE_URL": server.url},
            "online",
        )
    overrides = (
        f"trainer.max_steps={steps}",
        "trainer.epochs=9",
        "data.limit_train=96",
        f"logger.wandb={wandb}",
    )
    cores = sorted(os.sched_getaffinity(0))
    core = cores[sum(name.encode()) % len(cores)]
    launcher = ["taskset", "-c", str(core), str(PROJECT / "launch/local.sh")]
    return new_job(name, *overrides, ranks=1, env=env).start(launcher=launcher)


def _watch(jobs, servers, is_due, began):
    """Until all have ended; servers begin to fail when it is due. Seconds to the first row, and to the end, of each."""
    first_row, ended = {}, {}
    while len(ended) < len(jobs):
        now = time.monotonic() - began
        assert now < 150, f"still running: {set(jobs) - set(ended)}"
        for fault, job in jobs.items():
            if job.step():
                first_row.setdefault(fault, now)
            server = servers.get(fault)
            if server and server.mode == "work" and is_due(job, server):
                server.become(fault)
            if job.process.poll() is not None:
                ended.setdefault(fault, now)
        time.sleep(0.05)
    return first_row, ended


def _steps_s(job):
    rows = job.rows("train/loss")
    return rows[-1]["time_s"] - rows[0]["time_s"]


@pytest.mark.parametrize("when", STEPS)
def test_d36_a_failing_wandb_server_costs_the_run_nothing(new_job, when, measured):
    began = time.monotonic()
    servers = {
        fault: WandbServer(fault if when == "init" else "work") for fault in WandbServer.FAULTS
    }
    steps = STEPS[when]
    jobs = {
        fault: _start(new_job, fault, steps, servers.get(fault)) for fault in ("plain", *servers)
    }
    is_due = {
        "init": lambda job, server: False,
        "middle": lambda job, server: job.step() and server.num_runs,
        "finish": lambda job, server: job.step() == steps,
    }
    first_row, ended = _watch(jobs, servers, is_due[when], began)
    for fault, server in servers.items():
        assert server.mode == fault
        server.close()
        job = jobs[fault]
        assert job.process.returncode == 0, job.said()
        assert job.status()["state"] == "complete"
        assert [row["step"] for row in job.rows("train/loss")] == list(range(1, steps + 1))
        assert job.rows("val/top1")[-1]["step"] == steps
        assert "Traceback" not in job.said()
        assert first_row[fault] < first_row["plain"] + 10
        assert _steps_s(job) < _steps_s(jobs["plain"]) + 10
        if when == "init":
            assert "wandb cannot connect" in job.said()
            assert list(job.run_dir.glob("wandb/offline-run-*/*.wandb"))
        job.until(lambda job=job: not job.processes(), 90, "the end of all processes")
    measured["start later by, s"] = round(max(first_row.values()) - first_row["plain"], 1)
    measured["steps longer by, s"] = round(
        max(map(_steps_s, jobs.values())) - _steps_s(jobs["plain"]), 1
    )
    measured["end later by, s"] = round(max(ended.values()) - ended["plain"], 1)
