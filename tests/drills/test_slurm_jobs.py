"""What slurm/*.sbatch do on a real cluster beside the rows of the table: what is not requeued, evaluation, sweeps."""

import csv
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from subprocess import PIPE, CalledProcessError

import pytest

from tests.drills.batch import FINAL, Batch
from tests.drills.harness import PROJECT

pytestmark = pytest.mark.slurm

ENDS = {  # exit code: what brings it about
    64: "trainer.epochs=0",
    65: "data.root=/nowhere",
    66: "seed=0",  # and checkpoints that are damaged
    70: "optimizer.lr=1e30",
    93: "seed=0",  # and an image that kills who opens it
}


def test_a_job_that_would_fail_again_is_not_requeued(slurm, images, calm, tmp_path):
    damaged = tmp_path / "runs/66"
    shutil.copytree(calm.run_dir, damaged)
    for file in damaged.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    jobs = {
        code: Batch(slurm, tmp_path, str(code), f"data.root={images}", why)
        for code, why in ENDS.items()
    }
    jobs[93].inject(f"kill at={min(path.name for path in images.glob('train/*/*.jpg'))}")
    jobs[93].env |= {"RESTART_DELAY": "0"}
    try:
        for job in jobs.values():
            job.submit("--nodes=1")
        for code, job in jobs.items():
            assert job.outcome() == ("FAILED", 0), job.said()
            assert job.slurm_says()["ExitCode"] == f"{code}:0", job.said()
            assert "alexnet_ddp: " in job.said()  # the reason
    finally:
        for job in jobs.values():
            job.end()


def test_evaluate_on_gpus_of_a_run_whose_folder_has_a_space(slurm, calm, tmp_path):
    root = tmp_path / "my runs"
    shutil.copytree(calm.run_dir, root / "calm")
    job = Batch(slurm, tmp_path, "calm")
    arguments = ["run.name=calm", f"run.root={root}", *calm.plugins]
    job.submit(
        "--nodes=1",
        "--gpus-per-node=2",
        script=PROJECT / "slurm/evaluate.sbatch",
        arguments=arguments,
    )
    assert job.outcome() == ("COMPLETED", 0), job.said()
    found = json.loads((root / "calm/evaluation.json").read_text())
    best = max(calm.rows("val/top1"), key=lambda row: row["val/top1"])
    assert (found["val/top1"], found["val/num_images"]) == (best["val/top1"], 21)


@pytest.fixture
def sweep(slurm, images, tmp_path):
    """sweep(options, file, lines) -> (array id, log of a task): a sweep of one step a task."""
    ids: list[str] = []
    job = Batch(slurm, tmp_path, "sweep", f"data.root={images}")

    def submit(options: list[str], file: Path, *more: str) -> str:
        script, output = str(PROJECT / "slurm/sweep.sbatch"), f"--output={tmp_path}/%a.log"
        options = ["--nodes=1", "--cpus-per-task=1", output, *options]
        common = [str(file), f"run.root={tmp_path}/runs", *job.overrides, *more]
        ids.append(slurm.sbatch(*options, script, *common, env=job.env, cwd=tmp_path))
        return ids[-1]

    yield submit
    for array in ids:
        slurm.run("ctl", "scancel", array, check=False)
    job.end()


def outcomes(slurm, array: str, tasks: Iterable[int]) -> dict[int, tuple[str, str]]:
    """JobState and ExitCode of each task, when all have ended."""
    deadline = time.monotonic() + 240
    while True:
        said = {task: slurm.job(f"{array}_{task}") for task in tasks}
        if all(job["JobState"] in FINAL for job in said.values()):
            return {task: (job["JobState"], job["ExitCode"]) for task, job in said.items()}
        assert time.monotonic() < deadline, said
        time.sleep(0.3)


