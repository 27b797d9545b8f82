"""The starts of a run on a time axis, with its evaluations, checkpoints, stops and faults."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from alexnet_ddp.report.charts import Scale, Tick
from alexnet_ddp.runtime.accuracy import interval_text, metric_interval
from alexnet_ddp.runtime.files import parse_row
from alexnet_ddp.runtime.run_record import RunRecord

EVENTS = "events.jsonl"
WIDTH, LEFT, RIGHT = 860, 96, 14  # units of the SVG
_LANES = ("training", "evaluation", "checkpoint", "event")
LANE_HEIGHT, TOP = 26, 8
_GAP = 0.025  # of the axis: the width of a pause, however long it was
_MAX_ROWS = 200  # of the table
# Metric -> what it counts. Their rows are after the fact, so the step is that of the row.
_COUNTERS = {
    "train/num_rollbacks": "rollback",
    "train/num_skipped_steps": "skipped step",
    "data/num_bad_images": "unreadable image",
    "checkpoint/num_failed": "failed checkpoint",
    "checkpoint/num_skipped": "checkpoint left out",
}
# State of a run -> how the report calls the end of that start.
_ENDS = {
    "complete": "complete",
    "preempted": "stopped",
    "stopped": "stopped",
    "failed": "failed",
}


@dataclass(frozen=True)
class Start:
    """One start of the run. Times are seconds since 1970."""

    began: float
    ended: float
    end: str  # complete, stopped, failed, killed, running or unknown
    from_step: int
    message: str = ""
    world_size: int | None = None
    host: str = ""
    saved: float | None = None  # the time of its last checkpoint
    changes: str = ""  # options of the command line that differ from those of the start before


@dataclass(frozen=True)
class Mark:
    """Something that happened. lane: one of the chart's."""

    time: float
    lane: str
    step: int
    text: str
    is_fault: bool = False


@dataclass(frozen=True)
class Bar:
    """A start. lost: the width of its work after the last checkpoint, which is repeated."""

    left: float
    width: float
    lost: float
    end: str
    text: str


@dataclass(frozen=True)
class Dot:
    at: float
    lane: int
    text: str
    is_fault: bool


@dataclass(frozen=True)
class Pause:
    """The time between two starts, drawn narrow. at: its middle."""

    at: float
    text: str


@dataclass(frozen=True)
class Timeline:
    """The drawn axis and the rows of the table, the newest last."""

    bars: list[Bar]
    dots: list[Dot]
    pauses: list[Pause]
    ticks: list[Tick]
    rows: list[tuple[str, int, str, str]]  # time (UTC), step, what, details
    num_left_out: int  # rows
    starts: list[Start]
    lanes: tuple[str, ...] = _LANES

    @property
    def has_changes(self) -> bool:
        """Whether a start had other options on its command line than the one before."""
        return any(one.changes for one in self.starts)


def timeline(run: RunRecord) -> Timeline | None:
    """None if the run has recorded no start."""
    events = read_events(run.directory / EVENTS)
    starts = _starts(run, events)
    if not starts:
        return None
    marks = sorted([*_row_marks(run, starts), *_event_marks(events, starts)], key=lambda m: m.time)
    axis = _Axis(starts)
    bars = [_bar(axis, k, one) for k, one in enumerate(starts)]
    dots = [
        Dot(
            axis(_start_at(starts, one.time), one.time),
            _LANES.index(one.lane),
            one.text,
            one.is_fault,
        )
        for one in marks
        if one.lane in _LANES
    ]
    pauses = [
        Pause((axis(k - 1, a.ended) + axis(k, b.began)) / 2, f"{duration(b.began - a.ended)} pause")
        for k, (a, b) in enumerate(pairwise(starts), 1)
    ]
    rows = [(_clock(one.time), one.step, one.lane, one.text) for one in marks]
    kept = rows if len(rows) <= _MAX_ROWS else _important(marks)
    return Timeline(bars, dots, pauses, axis.ticks(), kept, len(rows) - len(kept), starts)


def duration(seconds: float) -> str:
    """Such as "1 h 20 min" or "45 s"."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for size, unit, part, below in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


class _Axis:
    """Seconds of work, one start after the other, with a narrow gap for each pause."""

    def __init__(self, starts: list[Start]) -> None:
        self._starts = starts
        work = sum(one.ended - one.began for one in starts) or 1.0
        gap = _GAP * work
        self._offsets, total = list[float](), 0.0
        for one in starts:
            self._offsets.append(total)
            total += one.ended - one.began + gap
        self._scale = Scale(0.0, max(total - gap, 1e-3), LEFT, WIDTH - RIGHT)
        self._gap, self._work = gap, work

    def __call__(self, start: int, time: float) -> float:
        one = self._starts[start]
        return self._scale(self._offsets[start] + min(max(time, one.began), one.ended) - one.began)

    def ticks(self) -> list[Tick]:
        """Of the hours of work, without the pauses."""
        found = []
        for seconds in _tick_seconds(self._work):
            done = 0.0
            for k, one in enumerate(self._starts):
                if seconds <= done + one.ended - one.began or k == len(self._starts) - 1:
                    at = self(k, one.began + seconds - done)
                    found.append(Tick(at, duration(seconds) if seconds else "0"))
                    break
                done += one.ended - one.began
        return found


def _tick_seconds(work: float) -> list[float]:
    rough = work / 6
    sizes = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400)
    size = next((one for one in sizes if one >= rough), 86400 * max(1, round(rough / 86400)))
    return [float(k * size) for k in range(int(work // size) + 1)]


def _starts(run: RunRecord, events: list[dict[str, Any]]) -> list[Start]:
    """Every start, with its end: as recorded, or as the last trace that it left."""
    known = [one for one in run.starts if _seconds(one.get("time")) > 0]
    found = []
    for k, one in enumerate(known):
        began = _seconds(one["time"])
        limit = _seconds(known[k + 1]["time"]) if k + 1 < len(known) else float("inf")
        ended, end, message = _end(run, events, began, limit)
        saved = [e["time"] for e in events if e["event"] == "save" and began <= e["time"] <= ended]
        found.append(
            Start(
                began,
                max(began, ended),
                end,
                int(one.get("start_step", 0)),
                message,
                one.get("world_size"),
                str(one.get("host", "")),
                max(saved, default=None),
                _changes(known[k - 1], one) if k else "",
            )
        )
    return found


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The options of a start that the one before did not have, and those that only it had."""
    old, new = (list(map(str, one.get("overrides", []))) for one in (before, now))
    added = [one for one in new if one not in old]
    keys = {one.partition("=")[0] for one in added}
    gone = [one for one in old if one not in new and one.partition("=")[0] not in keys]
    texts = [f"with {' '.join(added)}"] * bool(added) + [f"without {' '.join(gone)}"] * bool(gone)
    return ", ".join(texts)


