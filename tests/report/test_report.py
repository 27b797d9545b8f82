"""The parts of a report: charts, time axis, classes, maps, facts; the page escapes what it shows."""

import json
import math
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ddp.cli import without_data_options
from alexnet_ddp.config import Device
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.report import ReportConfig
from alexnet_ddp.report.activation import activation_maps, overlay
from alexnet_ddp.report.charts import Scale, Series, line_chart, short, thinned
from alexnet_ddp.report.classes import class_results
from alexnet_ddp.report.command import build_page, main
from alexnet_ddp.report.curves import charts
from alexnet_ddp.report.facts import differences, option_rows, summary
from alexnet_ddp.report.images import first_filters
from alexnet_ddp.report.page import render
from alexnet_ddp.report.timeline import duration, timeline
from alexnet_ddp.report.times import profiles, times
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import ConfigError, DataError, Preempted
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.run_command import command_of
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.tracking import record
from alexnet_ddp.tracking.record import RunStatus
from alexnet_ddp.training.calibration import Scores
from alexnet_ddp.training.profiler import TimeShares
from alexnet_ddp.training.stragglers import Stopwatch, Stragglers
from tests.test_main import ENV
from tests.test_runs import make_run

EVIL = "<script>alert('x')</script><img src=http://evil/x>"


def train_row(step: int, time_s: float, **more: float) -> dict:
    row = {"step": step, "epoch": step / 10, "time_s": time_s, "train/loss": 3 / step}
    row |= {"train/lr": 0.1, "train/images_per_sec": 100.0, "time/step_s": 1.0, "time/data_s": 0.25}
    return row | {key.replace("__", "/"): value for key, value in more.items()}


def val_row(step: int, time_s: float, correct: int) -> dict:
    row = {
        "step": step,
        "epoch": step / 10,
        "time_s": time_s,
        "val/loss": 1.0,
        "val/top5": 90.0,
        "val/correct5": 90,
    }
    return row | {"val/top1": float(correct), "val/correct1": correct, "val/num_images": 100}


# --- charts -------------------------------------------------------------------------------------


def test_a_line_of_one_value_is_a_dot():
    one = line_chart("Loss", "", [Series("a", 0, [(50, 2.9)])])
    two = line_chart("Loss", "", [Series("a", 0, [(50, 2.9), (100, 2.8)])])
    assert [len(chart.lines[0].dots) for chart in (one, two)] == [1, 0]


def test_a_line_is_interrupted_at_values_that_are_not_finite_and_axes_end_at_round_numbers():
    points = [(1.0, 0.1), (2.0, math.nan), (3.0, 0.7), (4.0, 0.93)]
    chart = line_chart("Loss", "", [Series("a", 0, points), Series("empty", 1, [])])
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert len(chart.lines) == 1
    assert chart.lines[0].path.count("M") == 2
    assert chart.lines[0].path.count("L") == 1
    assert [x for x, _ in chart.values["series"][0]["points"]] == [1.0, 3.0, 4.0]
    assert line_chart("Loss", "", [Series("a", 0, [(1.0, math.inf)])]) is None


def test_values_that_differ_by_orders_of_magnitude_get_a_logarithmic_axis_if_they_may():
    series = [Series("a", 0, [(1.0, 1e-3), (2.0, 50.0)])]
    assert line_chart("Norm", "", series, may_be_log=True).is_log
    assert [tick.text for tick in line_chart("Norm", "", series, may_be_log=True).y_ticks] == [
        "0.001", "0.01", "0.1", "1", "10",
    ]  # fmt: skip
    assert not line_chart("Norm", "", series).is_log
    scale = Scale(1.0, 100.0, 0.0, 10.0, is_log=True)
    assert (scale(1.0), scale(10.0), scale(100.0)) == (0.0, 5.0, 10.0)


def test_a_long_line_keeps_its_ends_and_its_extremes():
    points = [(float(k), math.sin(k / 50)) for k in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thinned(points, 400)
    assert len(kept) <= 402
    assert (4321.0, 99.0) in kept
    assert kept == sorted(kept)
    assert kept[0][0] < 50 and kept[-1][0] > 9_950  # noqa: PT018


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1500, "1.5k"), (2e6, "2M"), (1e-5, "1e-5"), (6e-4, "6e-4"), (-20, "-20"), (2.77e36, "2.8e36")],
)  # fmt: skip
def test_numbers_of_an_axis_are_short(value, text):
    assert short(value) == text