def until_trained(run_dir: Path, num_rows: int) -> None:
    """Wait until a run has so many rows of metrics."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= num_rows):
        assert time.monotonic() < deadline, run_dir
        time.sleep(0.1)


def test_a_sweep_trains_a_run_a_line_and_refuses_what_is_no_line(slurm, sweep, tmp_path):
    file = tmp_path / "learning rates.txt"
    file.write_text('# seeds\nseed=5\nseed=6 run.name="two words"\nseed=7 run.name="half\n')
    array = sweep(["--array=1-5"], file, "trainer.max_steps=1")
    ended = outcomes(slurm, array, range(1, 6))
    said = {task: (tmp_path / f"{task}.log").read_text() for task in range(1, 6)}
    assert [ended[task][1] for task in range(1, 6)] == ["0:0", "0:0", "0:0", "64:0", "64:0"], said
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "learning rates-2",
        "two words",
    ]
    assert "seed: 6" in (tmp_path / "runs/two words/config.yaml").read_text()
    assert said[1] == f"sweep.sbatch: line 1 of {file} is empty: nothing to train\n"
    assert (
        said[4] == f'sweep.sbatch: line 4 of {file} (seed=7 run.name="half) has an unclosed quote\n'
    )
    rule = f"the array's index (5) must be 1 to 4, the lines of {file}"
    assert said[5] == f"sweep.sbatch: {rule}; sbatch --array=1-4 slurm/sweep.sbatch {file} ...\n"


@pytest.mark.parametrize(
    ("options", "file", "more", "message"),
    [
        ([], "none.txt", [], "the first argument ({file}) must be a readable file"),
        ([], "sweep.txt", [], "the array's index (not given) must be 1 to 1"),
        (
            ["--array=1"],
            "sweep.txt",
            ["run.name=x"],
            "run.name=x would be the same run for all tasks",
        ),
    ],
    ids=["no file", "no array", "one name"],
)
def test_a_sweep_that_cannot_be_is_refused(slurm, sweep, tmp_path, options, file, more, message):
    (tmp_path / "sweep.txt").write_text("seed=1\n")
    array = sweep([*options, f"--output={tmp_path}/log"], tmp_path / file, *more)
    deadline = time.monotonic() + 20
    while slurm.job(array)["JobState"] not in FINAL:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (
        (tmp_path / "log")
        .read_text()
        .startswith("sweep.sbatch: " + message.format(file=tmp_path / file))
    )
    assert slurm.job(array)["ExitCode"] == "64:0"


def test_only_the_task_that_was_stopped_is_requeued(slurm, sweep, tmp_path):
    file = tmp_path / "seeds.txt"
    file.write_text("seed=1\nseed=2\n")
    array = sweep(["--array=1-2"], file)
    last = next(
        task for task in (1, 2) if slurm.job(f"{array}_{task}")["JobId"] == array
    )  # also the array's id
    until_trained(tmp_path / f"runs/seeds-{last}", 4)
    slurm.run("ctl", "scancel", "--batch", "--signal=USR1", f"{array}_{last}")
    ended = outcomes(slurm, array, range(1, 3))
    assert {state for state, _ in ended.values()} == {"COMPLETED"}
    assert {task: slurm.job(f"{array}_{task}")["Restarts"] for task in (1, 2)} == {
        last: "1",
        3 - last: "0",
    }


def test_a_sweep_that_sbatch_refuses_leaves_nothing(slurm, images, tmp_path):
    job = Batch(slurm, tmp_path, "sweep", f"data.root={images}")
    given = [f"run.root={tmp_path / 'runs'}", *job.overrides, "sweep.sbatch=--no-such-option"]
    for values in ("0.1,0.2", "0.3,0.4"):
        command = [sys.executable, "-m", "alexnet_ddp", "sweep", *given, f"optimizer.lr={values}"]
        with pytest.raises(CalledProcessError) as refusal:
            slurm.run("ctl", *command, env=job.env, cwd=PROJECT, stderr=PIPE)
        assert refusal.value.returncode == 64
        assert "alexnet_ddp: sbatch failed (sbatch: unrecognized option" in refusal.value.stderr
        assert list((tmp_path / "runs").iterdir()) == []


def test_the_sweep_command_submits_what_is_neither_over_nor_queued(slurm, images, tmp_path):
    job = Batch(slurm, tmp_path, "sweep", f"data.root={images}")
    given = [f"run.root={tmp_path}", "sweep.name=s", *job.overrides, "optimizer.lr=0.01,0.02,1e30"]
    given += ["sweep.sbatch=--nodes=1 --cpus-per-task=1", "trainer.epochs=6"]
    submitted = re.compile(r"^submitted (\d) of 3 trials as job array (\d+);", re.MULTILINE)

    def sweep() -> str:
        command = [sys.executable, "-m", "alexnet_ddp", "sweep", *given]
        return slurm.run("ctl", *command, env=job.env, cwd=PROJECT)

    count, array = submitted.search(sweep()).groups()
    assert count == "3"
    try:
        until_trained(tmp_path / "s/000", 4)
        slurm.run("ctl", "scancel", f"{array}_2")  # it waits: one trial at a time
        slurm.run("ctl", "scancel", "--batch", "--signal=USR1", f"{array}_1")
        said = sweep()  # the others are queued, and are not submitted twice
        assert submitted.search(said)[1] == "1", said
        second = submitted.search(said)[2]
        assert outcomes(slurm, array, (1, 3)) == {1: ("COMPLETED", "0:0"), 3: ("FAILED", "70:0")}
        assert outcomes(slurm, second, (2,)) == {2: ("COMPLETED", "0:0")}
        # Slurm may deliver the signal to the next start too, which is then requeued once more.
        assert int(slurm.job(f"{array}_1")["Restarts"]) >= 1
        said = sweep()
    finally:
        slurm.run("ctl", "scancel", "--name=s")
        job.end()
    assert not submitted.search(said)
    with (tmp_path / "s/sweep.csv").open() as file:
        found = {row["trial"]: (row["status"], row["exit_code"]) for row in csv.DictReader(file)}
    assert found == {"000": ("complete", "0"), "001": ("complete", "0"), "002": ("failed", "70")}
