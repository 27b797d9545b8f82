"""D10, D11, D12: what Slurm does to a job, on a real cluster of two nodes. After each the run is calm's, bit for bit."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.drills.batch import Batch
from tests.drills.harness import PROJECT, Job, assert_same_run

pytestmark = [pytest.mark.drill, pytest.mark.slurm]

SLOW = "3mbit"  # an exchange of gradients takes some seconds


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


def assert_went_on(job: Batch, calm: Job, restarts: int = 1) -> None:
    """Requeued so often, complete, bit-equal; one run directory, one curve and one run of wandb."""
    assert job.outcome() == ("COMPLETED", restarts)
    assert_same_run(job, calm)
    assert len(job.wandb_ids()) == 1
    assert [path.name for path in job.run_dir.parent.iterdir()] == [job.name]


@pytest.mark.parametrize("to", ["--batch", "--full", ""], ids=["shell", "all", "steps"])
def test_usr1_saves_and_requeues_the_job(new_batch, calm, measured, to):
    job = new_batch("usr1").submit()
    job.until_step(7)
    job.slurm.run("ctl", "scancel", *([to] if to else []), "--signal=USR1", job.id)
    measured["saved after, s"] = round(job.until_saved(), 1)
    assert measured["saved after, s"] < 5
    assert_went_on(job, calm)
