"""runs and compare: tables of what runs have recorded, and the first step in which two differ."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_ddp.compare import close, curve_table, evaluation_table, first_difference, line
from alexnet_ddp.compare import main as compare
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.runs import CompareConfig, RunColumn, RunsConfig
from alexnet_ddp.data.sampler import GlobalBatchSampler, index_hash
from alexnet_ddp.report.command import main as report
from alexnet_ddp.runs import main as list_runs
from alexnet_ddp.runs import row, sorted_rows
from alexnet_ddp.runtime.accuracy import percent_interval
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.run_record import RunRecord, differing, find_runs, open_run
from alexnet_ddp.tracking.sinks import JsonlSink
from tests.network import QUICK
from tests.test_main import ENV
from tests.test_main import run as run_main


def make_run(
    directory: Path, rows=(), options="optimizer:\n  lr: 0.1\n", overrides=(), **status
) -> RunRecord:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(f"run:\n  name: {directory.name}\n{options}")
    write_json(directory / "run.json", {"overrides": overrides, "choices": {"model": "alexnet"}})
    write_json(directory / "status.json", {"state": "complete", "step": 0} | status)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return RunRecord(directory, directory.name)


def evaluation(step: int, correct: int) -> dict:
    """The row of an evaluation on 100 images."""
    return {
        "step": step,
        "val/top1": float(correct),
        "val/correct1": correct,
        "val/num_images": 100,
    }


def losses(*values) -> list[dict]:
    return [{"step": k, "train/loss": value} for k, value in enumerate(values, 1)]


def test_a_run_is_summarised_from_all_its_rows(tmp_path):
    rows = [
        {"step": 2, "time_s": 1800.0, "train/loss": 2.0, "train/images_per_sec": 100.0},
        {"step": 2, "time_s": 1900.0, "val/top1": 60.0, "val/correct1": 6, "val/num_images": 10},
        {"step": 4, "time_s": 3500.0, "train/images_per_sec": 300.0},
        {"step": 4, "time_s": 3600.0, "val/top1": 50.0},
    ]
    one = make_run(tmp_path / "x", rows, step=3)
    with (tmp_path / "x/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "val/t')  # of a run that was killed
    expected = {"name": "x", "status": "complete", "top1": 60.0, "step": 4, "hours": 1.0}
    interval = dict(zip(("top1_low", "top1_high"), percent_interval(6, 10)))
    assert row(one) == expected | interval | {"images_per_sec": 200.0}
    empty = make_run(tmp_path / "y", step=7, state="failed")
    assert row(empty) == {"name": "y", "status": "failed", "step": 7}


def test_a_run_whose_process_has_ended_without_a_status_was_killed(tmp_path):
    here = {"state": "running", "host": socket.gethostname()}
    alive = make_run(tmp_path / "a", **here, pid=os.getpid())
    dead = make_run(tmp_path / "b", **here, pid=2**22 + 1)  # above Linux's largest number
    elsewhere = make_run(tmp_path / "c", state="running", host="other", pid=2**22 + 1)
    assert [one.status for one in (alive, dead, elsewhere)] == ["running", "killed", "running"]


def test_runs_are_found_at_any_depth_and_not_within_a_run(tmp_path):
    for name in ("b", "sweep/2", "sweep/1"):
        make_run(tmp_path / name)
    make_run(tmp_path / "b/checkpoints/x")
    assert [one.name for one in find_runs(tmp_path)] == ["b", "sweep/1", "sweep/2"]
    assert [one.name for one in find_runs(tmp_path / "b")] == ["b"]
    assert open_run("first", "sweep/1", str(tmp_path)).directory == tmp_path / "sweep/1"
    assert open_run("first", str(tmp_path / "b"), "none").directory == tmp_path / "b"
    with pytest.raises(ConfigError, match=r"^second \(d\) is neither .* there are: b, sweep/1, sw"):
        open_run("second", "d", str(tmp_path))


def test_a_wrong_name_lists_only_some_of_many_runs(tmp_path):
    for number in range(300):
        make_run(tmp_path / f"sweep/{number:03d}")
    done = run_main("compare", "sweep/000", "nope", f"root={tmp_path}")
    known = ", ".join(f"sweep/{number:03d}" for number in range(5))
    assert done.stdout == (
        f"alexnet_ddp: second (nope) is neither a run below {tmp_path} nor the directory of one; "
        f"there are: {known} and 295 more; or give root=DIR\n"
    )


def test_a_start_that_was_refused_is_not_listed(tmp_path):
    make_run(tmp_path / "a")
    command = ["data=folder", f"data.root={tmp_path}/none", "run.name=b", f"run.root={tmp_path}"]
    done = run_main("train", *command, "device=cpu")
    assert done.returncode == 65, done.stdout
    assert json.loads((tmp_path / "b/status.json").read_text())["exit_code"] == 65
    done = run_main("runs", str(tmp_path))
    first = [one.split()[0] for one in done.stdout.splitlines() if one.strip()]
    assert (first.count("a"), first.count("b")) == (1, 0)
    done = run_main("runs", f"{tmp_path}/b")
    assert (done.returncode, done.stdout.count("\n")) == (64, 1)


def test_a_start_that_failed_and_one_that_is_on_its_way_are_listed(tmp_path):
    here = {"host": socket.gethostname(), "pid": os.getpid(), "step": 0}
    known = {
        "full": {"state": "failed", "exit_code": 74, "message": "the disk is full"},
        "new": {"state": "running", "exit_code": None},
        "typo": {"state": "failed", "exit_code": 64},
        "void": {"state": "failed", "exit_code": 65},
    }
    for name, status in known.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "status.json", here | status)
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/status.json").write_text("{")
    done = run_main("runs", str(tmp_path))
    rows = [one.split() for one in done.stdout.splitlines() if one.strip()]
    assert rows[-3:] == [["full", "failed", "0"], ["new", "running", "0"], ["zero", "unreadable"]]
    assert not {"typo", "void"} & {one[0] for one in rows}
    assert run_main("runs", str(tmp_path / "full")).returncode == 0


def test_differing_options_begin_with_those_of_the_command_lines(tmp_path):
    first = make_run(tmp_path / "a", options="seed: 0\noptimizer: {lr: 0.1, eps: 1}\ndata: {x: 1}")
    second = make_run(
        tmp_path / "b",
        options="seed: 1\noptimizer: {lr: 0.2}\ndata: {x: 1}",
        overrides=["+optimizer.lr=0.2", "model=alexnet"],
    )
    assert differing([first, second]) == ["optimizer.lr", "seed", "optimizer.eps"]
    assert differing([first]) == []
    (tmp_path / "b/config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read \(ParserError"):
        differing([RunRecord(tmp_path / "b", "b")])


def test_options_with_the_most_values_come_first_and_runs_without_options_do_not_count(tmp_path):
    runs = [
        make_run(
            tmp_path / str(k),
            options=f"data: {{limit_train: {k % 2}, mean: 7}}\noptimizer: {{lr: {k}}}",
            overrides=["data.limit_train=1", "optimizer.lr=1"],
        )
        for k in range(3)
    ]
    (tmp_path / "refused").mkdir()
    runs.append(RunRecord(tmp_path / "refused", "refused"))
    assert differing(runs) == ["optimizer.lr", "data.limit_train"]


def test_rows_are_sorted_by_numbers_from_the_largest_and_rows_without_one_are_last():
    rows = [{"name": "c"}, {"name": "b", "top1": 1.0}, {"name": "a"}, {"name": "d", "top1": 9.0}]
    assert [one["name"] for one in sorted_rows(rows, RunColumn.top1)] == ["d", "b", "a", "c"]
    assert [one["name"] for one in sorted_rows(rows, RunColumn.name)] == ["a", "b", "c", "d"]


def test_the_first_difference_is_found_and_rounding_is_none(tmp_path):
    a = make_run(tmp_path / "a", losses(1.0, 2.0, "nan", 4.0, 5.0))
    b = make_run(tmp_path / "b", losses(1.0, 2.00001, "nan", 4.001, 6.0))
    found = first_difference([a, b], "train/loss", close(1e-5))
    assert (found.step, found.last_equal) == (4, 3)
    assert "at step 4 (4.0 and 4.001) for the first time" in line("x", "train/loss", found, [a, b])
    assert first_difference([a, b], "train/loss", close(0)).step == 2
    assert first_difference([a, a], "train/loss", close(0)) is None
    assert "equal in all 5 common rows, up to step 5" in line("x", "train/loss", None, [a, a])
    rare = [
        make_run(tmp_path / name, [{"step": 10, "x": 1}, {"step": 20, "x": x}])
        for name, x in (("c", 1), ("d", 2))
    ]
    found = first_difference(rare, "x", close(0))
    assert "equal at step 10; rows are 10 steps apart" in line("x", "x", found, rare)
    assert line("x", "y", None, rare) == "x: no step has y in both runs"
    table = curve_table([a, b], 2, found.step - 17)
    assert table.row_count == 3  # the first, the last and step 3


def test_compare_shows_the_evaluations_of_both_runs_with_their_intervals(tmp_path, capsys):
    rows = [*losses(1.0, 2.0), evaluation(2, 50), {"step": 4, "val/top1": 25.0}]
    make_run(tmp_path / "base", rows)
    make_run(tmp_path / "wide", [*losses(1.0, 2.0), *(evaluation(k, 96) for k in (2, 3, 4))])
    compare(CompareConfig(first="base", second="wide", root=str(tmp_path)), [])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["val/top1", "95", "%", "val/top1", "95", "%"] in lines
    assert lines[-6:-3] == [
        ["2", "50.00", "40.4–59.6", "96.00", "90.2–98.4"],
        ["3", "96.00", "90.2–98.4"],
        ["4", "25.00", "96.00", "90.2–98.4"],
    ]
    assert ["2", "2", "2"] in lines  # the losses are in a table of their own
    runs = [RunRecord(tmp_path / name, name) for name in ("base", "wide")]
    assert evaluation_table(runs, 2).row_count == 2


def test_the_table_is_printed_and_written_with_a_column_for_each_option(tmp_path):
    make_run(tmp_path / "a", [{"step": 1, "val/top1": 12.5}], options="seed: 0\nx: null\n")
    make_run(tmp_path / "b", [evaluation(9, 50)], options="seed: 1\nx: true\n")
    done = run_main("runs", str(tmp_path), "sort=top1")
    assert done.returncode == 0, done.stdout
    lines = [one.split() for one in done.stdout.splitlines() if one.strip()][3:]
    assert lines == [
        ["b", "complete", "50.00", "40.4–59.6", "9", "seed=1", "x=true"],
        ["a", "complete", "12.50", "1", "seed=0", "x=null"],  # an older run without counts
    ]
    done = run_main("runs", str(tmp_path), f"output={tmp_path}/r.csv")
    assert done.returncode == 0, done.stdout
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["name", "status", "top1", "top1_low", "top1_high", "step"]
    assert [(one["name"], one["top1"], one["seed"], one["x"]) for one in rows] == [
        ("a", "12.5", "0", "null"),
        ("b", "50.0", "1", "true"),
    ]
    assert (rows[0]["top1_low"], rows[0]["top1_high"]) == ("", "")
    ends = float(rows[1]["top1_low"]), float(rows[1]["top1_high"])
    assert ends == percent_interval(50, 100)
    done = run_main("runs", str(tmp_path / "a/none"))
    assert (done.returncode, done.stdout.count("\n")) == (64, 1)
    assert "contains no runs" in done.stdout


def test_a_damaged_run_is_in_the_table_as_unreadable(tmp_path):
    make_run(tmp_path / "a", [{"step": 1, "val/top1": 12.5}], options="seed: 0\n")
    make_run(tmp_path / "b", [{"step": 9, "val/top1": 50.0}], options="seed: 1\n")
    (tmp_path / "b/run.json").write_text("{")
    done = run_main("runs", str(tmp_path))
    assert done.returncode == 0, done.stdout
    lines = [one.split() for one in done.stdout.splitlines() if one.strip()]
    assert "warning:" in lines[0]
    assert f"{tmp_path}/b/run.json" in lines[0]
    assert lines[-2:] == [["a", "complete", "12.50", "1"], ["b", "unreadable"]]


DEEP = "[" * 5_000  # Python's limit is 1,000 levels
EVALUATION = '{"step": 1, "val/top1": 90.0, "val/correct1": %s, "val/num_images": 7}'
BAD_FILES = [  # name, content, what the message states
    ("status.json", '{"step": "x"}', "step is a text"),
    ("status.json", '{"step": null}', "step is null"),
    ("status.json", '{"step": Infinity}', "step is a number"),
    ("status.json", "3", "it holds an integer in place of an object"),
    ("status.json", DEEP, "RecursionError"),
    ("run.json", "[]", "it holds a list in place of an object"),
    ("run.json", '{"choices": ["alexnet"]}', "choices is a list"),
    ("run.json", '{"overrides": 7}', "overrides is an integer"),
    ("config.yaml", DEEP, "RecursionError"),
    ("config.yaml", "a: &a {b: *a}", "RecursionError"),
    ("metrics.jsonl", '{"step": 1, "val/top1": "high"}', "val/top1 of step 1 is 'high'"),
    ("metrics.jsonl", '{"step": 1, "val/top1": null}', "val/top1 of step 1 is None"),
    ("metrics.jsonl", '{"step": 1, "time_s": [1]}', "time_s of step 1 is [1]"),
    (
        "metrics.jsonl",
        '{"step": 1, "time_s": "inf"}',
        "time_s of step 1 is 'inf', and out of range",
    ),
    ("metrics.jsonl", '{"step": 1, "time_s": 1e300}', "time_s of step 1 is 1e+300"),
    ("metrics.jsonl", '{"step": 1, "time_s": NaN}', "time_s of step 1 is nan"),
    ("metrics.jsonl", '{"step": 1, "time/step_s": "nan"}', "time/step_s of step 1 is 'nan'"),
    ("metrics.jsonl", '{"step": 1, "train/slowest_rank": "nan"}', "train/slowest_rank of step 1"),
    (
        "metrics.jsonl",
        '{"step": 1, "train/loss": 1%s}' % ("0" * 400),
        "train/loss of step 1 is 1000",
    ),
    ("metrics.jsonl", '{"step": 1, "val/num_images": "inf"}', "val/num_images of step 1 is 'inf'"),
    *[
        ("metrics.jsonl", EVALUATION % count, f"step 1 has {shown} correct of 7 images")
        for count, shown in (('"nan"', "nan"), ("8", "8"), ("-1", "-1"), ("Infinity", "inf"))
    ],
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_value_of_a_wrong_type_makes_a_run_unreadable(
    tmp_path, capsys, caplog, name, content, reason
):
    make_run(tmp_path / "a", [{"step": 1, "val/top1": 12.5}])
    make_run(tmp_path / "b")
    (tmp_path / "b" / name).write_text(content)
    list_runs(RunsConfig(root=str(tmp_path)), [])
    rows = [one.split() for one in capsys.readouterr().out.splitlines() if one.strip()]
    assert rows[-2:] == [["a", "complete", "12.50", "1"], ["b", "unreadable"]]
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/b/{name} cannot be read (")
    assert reason in message
    with pytest.raises(ConfigError) as refusal:
        report(
            compose("report", given := ["run.name=b", f"run.root={tmp_path}", "max_images=0"]),
            given,
        )
    assert str(refusal.value) == message


@pytest.mark.parametrize("metric", ["train/loss", "train/lr", "val/top1"])
@pytest.mark.parametrize("value", ["high", None, [1]])
def test_a_run_with_a_metric_of_a_wrong_type_is_not_compared(tmp_path, metric, value):
    make_run(tmp_path / "a", [{"step": 1, metric: 1.0}])
    make_run(tmp_path / "b", [{"step": 1, metric: value}])
    with pytest.raises(ConfigError) as refusal:
        compare(CompareConfig(first="a", second="b", root=str(tmp_path)), [])
    assert f"b/metrics.jsonl cannot be read (TypeError: {metric} of step 1 is" in str(refusal.value)


@pytest.mark.parametrize("step", ["null", '"x"', "Infinity", "[1]", "1.5"])
def test_a_row_without_a_step_is_left_out(tmp_path, step):
    one = make_run(tmp_path / "a", [{"step": 1, "val/top1": 12.5}])
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step}, "val/top1": 99.0}}\n{DEEP}\n')
    assert row(one) == {"name": "a", "status": "complete", "top1": 12.5, "step": 1}


def test_an_option_of_a_type_that_json_lacks_is_printed(tmp_path, capsys):
    make_run(tmp_path / "a", options="x: 2024-01-02\n")
    make_run(tmp_path / "b", options="x: 2024-01-03\n")
    list_runs(RunsConfig(root=str(tmp_path)), [])
    assert "x=2024-01-02" in capsys.readouterr().out.replace('"', "")


def test_neither_command_imports_torch():
    code = "import sys, alexnet_ddp.runs, alexnet_ddp.compare; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], env=ENV, text=True) == "False\n"


def test_a_link_to_a_folder_above_lists_no_run_twice(tmp_path):
    make_run(tmp_path / "a/one")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    assert [run.name for run in find_runs(tmp_path)] == ["a/one"]


def test_a_run_is_not_compared_with_itself(tmp_path, monkeypatch):
    make_run(tmp_path / "runs/a", losses(1.0))
    (tmp_path / "runs/link").symlink_to(tmp_path / "runs/a")
    monkeypatch.chdir(tmp_path)
    for second in ("a", "runs/a", str(tmp_path / "runs/a"), "link", "../runs/a"):
        with pytest.raises(
            ConfigError, match=r"^second \(.*\) is the directory of first \(a\) too;"
        ):
            compare(CompareConfig(first="a", second=second), [])


def train(directory: Path, seed: int = 0, rate_from_step_50: float = 0.1) -> None:
    """54 steps of a linear network, with the sampler and the record of a real run, at its cheapest."""
    images = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    model = nn.Linear(8, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    sampler = GlobalBatchSampler(40, 4, seed)
    options = f"seed: {seed}\nscheduler: {{rate_from_step_50: {rate_from_step_50}}}\n"
    make_run(directory, options=options)
    record = JsonlSink(directory / "metrics.jsonl", 0, print)
    for step in range(1, 55):
        rate = 0.1 if step < 50 else rate_from_step_50
        batch = sampler.batch(step - 1)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter -= rate * gradient
        row = {"train/loss": loss.item(), "train/lr": rate, "data/index_hash": index_hash(batch)}
        record.write(step, step / 10, row)
    record.close(0)


def test_compare_finds_another_seed_and_another_learning_rate_from_step_50(tmp_path, capsys):
    train(tmp_path / "base")
    train(tmp_path / "rate", rate_from_step_50=0.05)
    train(tmp_path / "seed", seed=1)
    compare(CompareConfig(first="base", second="rate", root=str(tmp_path)), [])
    shown = capsys.readouterr().out
    assert ["scheduler.rate_from_step_50", "0.1", "0.05"] in map(str.split, shown.splitlines())
    assert "images of a batch: equal in all 54 common rows, up to step 54" in shown
    assert "learning rates: differ by more than 1e-05 (relative) at step 50 (0.1 and" in shown
    # The loss of a step is computed before its update.
    assert "training losses: differ by more than 1e-05 (relative) at step 51 (" in shown

    compare(CompareConfig(first="base", second="seed", root=str(tmp_path)), [])
    shown = capsys.readouterr().out
    assert ["seed", "0", "1"] in map(str.split, shown.splitlines())
    assert "images of a batch: differ at step 1 (" in shown
    assert "learning rates: equal in all 54 common rows" in shown
    # The first loss of a network of zeros is log(4) for all images.
    assert "training losses: differ by more than 1e-05 (relative) at step 2 (" in shown


@pytest.mark.slow
def test_compare_finds_a_planted_difference_of_two_trainings_and_its_step(tmp_path):
    tiny = ["data=synthetic", "data.image_size=64", "data.num_train=40", "data.num_val=4"]
    tiny += ["data.num_classes=4", "trainer.global_batch_size=4", "trainer.epochs=99", *QUICK]
    tiny += ["trainer.log_every_steps=1", "trainer.eval_every_epochs=99", "scheduler=constant"]
    tiny += ["logger.tensorboard=false", "device=cpu", f"run.root={tmp_path}", "optimizer.lr=0.05"]

    def train_to(step: int, name: str, *more: str) -> None:
        done = run_main("train", *tiny, f"trainer.max_steps={step}", f"run.name={name}", *more)
        assert done.returncode == 0, done.stdout

    def differences_of(name: str) -> list[str]:
        done = run_main("compare", "base", name, f"root={tmp_path}")
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()[-3:]

    train_to(54, "base")
    train_to(54, "seed", "seed=1")
    train_to(49, "rate")
    train_to(54, "rate", "optimizer.lr=0.02", "resume.allow_changes=true")
    first = "differ by more than 1e-05 (relative) at step {} ("
    images, rates, losses = differences_of("rate")
    assert images == "images of a batch: equal in all 54 common rows, up to step 54"
    assert rates.startswith(f"learning rates: {first.format(50)}0.05 and 0.02) for the first time")
    # The loss of a step is computed before its update.
    assert losses.startswith(f"training losses: {first.format(51)}")
    assert losses.endswith(") for the first time")
    images, rates, losses = differences_of("seed")
    assert images.startswith("images of a batch: differ at step 1 (")
    assert rates == "learning rates: equal in all 54 common rows, up to step 54"
    assert losses.startswith(f"training losses: {first.format(1)}")


@pytest.mark.parametrize("command", ["report", "replay"])
def test_options_of_data_are_checked_with_those_of_the_run(tmp_path, command):
    make_run(tmp_path / "x", overrides=["data=folder", "data.root=none", "data.image_size=56"])
    write_json(tmp_path / "x/replay.json", {"step": 1, "world_size": 1, "loss": 1.0, "indices": []})
    done = run_main(command, f"run.root={tmp_path}", "run.name=x", "data.eval_resize=48")
    rule = "data.eval_resize (48) must be at least data.image_size (56)"  # whose default is 64
    assert (done.returncode, done.stdout) == (64, f"alexnet_ddp: {rule}\n")
