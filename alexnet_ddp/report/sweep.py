"""The page of a sweep: its trials, the metric against each swept option, and all curves."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alexnet_ddp.report.charts import Chart, Mark, Scatter, Series, line_chart, scatter_chart
from alexnet_ddp.runtime.accuracy import Interval, interval_text
from alexnet_ddp.runtime.run_command import command_of
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.runtime.sweep_record import Evaluation, State, SweepRecord, Trial, read_sweep

_BEST, _PRUNED, _COMPLETE, _OTHER = range(4)  # positions among the colours of the page
_KINDS = {
    _BEST: "best trial",
    _COMPLETE: "complete",
    _PRUNED: "pruned",
    _OTHER: "failed or running",
}
_MAX_SHOWN = 8  # trials in a tooltip of the curves
_LOG_RATIO = 10  # given values that differ by this factor are on a logarithmic axis
_UNITS = {"val/top1": "%", "val/top5": "%", "val/loss": "cross-entropy"}


@dataclass(frozen=True)
class SweepPage:
    """Everything that the page of a sweep shows. Texts are escaped by the template."""

    name: str
    metric: str
    unit: str
    counts: list[tuple[str, int]]  # trials by state
    hours: float
    best: Trial | None
    result: Evaluation | None  # of the best trial
    keys: list[str]  # swept options
    intervals: dict[str, Interval | None]  # by trial; empty if no result is a share of images
    rows: list[dict[str, Any]]
    scatters: list[Scatter]
    charts: list[Chart]
    kinds: list[tuple[int, str]]  # of the trials: their colour and its meaning
    options: list[tuple[str, str]]  # of the sweep and of all trials
    command: str

    @property
    def is_complete(self) -> bool:
        return State.running not in dict(self.counts)

    @property
    def values(self) -> list[dict[str, Any]]:
        """For the tooltips of the script."""
        return [chart.values for chart in self.charts]


def sweep_page(directory: Path) -> SweepPage:
    """The page of the sweep in `directory`. Raises ConfigError if a record cannot be read."""
    record = read_sweep(directory)
    best = record.best
    run = None if best is None else _run(record, best)
    found = None if best is None else best.best(record.is_minimised)
    keys = list(record.trials[0].values) if record.trials else []
    states = Counter(trial.state for trial in record.trials)
    colours = {_colour(trial, best) for trial in record.trials}
    return SweepPage(
        name=directory.absolute().name,
        metric=record.metric,
        unit=_UNITS.get(record.metric, ""),
        counts=[(state.value, states[state]) for state in State if state in states],
        hours=sum(trial.hours or 0.0 for trial in record.trials),
        best=best,
        result=found,
        keys=keys,
        intervals=_intervals(record),
        rows=record.rows,
        scatters=[one for key in keys if (one := _scatter(record, key, best)) is not None],
        charts=_curves(record, best),
        kinds=[(colour, _KINDS[colour]) for colour in _KINDS if colour in colours],
        options=[(key, text) for key, text in record.identity.items()],
        command="" if run is None else command_of(run, f"{directory.absolute().name}-best"),
    )


def _intervals(record: SweepRecord) -> dict[str, Interval | None]:
    """The 95 % interval of the result of each trial; empty if none is known."""
    best = {trial.name: trial.best(record.is_minimised) for trial in record.trials}
    found = {name: None if one is None else one.interval for name, one in best.items()}
    return found if any(found.values()) else {}


def _scatter(record: SweepRecord, key: str, best: Trial | None) -> Scatter | None:
    """The result of each trial against its value of an option; None without results."""
    shown = [one for one in record.ranked if one.best(record.is_minimised) is not None]
    values = [_number(one.values[key]) for one in shown]
    are_numbers = None not in values
    marks = []
    for trial, value in zip(shown, values):
        result = trial.best(record.is_minimised)
        if result is not None:
            x = value if are_numbers and value is not None else trial.values[key]
            text = f"trial {trial.name} ({trial.state}), {key}={trial.values[key]}: "
            text += f"{record.metric} {result.value:.6g}"
            if result.interval is not None:
                text += f" (95 % interval {interval_text(result.interval)})"
            faint = trial.state is not State.complete
            marks.append(Mark(x, result.value, _colour(trial, best), text, faint))
    if not marks:
        return None
    marks.reverse()  # the best is drawn last
    if not are_numbers:
        marks.sort(key=lambda one: str(one.x))
    numbers = [value for value in values if value is not None]
    is_log = are_numbers and _is_log(record.identity.get(key, ""), numbers)
    is_loss, unit = record.metric == "val/loss", _UNITS.get(record.metric, "")
    return scatter_chart(key, unit, marks, is_log=is_log, may_be_log=is_loss)


def _is_log(text: str, values: list[float]) -> bool:
    """True for an interval that is drawn in the logarithm, and for such values of a list."""
    if "interval(" in text:
        return "tag(log" in text.replace(" ", "")
    return min(values) > 0 and max(values) / min(values) >= _LOG_RATIO


def _curves(record: SweepRecord, best: Trial | None) -> list[Chart]:
    """The metric and the training loss of all trials. Tooltips show those with the best results."""
    ranked = record.ranked
    found = []
    for metric in dict.fromkeys((record.metric, "train/loss")):
        series = []
        for trial in reversed(ranked):  # the best is drawn last
            values = _run(record, trial).values(metric)
            points = [(float(step), value) for step, value in values.items()]
            is_faint = trial is not best
            name, has_dots = f"trial {trial.name}", len(points) == 1  # one point is no line
            series.append(Series(name, _colour(trial, best), points, is_faint, has_dots))
        is_loss = metric.endswith("/loss")
        unit = "cross-entropy" if is_loss else _UNITS.get(metric, "")
        chart = line_chart(metric, unit, series, may_be_log=is_loss)
        if chart is not None:
            shown = chart.values["series"][: -_MAX_SHOWN - 1 : -1]
            found.append(replace(chart, values=chart.values | {"series": shown}))
    return found


def _colour(trial: Trial, best: Trial | None) -> int:
    if trial is best:
        return _BEST
    return {State.pruned: _PRUNED, State.complete: _COMPLETE}.get(trial.state, _OTHER)


def _run(record: SweepRecord, trial: Trial) -> RunRecord:
    return RunRecord(record.directory / trial.name, trial.name)


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