def test_a_run_alone_has_colours_by_metric_and_compared_runs_have_colours_by_run(tmp_path):
    rows = [train_row(10, 10), val_row(10, 12, 40), train_row(20, 20), val_row(20, 22, 60)]
    one, other = (make_run(tmp_path / name, rows) for name in "ab")
    (loss, *_) = charts([one])
    assert [(line.label, line.colour) for line in loss.lines] == [
        ("training", 0),
        ("validation", 1),
    ]
    assert [chart.title for chart in charts([one])] == [
        "Loss", "Top-1", "Learning rate", "Throughput", "Time of a step",
    ]  # fmt: skip
    (loss, *_) = charts([one, other])
    assert [(line.label, line.colour, line.is_faint) for line in loss.lines] == [
        ("a training", 0, True), ("a validation", 0, False),
        ("b training", 1, True), ("b validation", 1, False),
    ]  # fmt: skip
    assert charts([make_run(tmp_path / "c")]) == []


# --- times --------------------------------------------------------------------------------------


def test_the_parts_of_a_step_are_weighted_by_steps_and_add_up(tmp_path):
    parts = {"time__forward_s": 0.2, "time__backward_s": 0.2, "time__update_s": 0.05}
    parts["time__exchange_s"] = 0.1
    slower = {"time__step_s": 2.0, "time__data_s": 1.25, "train__slowest_rank": 1}
    rows = [train_row(10, 12, **parts), train_row(30, 60, **parts, **slower)]
    found = times(make_run(tmp_path / "a", rows))
    assert sum(part.share for part in found.step) == pytest.approx(1)
    wait, forward, *_, rest = found.step
    assert wait.share == pytest.approx((10 * 0.25 + 20 * 1.25) / (10 * 1 + 20 * 2))
    assert forward.seconds == pytest.approx(0.2)
    assert rest.share == pytest.approx((10 * 0.2 + 20 * 0.2) / 50)
    assert [part.name for part in found.step] == [
        "wait for data", "forward", "backward", "exchange with other ranks", "update",
        "everything else",
    ]  # fmt: skip
    assert [part.seconds for part in found.run] == pytest.approx([50, 0, 0, 10])
    (sentence,) = found.sentences
    assert sentence.startswith("The loader is the bottleneck: a step waits 55.0 %")
    assert found.slowest == [(1, 1.0)]
    assert found.ranks == []
    seconds = [[0.1, 0.2, 0.6, 0.1], [0.5, 0.2, 0.2, 0.1]] + [[0.0, 0.1, 0.3, 0.1]] * 16
    content = {"phases": ["data", "forward", "exchange", "checkpoint"], "seconds": seconds}
    write_json(tmp_path / "a/rank_times.json", content)
    found = times(RunRecord(tmp_path / "a", "a"))
    assert [rank for rank, _ in found.ranks] == list(range(16))
    assert found.num_ranks_left_out == 2
    assert [(part.name, part.share) for part in found.ranks[1][1]] == [
        ("wait for data", 0.5), ("forward", 0.2), ("exchange with other ranks", 0.2),
        ("checkpoints", 0.1),
    ]  # fmt: skip
    slow_link = train_row(10, 12, time__data_s=0.01, time__exchange_s=0.4)
    assert times(make_run(tmp_path / "b", [slow_link])).sentences == [
        "The loader is no bottleneck: a step waits 1.0 % of its time for data.",
        "Rank 0 waits 40.0 % of a step for the exchange with other ranks. If no rank is slow, "
        "a faster link shortens it; docs/parallelism.md describes how to exchange less.",
    ]
    assert times(make_run(tmp_path / "c")) is None


def test_the_parts_of_all_work_include_evaluations_and_checkpoints(tmp_path):
    rows = [train_row(10, 12), val_row(10, 15, 50) | {"time/evaluation_s": 3.0}]
    run = make_run(tmp_path / "a", rows)
    status = RunStatus(run.directory, is_main=True)
    status.running(0)
    status.saved(5, 0.5)
    status.saved(10, 1.5)
    found = times(run).run
    assert [(part.name, part.seconds) for part in found] == [
        ("training steps", 10.0), ("evaluations", 3.0), ("checkpoints", 2.0),
        ("everything else", 0.0),
    ]  # fmt: skip
    assert sum(part.share for part in found) == pytest.approx(1)


