"""D10, D11, D12: what Slurm does to a job, on a real cluster of two nodes. Then the run is calm's, bit for bit."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.drills.batch import Batch
from tests.drills.harness import PROJECT, Job, assert_same_run

pytestmark = [pytest.mark.drill, pytest.mark.slurm]


@pytest.fixture
def new_batch(slurm, images: Path, tmp_path: Path) -> Iterator[Callable[..., Batch]]:
    """new_batch("name", *overrides): calm's training as a job on both nodes. Nothing of it outlives the test."""
    jobs: list[Batch] = []

    def build(name: str, *overrides: str, **how: object) -> Batch:
        jobs.append(Batch(slurm, tmp_path, name, f"data.root={images}", *overrides, **how))
        return jobs[-1]

    yield build
    for job in jobs:
        job.end()


@pytest.fixture
def saved_soon(limit: Callable[[float], float]) -> Callable[[Batch], float]:
    """saved_soon(job): the seconds in which it saved after the signal that was sent just now: 5 at most."""

    def wait(job: Batch) -> float:
        saved_s = round(job.until_saved(), 1)
        assert saved_s < limit(5)
        return saved_s

    return wait


def assert_went_on(job: Batch, calm: Job, restarts: int | None = 1) -> None:
    """Requeued so often, complete, bit-equal; one run directory, one curve and one run of wandb.

    restarts: None if the job may have been stopped while it started, which is one more requeue.
    """
    state, requeued = job.outcome()
    assert state == "COMPLETED", job.said()
    assert requeued == restarts or (restarts is None and requeued >= 1), job.said()
    assert_same_run(job, calm)
    assert len(job.wandb_ids()) == 1
    assert [path.name for path in job.run_dir.parent.iterdir()] == [job.name]


def test_usr1_to_the_batch_shell_or_to_the_steps_saves_and_requeues_the_job(
    new_batch, calm, measured, saved_soon
):
    job = new_batch("usr1").submit()
    for restarts, to in enumerate(
        ([], ["--batch"])
    ):  # Slurm's default is the processes of the steps
        job.until_step(7 + 12 * restarts)
        job.slurm.run("ctl", "scancel", *to, "--signal=USR1", job.id)
        measured[f"saved after {to or ''}, s"] = saved_soon(job)
        job.until_restart(restarts + 1)
    assert_went_on(job, calm, restarts=2)


@pytest.mark.parametrize("what", ["requeue", "preemption"])
def test_d10_a_preempted_job_is_saved_within_5_s_and_requeued_once(
    new_batch, calm, measured, saved_soon, what
):
    job = new_batch("preempted").submit("--partition=low")
    job.until_step(7)
    if what == "requeue":
        job.slurm.run("ctl", "scontrol", "requeue", job.id)
        measured["saved after, s"] = saved_soon(job)
    else:  # no node is left for a job of a partition that comes first
        first = job.slurm.sbatch(
            "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null", env={}, cwd=job.root
        )
        measured["saved after, s"] = saved_soon(job)
        assert job.slurm.job(first)["Partition"] == "main"
    assert_went_on(job, calm)


def test_d11_a_time_limit_with_a_signal_before_it(new_batch, calm, measured):
    job = new_batch("limited").submit("--time=2")  # train.sbatch asks for USR1 180 s before the end
    job.slow_down()
    measured["saved after, s"] = round(job.until_saved(), 1)
    job.requeued_with_more_time()
    assert "Slurm ends this job" not in job.said()  # it was the signal
    assert_went_on(job, calm, restarts=None)


def test_d11_a_time_limit_without_a_signal(new_batch, calm, measured, tmp_path):
    script = tmp_path / "train.sbatch"
    lines = (PROJECT / "slurm/train.sbatch").read_text().splitlines(keepends=True)
    script.write_text("".join(line for line in lines if "--signal" not in line))
    minutes = 2  # beside other tests a start takes most of a minute
    job = new_batch("limited").submit(f"--time={minutes}", script=script)
    job.slow_down()
    job.until(lambda: job.slurm_says()["JobState"] == "RUNNING", what="the start")
    measured["saved before the limit, s"] = round(
        60 * minutes - job.until_saved(timeout_s=60 * minutes), 1
    )
    job.requeued_with_more_time()
    assert re.search(r"Slurm ends this job in [2-4]\d s", job.said()), job.said()
    assert_went_on(job, calm, restarts=None)


def test_d12_a_node_that_is_down_gives_the_job_back_to_the_queue(new_batch, calm, measured):
    job = new_batch("down").submit()
    job.until_step(7)
    job.slurm.run("ctl", "scontrol", "update", "nodename=n2", "state=down", "reason=drill")
    began, reached = time.monotonic(), job.step()
    job.until_restart()
    job.slurm.reboot("n2")
    job.slurm.run("ctl", "scontrol", "update", "nodename=n2", "state=resume")
    job.until_step(reached + 1, timeout_s=240)  # Slurm waits for more than a minute of it
    measured["training again after, s"] = round(time.monotonic() - began, 1)
    assert_went_on(job, calm)
