"""A sweep: its record, its slots and its table, and whole sweeps of real trials."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.run import Device
from alexnet_ddp.config.space import first_point, read_space
from alexnet_ddp.runtime.accuracy import percent_interval
from alexnet_ddp.runtime.environment import num_usable_cores
from alexnet_ddp.runtime.errors import TrialsFailed
from alexnet_ddp.runtime.files import lock_file
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.runtime.sweep_record import Evaluation, State, SweepRecord, Trial
from alexnet_ddp.sweep import slots
from alexnet_ddp.sweep.command import main
from alexnet_ddp.sweep.record import open_record
from alexnet_ddp.sweep.results import TrialRuns
from alexnet_ddp.sweep.slots import Slot, check_promotion, divide, merged, visible_gpus
from alexnet_ddp.sweep.table import show_results, table
from alexnet_ddp.sweep.trial import Evaluations, TrialProcess
from alexnet_ddp.tracking import make_run_dir, run_status
from tests.conftest import make_folder
from tests.drills.harness import PRELOADED, PROJECT, preloaded_server
from tests.network import QUICK, WAITING
from tests.ranks import Command, started

GIVEN = ["data=folder", "data.root=/a", "optimizer.lr=0.1,0.2", "sweep.name=x"]


def opened(directory: Path, *overrides: str) -> SweepRecord:
    cfg = compose("sweep", first_point([*overrides]))
    return open_record(directory, cfg, read_space([*overrides]))


def test_the_record_comes_back_and_another_sweep_is_refused(tmp_path):
    record = opened(tmp_path, *GIVEN)
    nan = Evaluation(4, float("nan"))
    record.trials += [
        Trial(0, {"optimizer.lr": "0.1"}, State.complete, 0, "", 0.5, [Evaluation(2, 50.0), nan]),
        Trial(1, {"optimizer.lr": "0.2"}, State.failed, 70, "diverged"),
        Trial(2, {"optimizer.lr": "0.3"}, State.failed, 74, "the disk is full"),
        Trial(3, {"optimizer.lr": "0.4"}),
    ]
    record.write()
    # Where the data is and what is logged does not change a result.
    moved = [one.replace("/a", "/b") for one in GIVEN] + ["logger.tensorboard=false"]
    again = opened(tmp_path, *moved).trials
    assert [one.state for one in again] == [
        State.complete,
        State.failed,
        *[State.running] * 2,  # what failed through the machine is tried again
    ]
    assert again[0].best(is_minimised=False) == Evaluation(2, 50.0)
    assert (again[1].exit_code, again[1].message) == (70, "diverged")
    rule = r"sweep.name \(\S+\) is another sweep: its {} is {}, here it is {}; give another sweep.n"
    wrong = {
        "optimizer.lr=0.1,0.3": rule.format("optimizer.lr", "0.1,0.2", "0.1,0.3"),
        "trainer.epochs=3": rule.format("trainer.epochs", "not given", "3"),
        "sweep.pruner=asha": rule.format("sweep.pruner", "none", "asha"),
    }
    for change, message in wrong.items():
        kept = [one for one in GIVEN if not change.startswith(one.partition("=")[0])]
        with pytest.raises(ConfigError, match=message):
            opened(tmp_path, *kept, change)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"sweep.json cannot be read \(KeyError: 'searches'\)"):
        opened(tmp_path, *GIVEN)


@pytest.mark.parametrize("file", ["run.json", "status.json"])
def test_a_sweep_and_a_run_do_not_share_a_directory(tmp_path, file):
    sweep, run = tmp_path / "s", tmp_path / "q"
    sweep.mkdir()
    opened(sweep, *GIVEN).write()
    with (
        pytest.raises(
            ConfigError, match=r"^run.name \(s\) is the name of a sweep; give another one$"
        ),
        run_status(sweep, is_main=True),
    ):
        make_run_dir(sweep)
    assert [one.name for one in sweep.iterdir()] == ["sweep.json"]
    run.mkdir()
    (run / file).write_text("{}")
    with pytest.raises(
        ConfigError, match=r"^sweep.name \(q\) is the name of a run; give another one$"
    ):
        opened(run, *GIVEN)


def test_the_devices_are_divided_equally(monkeypatch, tmp_path):
    monkeypatch.setattr(slots, "num_usable_cores", lambda: 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {9, 3, 4, 6, 7})
    assert [(one.cores, one.gpus) for one in divide(1, Device.auto, {})] == [((), None)]
    assert [one.cores for one in divide(2, Device.cpu, {})] == [(3, 4), (6, 7)]
    with pytest.raises(ConfigError, match=r"sweep.parallel \(6\) must be at most .* cores \(5\)"):
        divide(6, Device.cpu, {})
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: a card (UUID: GPU-$i)"; done')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [one.gpus for one in divide(2, Device.auto, {})] == ["0,1", "2,3"]
    assert [one.gpus for one in divide(2, Device.cpu, {})] == [None, None]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,GPU-7,-1,3"}) == ["2", "GPU-7"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    with pytest.raises(ConfigError, match=r"\(3\) must divide the 4 GPUs.*; possible: \[1, 2, 4\]"):
        divide(3, Device.cuda, {})


def test_a_trial_may_get_the_devices_of_several():
    gpus = [Slot((4, 5), "2,3"), Slot((0, 1), "0,1")]
    assert merged(gpus) == Slot((0, 1, 4, 5), "0,1,2,3")
    assert merged([Slot((3,)), Slot((2,))]) == Slot((2, 3))
    cfg = compose("train", ["data=folder", "data.root=/a"])
    check_promotion(cfg, gpus[0], {})
    check_promotion(cfg, Slot((1,)), {"NPROC": "2"})  # on CPUs the number of ranks stays
    with pytest.raises(ConfigError, match=r"ignored with NPROC=2: .*; unset it"):
        check_promotion(cfg, gpus[0], {"NPROC": "2"})
    cfg = compose("train", ["data=folder", "data.root=/a", "parallel.hook=powersgd"])
    with pytest.raises(ConfigError, match=r"depends with parallel.hook=powersgd"):
        check_promotion(cfg, gpus[0], {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sweep.promote=true"], "promote=true would be ignored with sweep.parallel=1"),
        (["logger.wandb_id=a"], r"wandb_id \(a\) would be that of all trials, .*; leave it out"),
        (["sweep.sbatch=--nodes=1", "sweep.pruner=asha"], "sweep.pruner=asha needs results while"),
        (["sweep.sbatch=--nodes=1", "sweep.sampler=tpe"], "sweep.sampler=tpe needs results while"),
    ],
)
def test_options_of_a_sweep_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        compose("sweep", first_point([*GIVEN, *given]))


def test_a_trial_does_not_inherit_a_run_of_wandb(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: given.update(more["env"]))
    for name in ("RUN_ID", "NAME", "SWEEP_ID", "PROJECT"):
        monkeypatch.setenv(f"WANDB_{name}", "x")
    TrialProcess(tmp_path / "000", [], Slot())
    assert "WANDB_PROJECT" in given
    assert not {"WANDB_RUN_ID", "WANDB_NAME", "WANDB_SWEEP_ID"} & given.keys()


def test_complete_trials_are_ranked_before_pruned_ones():
    def trial(number: int, state: State, *values: float) -> Trial:
        found = [Evaluation(k, value) for k, value in enumerate(values, 1)]
        return Trial(number, {}, state, evaluations=found)

    trials = [
        trial(0, State.pruned, 9.0),
        trial(1, State.complete, 4.0, 2.0),
        trial(2, State.failed),
        trial(3, State.complete, 1.0, 4.0),
        trial(4, State.complete, 6.0),
    ]
    for metric, order in (("val/top1", [4, 1, 3, 0, 2]), ("val/loss", [3, 1, 4, 0, 2])):
        record = SweepRecord(Path("x"), {"sweep.metric": metric}, trials)
        assert [one.number for one in record.ranked] == order
    assert trials[3].best(is_minimised=False) == Evaluation(2, 4.0)


def test_a_trial_has_no_result_if_no_value_is_finite():
    def trial(number: int, state: State, value: float) -> Trial:
        return Trial(number, {}, state, evaluations=[Evaluation(1, value)])

    trials = [
        trial(0, State.complete, float("inf")),
        trial(1, State.pruned, 2.7e36),
        trial(2, State.complete, float("nan")),
        trial(3, State.failed, 1.0),
    ]
    trials[3].exit_code = 70
    record = SweepRecord(Path("x"), {"sweep.metric": "val/loss"}, trials)
    assert record.best is trials[1]
    assert SweepRecord(Path("x"), {"sweep.metric": "val/loss"}, trials[2:]).best is None
    shown = table(record.rows, [], "val/loss")
    assert [str(cell) for cell in shown.columns[2].cells] == ["2.7e+36", "", "", "1.0000"]


@pytest.mark.parametrize(
    ("metric", "columns"), [("val/top1", ["top1_low", "top1_high"]), ("val/loss", [])]
)
def test_a_result_that_is_a_share_of_images_has_its_interval_in_the_table_and_in_the_file(
    tmp_path, capsys, metric, columns
):
    given = [*GIVEN, f"sweep.metric={metric}"]
    row = {"epoch": 1.0, "val/top1": 50.0, "val/correct1": 50, "val/num_images": 100}
    for name, more in (("000", {}), ("001", {"val/top1": 96.0, "val/correct1": 96})):
        (tmp_path / name).mkdir()
        text = json.dumps({"step": 3, "val/loss": 1.0} | row | more)
        (tmp_path / name / "metrics.jsonl").write_text(f"{text}\n")
    record = opened(tmp_path, *given)
    record.trials += [Trial(k, {"optimizer.lr": "0.1"}) for k in range(3)]
    runs = TrialRuns(compose("sweep", first_point(given)), read_space(given), record)
    for trial in record.trials[:2]:
        runs.end(trial, runs.reader(trial).read(at_once=True), 0)
    # A sweep of an older version recorded no counts.
    runs.finish(record.trials[2], State.pruned, [Evaluation(3, 12.0)])
    said = capsys.readouterr().out
    assert ("val/top1 96 (95 % interval 90.2–98.4)" in said) == bool(columns)
    assert f"trial 002 pruned, {metric} 12\n" in said

    show_results(opened(tmp_path, *given), read_space(given))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "com" in line]
    with (tmp_path / "sweep.csv").open() as file:
        first, *_, last = csv.DictReader(file)
    assert list(first)[3 : 5 + len(columns)] == [metric, *columns, "step"]
    if columns:
        assert lines[0][2:6] == ["0.1", "96.0000", "90.2–98.4", "3"]
        ends = float(first["top1_low"]), float(first["top1_high"])
        assert ends == percent_interval(96, 100)
        assert (last["val/top1"], last["top1_low"], last["top1_high"]) == ("12.0", "", "")
    else:
        assert lines[0][2:5] == ["0.1", "1.0000", "3"]


def test_evaluations_are_read_again_only_if_the_file_has_changed(tmp_path):
    cfg = compose("train", ["trainer.epochs=2"])
    reader = Evaluations(tmp_path, "val/loss", cfg)
    assert reader.read(at_once=True) == []
    rows = [
        {"step": 3, "epoch": 1.0, "time_s": 4.0, "val/loss": 2.5},
        {"step": 6, "epoch": 2.0, "val/loss": "nan"},
    ]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(rows[0]) + '\n{"step": 4')
    assert reader.read() == []  # the last look was a moment ago
    assert reader.read(at_once=True) == [Evaluation(3, 2.5)]
    assert reader.left_s == 4.0  # half of the epochs took 4 s
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = reader.read(at_once=True)
    assert [(one.step, one.is_final) for one in found] == [(3, False), (6, True)]


def test_every_combination_is_checked_before_a_trial_starts(tmp_path):
    given = ["data=folder", "data.root=x", f"run.root={tmp_path}", "device=cpu"]
    given += ["trainer.precision=fp32,bf16", "seed=1,2"]
    cfg = compose("sweep", first_point(given))
    rule = r"needs a CUDA device.* \(with trainer.precision=bf16 seed=1\)"
    with pytest.raises(ConfigError, match=rule):
        main(cfg, given)
    assert list(tmp_path.iterdir()) == []


def test_if_all_trials_fail_so_does_the_sweep(tmp_path, capsys):
    given = ["data=folder", "data.root=x", f"run.root={tmp_path}", "device=cpu", "sweep.name=s"]
    given += ["trainer.precision=fp32,bf16", "sweep.sampler=random", "sweep.trials=1"]
    given += ["sweep.seed=1"]  # it draws bf16, which is refused without a process
    with pytest.raises(
        TrialsFailed, match=r"^all 1 trials failed; trial 000: .* needs a CUDA"
    ) as e:
        main(compose("sweep", first_point(given)), given)
    assert e.value.exit_code == 64
    shown = capsys.readouterr().out
    assert "trial 000 failed (exit code 64)" in shown
    assert "best:" not in shown
    with (tmp_path / "s/.lock").open() as file:
        assert lock_file(file)
        with pytest.raises(ConfigError, match="is run by another process"):
            main(compose("sweep", first_point(given)), given)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(squeue, sbatch): what these commands do from now on, as lines of sh."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.chdir(PROJECT)

    def answer(**scripts: str) -> None:
        for name, line in scripts.items():
            (bin_dir / name).write_text(f"#!/bin/sh\n{line}\n")
            (bin_dir / name).chmod(0o755)

    return answer


def test_a_sweep_that_slurm_refuses_leaves_nothing(tmp_path, slurm, capsys):
    root = tmp_path / "runs"
    root.mkdir()

    def submit(values: str) -> None:
        given = ["data=folder", "data.root=x", f"run.root={root}", f"optimizer.lr={values}"]
        given.append("sweep.sbatch=--x")
        main(compose("sweep", first_point(given)), given)

    refusals = [("exit 1", "exit 1"), ("true", "echo no such option >&2; exit 1")]
    for (squeue, sbatch), name in zip(refusals, ("squeue", "sbatch")):
        slurm(squeue=squeue, sbatch=sbatch)
        with pytest.raises(ConfigError, match=f"^{name} failed "):
            submit("0.1,0.2")
        assert list(root.iterdir()) == []
    slurm(sbatch="echo 7")
    submit("0.3,0.4")
    assert "submitted 2 of 2 trials as job array 7" in capsys.readouterr().out
    (sweep,) = root.iterdir()
    files = {path.name: path.read_bytes() for path in sweep.iterdir()}
    assert {"sweep.json", "trials.txt"} < files.keys()
    slurm(sbatch="exit 1")
    with pytest.raises(ConfigError, match=r"^sbatch failed "):
        submit("0.3,0.4")  # tasks of the first array may read these files
    assert {path.name: path.read_bytes() for path in sweep.iterdir()} == files


# --- whole sweeps ---------------------------------------------------------------------------------


class Runner:
    """Starts sweeps whose trials are forked from a process that has imported torch."""

    def __init__(self, folder: Path, servers: str) -> None:
        self.folder = folder
        self.data = make_folder(folder / "data", 48, 20)
        self.env = os.environ | {
            "PYTHONPATH": str(PROJECT),
            "PYTHON": str(PRELOADED),
            "PRELOADED_PYTHON": sys.executable,
            "PRELOADED_SERVERS": servers,
            "RESTART_DELAY": "0",
        }

    def overrides(self, name: str, *more: str) -> list[str]:
        given = [f"sweep.name={name}", f"data.root={self.data}", "data=folder", "device=cpu"]
        given += ["data.image_size=64", "trainer.global_batch_size=16", *QUICK]
        return [*given, "logger.tensorboard=false", f"run.root={self.folder}", *more]

    def started(self, name: str, *more: str, **env: str):
        overrides = self.overrides(name, *more)
        return started("alexnet_ddp.sweep", overrides, 0, self.folder, self.env | env)

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name / "sweep.csv").open() as file:
            return [{**row, "hours": ""} for row in csv.DictReader(file)]

    def wait_for(self, name: str, path: str, command: Command) -> None:
        """Until a file of the sweep contains an evaluation."""
        file, end = self.folder / name / path, time.monotonic() + 120
        while not (file.exists() and "val/top1" in file.read_text()):
            assert time.monotonic() < end, command.said()
            assert command.is_running(), command.said()
            time.sleep(0.05)

    def left(self) -> list[str]:
        """Command lines of processes of any trial in the folder."""
        done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        return [line for line in lines if f"run.root={self.folder}/" in line]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    # A short path: a socket's has at most 107 characters.
    with TemporaryDirectory() as servers, preloaded_server(Path(servers), socket.gethostname()):
        yield Runner(tmp_path_factory.mktemp("sweeps"), servers)


def shown_evaluations(sweep: Command) -> list[tuple[str, int]]:
    """Trial and step of each evaluation that a sweep has printed."""
    pattern = r"^trial (\d+): val/top1 \S+ after step (\d+)$"
    found = re.findall(pattern, sweep.said(), re.MULTILINE)
    return [(trial, int(step)) for trial, step in found]


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_continued_has_the_table_of_an_undisturbed_one(runner):
    given = ["optimizer.lr=0.2,0.0001,0.4,0.002", "sweep.pruner=asha", "trainer.epochs=4"]
    given += [f"sweep.parallel={min(2, num_usable_cores())}"]
    with runner.started("calm", *given) as calm:
        assert calm.wait(180) == 0, calm.said()
        rows = runner.rows("calm")
        assert all(
            float(row["top1_low"]) <= float(row["val/top1"]) <= float(row["top1_high"])
            for row in rows
        )
        assert f"best: trial {rows[0]['trial']}, in {runner.folder}/calm/" in calm.said()
        shown = shown_evaluations(calm)
    assert len(set(shown)) == len(shown)
    for name in (row["trial"] for row in rows if row["status"] == "complete"):
        recorded = RunRecord(runner.folder / "calm" / name, name).values("val/top1")
        assert [step for trial, step in shown if trial == name] == list(recorded)
    assert {row["status"] for row in rows} == {"complete", "pruned"}

    with runner.started("hurt", *given) as hurt:
        runner.wait_for("hurt", "002/metrics.jsonl", hurt)
        hurt.send_signal(signal.SIGKILL)
        hurt.wait(30)
        shown = shown_evaluations(hurt)
    end = time.monotonic() + 120
    while runner.left():  # the trials that ran are stopped, and save
        assert time.monotonic() < end, runner.left()
        time.sleep(0.05)
    known = json.loads((runner.folder / "hurt/sweep.json").read_bytes())["trials"]
    over = [trial["number"] for trial in known if trial["state"] != "running"]
    assert 0 < len(over) < len(known)
    with runner.started("hurt", *given) as hurt:
        assert hurt.wait(180) == 0, hurt.said()
        assert not [k for k in over if f"trial {k:03d} of 4 starts" in hurt.said()]
        shown += shown_evaluations(hurt)
    assert len(set(shown)) == len(shown)
    assert runner.rows("hurt") == rows


@pytest.mark.slow
def test_a_stop_saves_the_trials_and_one_that_fails_does_not_end_the_sweep(runner):
    given = ["optimizer.lr=1e30,0.1", "trainer.epochs=3", "sweep.metric=val/loss"]
    with runner.started("stop", *given) as stop:
        runner.wait_for("stop", "001/metrics.jsonl", stop)
        stop.send_signal(signal.SIGTERM)
        assert stop.wait(120) == 75, stop.said()
        last = stop.said().splitlines()[-1]
    rule = "alexnet_ddp: stopped with 1 of 2 trials over, the others are saved; start the same "
    assert last.startswith(rule)
    assert not runner.left()
    with runner.started("stop", *given) as stop:
        assert stop.wait(180) == 0, stop.said()
    first, second = runner.rows("stop")
    assert (first["trial"], first["status"]) == ("001", "complete")
    assert (second["trial"], second["status"], second["exit_code"]) == ("000", "failed", "70")
    assert "is not finite" in second["message"]
    with runner.started("stop", *given, "sweep.metric=val/top1") as other:
        assert other.wait(120) == 64
        assert "its sweep.metric is val/loss, here it is val/top1; give another" in other.said()


@pytest.mark.slow
@pytest.mark.skipif(num_usable_cores() < 2, reason="needs two cores to give one away")
def test_a_promoted_trial_has_the_weights_of_one_that_was_trained_alone(runner):
    common = [*WAITING, "trainer.epochs=120", "trainer.eval_every_epochs=10"]
    given = ["optimizer.lr=0.05,0.0001", "sweep.pruner=asha", "sweep.parallel=2"]
    given += ["sweep.metric=val/loss"]
    with runner.started("grow", *common, *given, "sweep.promote=true", NPROC="2") as grow:
        assert grow.wait(240) == 0, grow.said()
        assert "trial 000 saves, to continue with 2 of 2 shares of the devices" in grow.said()
        assert re.search(r"^trial 000: val/loss [\d.]+ after step \d+$", grow.said(), re.MULTILINE)
    trial = RunRecord(runner.folder / "grow/000", "000")
    assert len(trial.starts) == 2
    alone = [*runner.overrides("", *common)[1:], "optimizer.lr=0.05", "run.name=alone"]
    script, env = str(PROJECT / "launch/local.sh"), runner.env | {"NPROC": "2"}
    subprocess.run([script, *alone], cwd=runner.folder, env=env, check=True, timeout=240)
    for file in ("model.safetensors", "optimizer.safetensors"):
        newest = [
            max(d.glob("checkpoints/step-*")) for d in (trial.directory, runner.folder / "alone")
        ]
        first, second = ((one / file).read_bytes() for one in newest)
        assert first == second