def test_the_same_name_has_the_same_colour_in_all_charts_of_the_times(tmp_path):
    rows = [train_row(10, 12, time__forward_s=0.2, time__backward_s=0.2), val_row(10, 15, 50)]
    run = make_run(tmp_path / "a", rows)
    phases = ["data", "forward", "backward", "exchange", "update", "evaluation", "checkpoint"]
    write_json(tmp_path / "a/rank_times.json", {"phases": phases, "seconds": [[0.1] * 7] * 2})
    found = times(run)
    by_name = {}
    for part in (*found.step, *found.run[1:], *found.ranks[0][1]):
        by_name.setdefault(part.name, set()).add(part.colour)
    assert all(len(colours) == 1 for colours in by_name.values()), by_name
    for chart in (found.step, found.run, found.ranks[0][1]):
        assert len({part.colour for part in chart}) == len(chart)


def test_a_profile_is_shown_with_its_conclusion_and_a_damaged_one_is_not(tmp_path):
    run = make_run(tmp_path / "a")
    shares = TimeShares(80.0, data=0.5, compute=0.25, communication=0.2, other=0.05)
    write_json_in(run.directory / "profile/rank0.json", shares.record)  # as the profiler does
    (run.directory / "profile/rank0.txt").write_text("aten::mm")
    (run.directory / "profile/rank1.json").write_text("{}")
    (found,) = profiles(run)
    assert (found.name, found.operators) == ("rank 0", "aten::mm")
    assert found.conclusion == shares.conclusion
    assert [part.seconds for part in found.parts] == pytest.approx([0.04, 0.02, 0.016, 0.004])


def write_json_in(file: Path, content: dict) -> None:
    file.parent.mkdir()
    write_json(file, content)


def test_a_row_has_the_seconds_of_each_part_of_a_step():
    world = World(0, 0, 1, 1, torch.device("cpu"))
    watch = Stopwatch(world)
    with watch.backward():
        sum(range(20_000))
    seconds = watch.read()
    assert seconds["exchange"] == 0
    row = Stragglers(world).row(seconds, 2, 1.0)
    assert row == {
        "time/forward_s": 0.0, "time/backward_s": seconds["backward"] / 2, "time/update_s": 0.0,
    }  # fmt: skip
    assert row["time/backward_s"] > 0
    assert set(watch.read().values()) == {0.0}
    assert Stragglers(world).row(seconds, 0, 0.0) == {}


# --- starts, stops and faults -------------------------------------------------------------------


def starts(run: RunRecord, *times_and_steps: tuple[str, int]) -> None:
    known = [
        {"time": f"2026-01-01T{time}+00:00", "start_step": step, "world_size": 2, "host": "h"}
        for time, step in times_and_steps
    ]
    write_json(run.directory / "run.json", {**known[-1], "starts": known})


def test_options_that_changed_when_a_run_resumed_are_among_the_events(tmp_path):
    run = make_run(tmp_path / "a", [train_row(10, 10), train_row(20, 70)])
    given = ["model=alexnet", "optimizer.lr=0.05"], ["model=alexnet", "optimizer.lr=0.01", "seed=0"]
    known = [
        {"time": f"2026-01-01T1{k}:00:00+00:00", "start_step": 10 * k, "overrides": overrides}
        for k, overrides in enumerate([*given, ["model=alexnet"]])
    ]
    write_json(run.directory / "run.json", {**known[-1], "starts": known})
    found = timeline(run)
    assert found.has_changes
    assert [text for _, _, what, text in found.rows if what == "start"] == [
        "started",
        "resumed from step 10, with optimizer.lr=0.01 seed=0",
        "resumed from step 20, without optimizer.lr=0.01 seed=0",
    ]
    starts(run, ("10:00:00", 0), ("11:00:00", 10))
    assert not timeline(RunRecord(run.directory, "a")).has_changes