def _end(
    run: RunRecord, events: list[dict[str, Any]], began: float, limit: float
) -> tuple[float, str, str]:
    """When a start ended, how, and its message. limit: when the next one began."""
    is_last = limit == float("inf")
    own = [one for one in events if began - 1 <= one["time"] <= limit]
    for one in own:  # a complete run that is started again records another end
        if one["event"] == "end" and (not is_last or run.status != "running"):
            return (
                one["time"],
                _ENDS.get(str(one.get("state")), "unknown"),
                str(one.get("message", "")),
            )
        if one["event"] == "lost":
            return one["time"], "killed", str(one.get("message", ""))
    traces = [one["time"] for one in own]
    if is_last:
        traces.append(_seconds(run.status_time))
        if (run.directory / "metrics.jsonl").exists():
            traces.append((run.directory / "metrics.jsonl").stat().st_mtime)
        return max([began, *traces]), _ENDS.get(run.status, run.status), run.message
    return max([began, *traces]), "unknown", ""


def _row_marks(run: RunRecord, starts: list[Start]) -> Iterator[Mark]:
    """Evaluations, and counters of faults that rose, at the times of their rows.

    time_s of a row are seconds of work. A row belongs to the last start that began before its step.
    """
    counts = dict.fromkeys(_COUNTERS, 0.0)
    worked = last = 0.0  # worked: time_s of the last row before the current start
    current = 0
    for step, row in run.rows.items():
        k = max((j for j, one in enumerate(starts) if one.from_step < step), default=0)
        if k != current:
            current, worked = k, last
        last = float(row.get("time_s", last))
        time = starts[k].began + last - worked
        if "val/top1" in row:
            ends = interval_text(metric_interval(row, "val/top1"))
            share = f"top-1 {float(row['val/top1']):.2f} %" + (f" ({ends} %)" if ends else "")
            loss = float(row.get("val/loss", "nan"))
            yield Mark(time, "evaluation", step, f"{share}, loss {loss:.4g}")
        for metric, what in _COUNTERS.items():
            more = float(row.get(metric, counts[metric])) - counts[metric]
            if more > 0:
                yield Mark(time, "event", step, f"{more:,.0f} × {what}", is_fault=True)
                # Unreadable images are counted by row, the others since the run began.
                counts[metric] = 0.0 if metric.startswith("data/") else float(row[metric])


def _event_marks(events: list[dict[str, Any]], starts: list[Start]) -> Iterator[Mark]:
    for k, one in enumerate(starts):
        ranks = f"{one.world_size} rank(s)" if one.world_size else ""
        what = "started" if k == 0 else f"resumed from step {one.from_step:,}"
        yield Mark(
            one.began,
            "start",
            one.from_step,
            ", ".join(filter(None, (what, ranks, one.host, one.changes))),
        )
        if one.end not in ("running", "unknown"):
            text = f"{one.end}: {one.message}" if one.message else one.end
            is_fault = one.end in ("failed", "killed")
            yield Mark(one.ended, "end", _end_step(events, one), text, is_fault)
    for event in events:
        if event["event"] == "save":
            yield Mark(
                event["time"], "checkpoint", event["step"], f"checkpoint of step {event['step']:,}"
            )


def _end_step(events: list[dict[str, Any]], start: Start) -> int:
    steps = [one["step"] for one in events if start.began - 1 <= one["time"] <= start.ended + 1]
    return max(steps, default=start.from_step)


def _important(marks: list[Mark]) -> list[tuple[str, int, str, str]]:
    """Rows without checkpoints, and at most _MAX_ROWS of them: the last ones."""
    kept = [one for one in marks if one.lane != "checkpoint"][-_MAX_ROWS:]
    return [(_clock(one.time), one.step, one.lane, one.text) for one in kept]


def _bar(axis: _Axis, k: int, one: Start) -> Bar:
    left, right = axis(k, one.began), axis(k, one.ended)
    is_lost = one.end in ("killed", "failed")
    lost = right - axis(k, one.began if one.saved is None else one.saved) if is_lost else 0.0
    text = f"from step {one.from_step:,}, {duration(one.ended - one.began)}, {one.end}"
    return Bar(left, max(1.5, right - left), lost, one.end, text)


def _start_at(starts: list[Start], time: float) -> int:
    return max(0, bisect_right([one.began for one in starts], time) - 1)


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events in the order of their times; damaged lines are left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_bytes().splitlines():
        row = parse_row(line)
        if row is not None and "time" in row and "event" in row:
            found.append(row | {"time": _seconds(row["time"]), "event": str(row["event"])})
    return sorted(found, key=lambda one: one["time"])


def _seconds(time: Any) -> float:
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
