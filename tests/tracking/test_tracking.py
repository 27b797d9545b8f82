"""Tracking: log() and its sinks, on a real pseudo-terminal. test_tracking_wandb.py tests wandb."""

import contextlib
import json
import math
import os
import pty
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from alexnet_ddp.config import LoggerConfig, Wandb
from alexnet_ddp.tracking import ClassResults, RunInfo, build_tracker
from alexnet_ddp.tracking.sinks import TensorBoardSink

ROOT = Path(__file__).parents[2]
TRAIN = {"train/loss": 1.2034, "train/top1": 57.2, "train/lr": 0.02, "train/images_per_sec": 1234.0}
EVAL = {
    "val/loss": 0.4,
    "val/top1": 88.1,
    "val/top5": 99.2,
    "val/num_images": 1000,
    "val/correct1": 881,
}
PROGRAM = """
    import sys, time
    from pathlib import Path
    from alexnet_ddp.config import LoggerConfig, Wandb
    from alexnet_ddp.tracking import ClassResults, RunInfo, build_tracker
    def start(run_dir, mode, start_step):
        cfg = LoggerConfig(wandb=Wandb(mode), tensorboard=False)
        run = RunInfo(True, start_step, 60, 10, {"seed": 1, "api_key": "CANARY"})
        return build_tracker(cfg, Path(run_dir), run)
"""


def tracker(run_dir, start_step=0, is_main=True, **knobs):
    cfg = LoggerConfig(**{"tensorboard": False, **knobs})
    return build_tracker(cfg, run_dir, RunInfo(is_main, start_step, 624, 31, {"seed": 1}))


def log_steps(log, steps):
    for step in steps:
        log.log(step, step / 31, TRAIN)
        log.log(step, step / 31, EVAL)


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def start_program(body, *arguments, **options):
    code = textwrap.dedent(PROGRAM) + textwrap.dedent(body)
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {
        "PYTHONPATH": f"{options.pop('path', ROOT)}:{ROOT}",
        "NETRC": "/dev/null",
    } | options.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=env, **options)


def test_a_row_is_flat_and_begins_with_step_epoch_and_time(tmp_path):
    log = tracker(tmp_path)
    log.log(
        10, 0.5, {"train/loss": np.float32(0.5), "data/index_hash": "ab", "new/name": np.int64(3)}
    )
    log.close(0)
    (row,) = rows(tmp_path)
    assert list(row)[:3] == ["step", "epoch", "time_s"]
    assert row | {"time_s": 0} == {
        "step": 10, "epoch": 0.5, "time_s": 0, "train/loss": 0.5, "data/index_hash": "ab", "new/name": 3,
    }  # fmt: skip


def test_values_that_are_not_finite_stay_valid_json_and_are_read_back_by_float(tmp_path):
    log = tracker(tmp_path)
    log.log(1, 0.1, {"train/loss": math.nan, "a": math.inf, "b": -math.inf})
    log.close(0)
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["train/loss"], float(row["a"]), float(row["b"])) == ("nan", math.inf, -math.inf)


def test_a_resumed_run_drops_later_and_damaged_rows_and_continues_the_clock(tmp_path, capsys):
    log = tracker(tmp_path)
    time.sleep(0.05)
    log_steps(log, (10, 20, 30))
    log.close(75)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:4]
    log_steps(log := tracker(tmp_path, start_step=20), (30, 40))
    log.close(0)
    assert [row["step"] for row in rows(tmp_path)] == [10, 10, 20, 20, 30, 30, 40, 40]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:4] == kept
    times = [row["time_s"] for row in rows(tmp_path)]
    assert times == sorted(times)
    assert "1 damaged row dropped" in capsys.readouterr().out


def test_a_run_that_restarts_at_step_0_drops_all_rows(tmp_path):
    log_steps(log := tracker(tmp_path), (0, 10))
    log.close(1)
    log_steps(log := tracker(tmp_path), (0,))
    log.close(0)
    assert [row["step"] for row in rows(tmp_path)] == [0, 0]


def test_a_full_disk_costs_rows_but_not_the_run(tmp_path, capsys):
    log = tracker(tmp_path)
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), log._record._fd)
    log_steps(log, (1, 2))
    log.close(0)
    os.close(full)
    assert "warning: a row of" in (out := capsys.readouterr().out)
    assert "4 rows of" in out