def test_a_killed_and_a_stopped_start_are_on_the_axis_with_their_marks(tmp_path):
    rows = [train_row(10, 10), val_row(10, 12, 50), train_row(20, 70), val_row(20, 75, 60)]
    rows += [train_row(30, 90, train__num_rollbacks=2)]
    at = {"time": "2026-01-01T12:20:00+00:00", "host": "h"}
    run = make_run(tmp_path / "x", rows, state="complete", step=30, **at)
    starts(run, ("10:00:00", 0), ("11:00:00", 10), ("12:00:00", 20))
    events = [
        {"time": "2026-01-01T10:00:11+00:00", "event": "save", "step": 10},
        {"time": "2026-01-01T10:00:40+00:00", "event": "lost", "step": 15, "message": "rank 1 died"},
        {"time": "2026-01-01T11:01:05+00:00", "event": "save", "step": 20},
        {"time": "2026-01-01T11:01:06+00:00", "event": "end", "step": 20, "state": "preempted",
         "message": "stopped at step 20"},
        {"time": "2026-01-01T12:00:30+00:00", "event": "end", "step": 30, "state": "complete"},
        {"time": "2026-01-01T12:20:00+00:00", "event": "end", "step": 30, "state": "complete"},
    ]  # fmt: skip
    text = "".join(json.dumps(one) + "\n" for one in events) + '{"time": "2026'
    (run.directory / "events.jsonl").write_text(text)
    found = timeline(run)
    assert [(one.end, one.ended - one.began) for one in found.starts] == [
        ("killed", 40.0), ("stopped", 66.0), ("complete", 30.0),
    ]  # fmt: skip
    assert [pause.text for pause in found.pauses] == ["59 min 20 s pause", "58 min 54 s pause"]
    assert [row[1:] for row in found.rows] == [
        (0, "start", "started, 2 rank(s), h"),
        (10, "checkpoint", "checkpoint of step 10"),
        (10, "evaluation", "top-1 50.00 % (40.4–59.6 %), loss 1"),
        (15, "end", "killed: rank 1 died"),
        (10, "start", "resumed from step 10, 2 rank(s), h"),
        (20, "evaluation", "top-1 60.00 % (50.2–69.1 %), loss 1"),
        (20, "checkpoint", "checkpoint of step 20"),
        (20, "end", "stopped: stopped at step 20"),
        (20, "start", "resumed from step 20, 2 rank(s), h"),
        (30, "event", "2 × rollback"),
        (30, "end", "complete"),
    ]  # fmt: skip
    # One start after the other, without the hours between them.
    first, second, third = found.bars
    assert first.left < first.left + first.width < second.left
    assert second.left + second.width < third.left
    assert first.lost / first.width == pytest.approx(29 / 40, rel=0.02)  # since the checkpoint
    assert second.lost == third.lost == 0
    assert second.width / first.width == pytest.approx(66 / 40, rel=0.02)
    evaluations = [dot.at for dot in found.dots if dot.lane == 1]
    assert first.left < evaluations[0] < first.left + first.width
    assert second.left < evaluations[1] < second.left + second.width
    assert [dot.is_fault for dot in found.dots if dot.lane == 3] == [True]


def test_hours_of_work_are_those_that_counted(tmp_path):
    # The first start was killed at step 15 after 30 s, and its checkpoint was of step 10.
    run = make_run(tmp_path / "x", [train_row(10, 20), train_row(20, 40)])
    starts(run, ("10:00:00", 0), ("11:00:00", 10))
    assert 3600 * run.hours == 40
    given = [f"run.root={tmp_path}", "run.name=x", "max_images=0"]
    main(compose("report", given), given)
    html = (tmp_path / "x/report.html").read_text()
    assert "<b>40 s</b><small>2 starts, without work that was lost</small>" in html


def test_a_start_that_wandb_stopped_has_its_end_on_the_axis_and_in_the_table(tmp_path):
    at = {"time": "2026-01-01T10:00:50+00:00", "host": "h", "message": "stopped from wandb"}
    run = make_run(tmp_path / "x", [train_row(10, 10)], state="stopped", step=20, **at)
    starts(run, ("10:00:00", 0))
    end = {"time": "2026-01-01T10:00:40+00:00", "event": "end", "step": 20, "state": "stopped"}
    (run.directory / "events.jsonl").write_text(json.dumps(end | {"message": "stopped from wandb"}))
    found = timeline(run)
    ((one,), (bar,)) = found.starts, found.bars
    assert (one.end, one.ended - one.began, bar.end) == ("stopped", 40.0, "stopped")
    assert found.rows[-1][1:] == (20, "end", "stopped: stopped from wandb")
    given = [f"run.root={tmp_path}", "run.name=x", "max_images=0"]
    main(compose("report", given), given)
    html = (tmp_path / "x/report.html").read_text()
    assert '<path class="stop stopped"' in html
    assert '<span class="status stopped">' in html
    assert ".status.stopped {" in html


def test_a_run_without_events_has_the_starts_that_it_recorded(tmp_path):
    at = {"time": "2026-01-01T10:05:00+00:00", "host": "elsewhere"}
    run = make_run(tmp_path / "x", state="failed", message="no memory", **at)
    starts(run, ("10:00:00", 0))
    (run.directory / "metrics.jsonl").unlink()
    (one,) = timeline(run).starts
    assert (one.end, one.message, one.ended - one.began) == ("failed", "no memory", 300.0)
    assert timeline(make_run(tmp_path / "y")) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (59.6, "1 min"), (75, "1 min 15 s"), (4800, "1 h 20 min"), (176400, "2 d 1 h")],
)  # fmt: skip
def test_durations_are_rounded_to_two_units(seconds, text):
    assert duration(seconds) == text


def events_of(run_dir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [(row["event"], row["step"], row.get("state")) for row in rows]


def test_saves_ends_and_a_start_that_was_killed_are_recorded(tmp_path, caplog):
    RunStatus(tmp_path, is_main=False).running(0)
    assert list(tmp_path.iterdir()) == []
    first = RunStatus(tmp_path, is_main=True)
    first.running(0)
    first.saved(5, 0.25)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n{"st')
    failure = {"rank": 1, "host": "h", "cause": "died", "phase": "forward"}
    failure |= {"time": datetime.now(UTC).isoformat()}
    write_json(tmp_path / "failure.json", failure)
    # A later process finds the status of the first one, which has recorded no end.
    status = json.loads((tmp_path / "status.json").read_text())
    write_json(tmp_path / "status.json", status | {"pid": os.getpid() + 1})
    second = RunStatus(tmp_path, is_main=True)
    second.running(5)
    second.finished(Preempted("key=secret stopped"))
    third = RunStatus(tmp_path, is_main=True)
    third.running(5)
    third.finished(None)
    assert events_of(tmp_path) == [
        ("save", 5, None), ("lost", 8, None), ("end", 5, "preempted"), ("end", 5, "complete"),
    ]  # fmt: skip
    written = (tmp_path / "events.jsonl").read_text()
    assert "secret" not in written
    assert written.count('"message": "rank 1 on h died, phase: forward"') == 1
    assert caplog.text == ""
    (tmp_path / "status.json").write_text("torn")
    RunStatus(tmp_path, is_main=True).running(5)
    assert "the end of the earlier start could not be recorded" in caplog.text
    assert record.events.FILE == "events.jsonl"


# --- classes and images -------------------------------------------------------------------------


def test_the_worst_classes_come_first_with_their_confusions():
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 2)
    found = torch.tensor([0, 1, 1, 2, 1, 1, 1, 0, 2, 2])
    results = class_results(Scores(torch.eye(4)[found], labels, torch.arange(10)), list("abcd"))
    assert [(one.name, one.num_images, one.top1) for one in results.worst] == [
        ("a", 4, 25.0), ("b", 4, 75.0), ("c", 2, 100.0),
    ]  # fmt: skip
    worst = results.worst[0]
    assert worst.taken_for == [("b", 2), ("c", 1)]
    assert 0 < worst.low < 25 < worst.high < 100
    assert results.pairs == [("a", "b", 2, 4), ("a", "c", 1, 4), ("b", "a", 1, 4)]
    matrix = [[cell.count for cell in row] for row in results.confusion.rows]
    assert matrix == [[1, 2, 1, 0], [1, 3, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    assert results.balanced == pytest.approx(200 / 3)
    assert results.balanced_interval[0] < results.balanced < results.balanced_interval[1]
    right = class_results(Scores(torch.eye(4)[labels], labels, torch.arange(10)), list("abcd"))
    assert (right.balanced, right.balanced_interval) == (100, None)


def test_of_many_classes_the_matrix_shows_those_that_are_confused():
    labels = torch.arange(100)
    found = labels.clone()
    found[[7, 93]] = torch.tensor([93, 7])
    names = [f"class {k}" for k in range(100)]
    shown = class_results(Scores(torch.eye(100)[found], labels, labels), names).confusion
    assert len(shown.names) == len(shown.rows) == 24
    assert {"class 7", "class 93"} <= set(shown.names)
    assert shown.num_classes == 100


class Bright(nn.Module):
    """Class 1 is a bright image, seen by the second convolution; the last layer is linear."""

    def __init__(self) -> None:
        super().__init__()
        blur = [nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, padding=1)]
        self.features = nn.Sequential(*blur, nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.classifier = nn.Linear(2, 2)
        for layer in (*self.features, self.classifier):
            for parameter in layer.parameters():
                nn.init.constant_(parameter, 0.1 if parameter.dim() > 1 else 0.0)
        with torch.no_grad():
            self.classifier.weight[0] *= -1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def test_a_map_is_largest_at_what_speaks_for_the_class():
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, 2:5, 10:13] = 1
    images[1, :, 12:15, 1:4] = 1
    model = Bright().eval()
    maps = activation_maps(model, images, torch.tensor([1, 1]))
    assert maps.shape == (2, 16, 16)
    assert maps.max() == pytest.approx(1)
    assert np.unravel_index(maps[0].argmax(), (16, 16)) == (3, 11)
    assert np.unravel_index(maps[1].argmax(), (16, 16)) == (13, 2)
    assert activation_maps(model, images, torch.tensor([0, 0])).max() == 0  # nothing speaks for it
    pixels = np.full((64, 64, 3), 128, np.uint8)
    drawn = overlay(pixels, maps[0])
    assert drawn[14, 46, 0] > 160  # red
    assert (drawn[60, :8] == 128).all()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    assert activation_maps(flat, images, torch.tensor([1, 1])) is None


@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_finite_have_a_map_of_zeros_and_no_picture_of_filters():
    model = Bright().eval()
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    maps = activation_maps(model, torch.ones(1, 3, 16, 16), torch.tensor([1]))
    assert (overlay(np.full((16, 16, 3), 128, np.uint8), maps[0]) == 128).all()
    convolution = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        convolution.weight[0, 0, 0, 0] = 3e38
        convolution.weight[0, 0, 0, 1] = -3e38
        assert first_filters(convolution) is not None
        convolution.weight[0, 0, 0, 0] = torch.inf
    assert first_filters(convolution) is None


def test_filters_are_shown_if_they_take_colours():
    shown = first_filters(nn.Sequential(nn.Conv2d(3, 20, 5), nn.Conv2d(20, 4, 3)))
    assert (shown.layer, shown.shape, shown.num_shown) == ("0", (20, 3, 5, 5), 20)
    assert shown.picture.startswith("data:image/png;base64,")
    assert first_filters(nn.Sequential(nn.Conv2d(1, 8, 3))) is None
    assert first_filters(nn.Sequential(nn.Linear(3, 3))) is None


# --- facts and the page -------------------------------------------------------------------------


def test_the_summary_has_the_best_evaluation_and_the_command_has_another_name(tmp_path):
    rows = [val_row(10, 12, 50), val_row(20, 22, 60), val_row(30, 33, 60)]
    run = make_run(tmp_path / "x", rows, overrides=["run.name=x", "data.root=my data", "seed=1"])
    best = summary(run).result
    assert (best.top1, best.step, best.num_evaluations) == (60.0, 20, 3)
    assert best.top1_interval == pytest.approx((50.2, 69.06), abs=0.05)
    assert best.top5_interval == pytest.approx((82.56, 94.48), abs=0.05)
    expected = "python -m alexnet_ddp.train 'data.root=my data' seed=1 run.name=x-again"
    assert command_of(run) == expected
    lr, *_ = (one for one in option_rows(run, {"optimizer.lr": 0.5}) if one.name == "optimizer.lr")
    assert (lr.value, lr.default, lr.is_notable) == ("0.1", "0.5", True)
    assert not any(one.is_notable for one in option_rows(run, {}))
    other = make_run(tmp_path / "y", options="optimizer:\n  lr: 0.2\n")
    assert differences([run, other]) == ([("optimizer.lr", ["0.1", "0.2"])], 0)
    assert differences([run]) == ([], 0)


TRAIN = ["/usr/bin/python3", "-m", "alexnet_ddp.train"]
OF_NODES = "torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"command": [*TRAIN, "--config-dir", "my conf"]}, "python -m {} --config-dir 'my conf'"),
        ({"command": [*TRAIN, "-cd=a", "--config-dir=b"]}, "python -m {} --config-dir b"),
        ({"command": TRAIN, "world_size": 8}, "torchrun --nproc_per_node=8 -m {}"),  # an older run
        ({"world_size": 8, "local_world_size": 8, "num_nodes": 1}, "torchrun --nproc_per_node=8 -m {}"),
        ({"world_size": 8, "local_world_size": 4, "num_nodes": 2}, f"{OF_NODES} --rdzv-id=x-again -m {{}}"),
    ],
)  # fmt: skip
def test_the_command_has_the_folder_of_configurations_and_the_nodes_of_the_run(
    tmp_path, known, expected
):
    run = make_run(tmp_path / "x")
    write_json(tmp_path / "x/run.json", {"overrides": ["seed=1"]} | known)
    assert command_of(run) == expected.format("alexnet_ddp.train") + " seed=1 run.name=x-again"