def test_rank_1_has_no_sinks_and_writes_nothing(tmp_path, capsys):
    log = tracker(tmp_path / "run", is_main=False, tensorboard=True, wandb=Wandb.offline)
    log_steps(log, (1, 2))
    log.advance(3)
    log.say("hello")
    log.close(0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_without_a_terminal_plain_lines_are_printed(tmp_path, capsys):
    log = tracker(tmp_path)
    log.log(120, 3.85, TRAIN | {"data/index_hash": "ab", "time/data_s": 0.1})
    log.log(124, 4.0, EVAL)
    log.log(125, 4.1, {"unknown/name": 1.0})
    log.close(0)
    assert capsys.readouterr().out.splitlines() == [
        "step 120/624  epoch 3.85  loss 1.2034  top1 57.2  lr 0.0200  1,234 img/s",
        "epoch 4  val/top1 88.10  val/top5 99.20  val/loss 0.40  (1,000 images)",
    ]


@pytest.mark.slow
def test_a_closed_stdout_does_not_end_the_run(tmp_path):
    body = "t = start(sys.argv[1], 'disabled', 0)\nfor i in range(99): t.log(i, 0.0, {'train/loss': 1.0})\nt.close(0)"
    read, write = os.pipe()
    os.close(read)
    program = start_program(body, tmp_path, stdout=write)
    os.close(write)
    assert program.wait(20) == 0
    assert len(rows(tmp_path)) == 99


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar_below_the_evaluations(tmp_path):
    body = """
        t = start(sys.argv[1], "disabled", 20)
        t.say("hello from above")
        began = time.perf_counter()
        for _ in range(10_000):
            t.advance(30)
        t.say(f"advance {(time.perf_counter() - began) * 100:.3f} us")
        t.log(30, 3.0, {"train/loss": 1.2034, "train/top1": 57.2, "train/images_per_sec": 1234.0})
        t.log(30, 3.0, {"val/top1": 88.1, "val/loss": 0.4, "val/num_images": 1000})
        print("a stray print")
        time.sleep(0.6)
        t.close(0)
        t.say("after the end")
    """
    terminal, end = pty.openpty()
    program = start_program(body, tmp_path, stdout=end, env={"TERM": "xterm", "COLUMNS": "110"})
    os.close(end)
    output = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while chunk := os.read(terminal, 65536):
            output += chunk
    os.close(terminal)
    assert program.wait(10) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert text.count("epoch 3  val/top1 88.10  val/loss 0.40  (1,000 images)") == 1
    assert re.search(r"step\s+30/60 .*epoch 3.00 .*ETA", text)
    assert "loss 1.2034  top1 57.2  1,234 img/s  |  val/top1 88.10" in text
    assert all(line in text for line in ("hello from above", "a stray print", "after the end"))
    hidden, shown, evaluated = (
        output.index(text) for text in (b"\x1b[?25l", b"\x1b[?25h", b"val/top1 88.10  val/loss")
    )
    assert (
        hidden < shown < evaluated
    )  # the cursor is there at once: a killed process leaves a usable terminal
    assert float(re.search(r"advance ([\d.]+) us", text)[1]) < 50


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def loss(value, start_step, steps, close):
        log = tracker(tmp_path, start_step=start_step, tensorboard=True)
        for step in steps:
            log.log(step, 0.0, {"train/loss": value, "data/index_hash": "ab"})
        if close:
            log.close(0)
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert events.Tags()["scalars"] == ["train/loss"]
        return [(event.step, event.value) for event in events.Scalars("train/loss")], log

    shown, first = loss(1.0, 0, (10, 20, 30), close=False)
    assert shown == [(10, 1.0), (20, 1.0), (30, 1.0)]  # flushed with each row
    time.sleep(1.1)  # event files are ordered by the second in their name
    shown, _ = loss(2.0, 20, (30, 40), close=True)
    assert shown == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]
    first.close(0)


def test_tensorboards_table_shows_the_best_results_of_all_starts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    def evaluated(start_step, *rows):
        log = tracker(tmp_path, start_step=start_step, tensorboard=True)
        for step, top1, loss in rows:
            log.log(step, 0.0, {"val/top1": top1, "val/loss": loss})
        log.close(0)

    evaluated(0, (10, 50.0, 1.5), (20, 70.0, 1.2), (30, 90.0, 1.0))
    time.sleep(1.1)  # event files are ordered by the second in their name
    evaluated(20, (30, 60.0, 1.1), (40, 65.0, float("nan")))  # repeats step 30 with another result
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    shown = [one.name.tag for one in HParamsPluginData.FromString(content).experiment.metric_infos]
    assert shown == ["best/val/top1", "best/val/loss", "train/loss"]
    best = [[(one.step, one.value) for one in events.Scalars(name)] for name in shown[:2]]
    assert best[0] == [(10, 50.0), (20, 70.0), (30, 70.0), (40, 70.0)]
    assert best[1] == [
        (k, pytest.approx(v)) for k, v in ((10, 1.5), (20, 1.2), (30, 1.1), (40, 1.1))
    ]


@pytest.mark.parametrize(("num_classes", "side"), [(5, 40), (300, 900), (1000, 1000)])
def test_tensorboards_confusion_matrix_is_at_most_1000_pixels_wide(tmp_path, num_classes, side):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, 0, {}, "")
    counts = np.eye(num_classes, dtype=np.int64)
    sink.classes(ClassResults(4, [], np.zeros((num_classes, 3)), counts))
    sink.close(0, "")
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("val/confusion_matrix")
    assert (image.step, image.width, image.height) == (4, side, side)