class Tags(HTMLParser):
    """The elements of a page, and the addresses of what they load."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.addresses = [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.names.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def options(tmp_path: Path, *more: str) -> ReportConfig:
    return compose("report", [f"run.root={tmp_path}", *more])


def test_a_page_escapes_names_and_loads_nothing_from_outside(tmp_path):
    rows = [train_row(10, 10), val_row(10, 12, 50)]
    here = {"host": socket.gethostname(), "pid": os.getpid(), "message": EVIL}
    run = make_run(tmp_path / "x", rows, overrides=[f"data.root={EVIL}"], state="running", **here)
    write_json(tmp_path / "x/classes.json", {"ids": ["a"], "names": [EVIL]})
    (tmp_path / "x/quarantine.jsonl").write_text(json.dumps({"split": EVIL, "reason": EVIL}) + "\n")
    other = RunRecord(make_run(tmp_path / "y", rows, options="seed: 1\n").directory, EVIL)
    html = render(build_page([run, other], options(tmp_path, "run.name=x", "max_images=0"), []))
    tags = Tags()
    tags.feed(html)
    assert html.count("&lt;script&gt;alert") >= 4
    assert tags.names.count("script") == 2  # the values, and the page's own
    assert "img" not in tags.names
    assert tags.addresses == []
    assert "url(" not in html
    assert ">running</span>" in html
    assert "Not computed: no images were used, because max_images is 0." in html


def test_a_run_of_an_older_version_without_counts_has_a_report_without_intervals(tmp_path):
    counts = ("val/correct1", "val/correct5", "val/num_images")
    older = {key: value for key, value in val_row(10, 12, 50).items() if key not in counts}
    runs = [make_run(tmp_path / name, [older]) for name in ("x", "y")]
    html = render(build_page(runs, options(tmp_path, "run.name=x", "max_images=0"), []))
    assert ">50.00 %</b><small></small>" in html
    assert html.count('<td class="n">50.00 %</td><td class="n"></td>') == 2


def test_a_run_without_anything_has_a_report_that_gives_the_reasons(tmp_path):
    run = tmp_path / "x"
    run.mkdir()
    write_json(run / "status.json", {"state": "failed", "step": 0, "message": "no memory left"})
    main(options(tmp_path, "run.name=x"), [f"run.root={tmp_path}", "run.name=x"])
    html = (run / "report.html").read_text()
    for sentence in (
        "The run has no evaluation yet.", "The run has recorded no metrics yet", "no memory left",
        "so the times of a step are unknown", "No start of the run is recorded.",
        "Not computed: there is no trained run x in", "The run has recorded no options.",
        "has no readable batch.png",
    ):  # fmt: skip
        assert sentence in html, sentence


def make_trained_run(tmp_path: Path) -> list[str]:
    """A run on images that are gone; the options of its report."""
    overrides = ["data=folder", f"data.root={tmp_path}/none", "data.image_size=64"]
    run = make_run(tmp_path / "x", [train_row(10, 10)], overrides=overrides).directory
    write_json(run / "classes.json", {"ids": ["a", "b"], "names": ["a", "b"]})
    return [f"run.root={tmp_path}", "run.name=x"]


@pytest.mark.parametrize(
    ("given", "error", "line"),
    [
        ("data.root={dir}/other", DataError, "{dir}/other"),
        ("data.num_threads=-1", ConfigError, "data.num_threads"),
        ("trainer.precision=bf16", ConfigError, "trainer.precision=bf16 needs a CUDA device"),
        ("optimizer.lr=1", ConfigError, "optimizer.lr=1 would be ignored: the page shows the run"),
        (
            "max_images=0 data.root=x",
            ConfigError,
            "x would be ignored: max_images=0 uses no images",
        ),
    ],
)
def test_an_option_that_is_wrong_for_the_run_or_ignored_is_refused(tmp_path, given, error, line):
    overrides = make_trained_run(tmp_path) + given.format(dir=tmp_path).split() + ["device=cpu"]
    with pytest.raises(error, match=line.format(dir=tmp_path)):
        main(compose("report", without_data_options(overrides)), overrides)
    assert not (tmp_path / "x/report.html").exists()


def test_a_wrong_device_is_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "alexnet_ddp.report",
        *make_trained_run(tmp_path),
        "device=cuda",
    ]
    env = ENV | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (64, "", 1)
    assert "use device=cpu" in done.stderr
    assert not (tmp_path / "x/report.html").exists()


def test_images_of_the_run_that_are_gone_are_a_reason_on_the_page(tmp_path):
    overrides = [*make_trained_run(tmp_path), "device=cpu"]
    for other in ([], ["data.num_threads=1", "trainer.eval_batch_size=8"]):  # not the reason
        main(compose("report", without_data_options(overrides + other)), overrides + other)
        html = (tmp_path / "x/report.html").read_text()
        assert f"Not computed: data.root ({tmp_path}/none)" in html
        (tmp_path / "x/report.html").unlink()


def test_a_stop_signal_while_images_are_classified_keeps_the_page(tmp_path, monkeypatch):
    overrides = [*make_trained_run(tmp_path), "device=cpu"]
    (tmp_path / "x/report.html").write_text("complete")

    def stopped(*_):
        raise Preempted("stopped before the images were evaluated")

    monkeypatch.setattr("alexnet_ddp.report.command.examine", stopped)
    with pytest.raises(Preempted):
        main(compose("report", without_data_options(overrides)), overrides)
    assert (tmp_path / "x/report.html").read_text() == "complete"


def test_damaged_files_that_only_add_facts_are_left_out(tmp_path):
    run = make_run(tmp_path / "x", [train_row(10, 10), val_row(10, 12, 50)]).directory
    checkpoint = run / "checkpoints/step-00000010"
    checkpoint.mkdir(parents=True)
    state = {"numerics": [1], "classes": [1], "images_per_class": 7}
    write_json(checkpoint / "state.json", state)
    write_json(run / "classes.json", {"ids": 1, "names": 2})
    start = {"time": "2024-01-01T00:00:00+00:00"}
    write_json(run / "run.json", {"overrides": [], "starts": [start]})
    lines = ["3", "[]", '{"step": 1}', '{"step": null, "time": 1, "event": "save"}', "[" * 5000]
    (run / "events.jsonl").write_text(
        '{"step": 1, "time": 5, "event": "save"}\n' + "\n".join(lines)
    )
    (run / "quarantine.jsonl").write_text("\n".join(lines))
    (run / "rank_times.json").write_text('{"seconds": [3]}')
    main(options(tmp_path, "run.name=x", "max_images=0"), ["run.name=x", f"run.root={tmp_path}"])
    assert ">complete</span>" in (run / "report.html").read_text()


@pytest.mark.parametrize("metric", ["epoch", "val/num_images", "val/correct1", "val/loss"])
@pytest.mark.parametrize("value", [None, "x", [1]])
def test_a_damaged_evaluation_is_one_line(tmp_path, metric, value):
    make_run(tmp_path / "x", [val_row(10, 12, 50) | {metric: value}])
    with pytest.raises(
        ConfigError, match=rf"^{tmp_path}/x/metrics.jsonl cannot be read \(.*{metric}"
    ):
        main(
            options(tmp_path, "run.name=x", "max_images=0"), ["run.name=x", f"run.root={tmp_path}"]
        )


@pytest.mark.parametrize("metric", ["epoch", "time_s", "val/loss", "val/top5", "val/num_images"])
def test_an_evaluation_without_one_of_its_metrics_has_a_report(tmp_path, metric):
    row = val_row(10, 12, 50)
    del row[metric]
    run = make_run(tmp_path / "x", [row])
    write_json(
        tmp_path / "x/run.json",
        {"overrides": [], "starts": [{"time": "2024-01-01T00:00:00+00:00"}]},
    )
    main(options(tmp_path, "run.name=x", "max_images=0"), ["run.name=x", f"run.root={tmp_path}"])
    assert "top-1 50.00 %" in (run.directory / "report.html").read_text()


@pytest.mark.parametrize(
    "facts",
    [{"world_size": "2"}, {"git": 3}, {"command": "python"}, {"peak_tflops": "x"}, {"starts": [3]}],
    ids=str,
)
def test_a_fact_of_a_wrong_type_is_one_line(tmp_path, facts):
    make_run(tmp_path / "x")
    write_json(tmp_path / "x/run.json", {"overrides": []} | facts)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/x/run.json cannot be read \("):
        main(
            options(tmp_path, "run.name=x", "max_images=0"), ["run.name=x", f"run.root={tmp_path}"]
        )


def test_unknown_runs_and_options_that_contradict_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^run.name \(z\) is neither a run .* give run.root=DIR$"
    ):
        main(options(tmp_path, "run.name=z"), [])
    make_run(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"^compare \(z\) is neither a run below"):
        main(options(tmp_path, "run.name=x", "compare=[z]"), [])
    make_run(tmp_path / "y")
    for wrong in ("[x]", "[y,y]", f"[{tmp_path}/x]", f"[y,{tmp_path}/y]", "[y/../x]"):
        with pytest.raises(ConfigError, match=r"must name other runs than run.name \(x\)"):
            main(options(tmp_path, "run.name=x", f"compare={wrong}"), [])
    with pytest.raises(ConfigError, match=r"compare names 6 runs; the page has colours for 5"):
        options(tmp_path, "run.name=x", "compare=[a,b,c,d,e,f]")
    with pytest.raises(ConfigError, match=r"model.weights .* is refused"):
        options(tmp_path, "run.name=x", "model.weights=a.pth")
    assert options(tmp_path).device is Device.auto
