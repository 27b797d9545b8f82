"""Compare two runs: their options, their curves, and the first step in which they differ.

alexnet-ddp compare A B
"""

import sys

if __name__ == "__main__":
    from alexnet_ddp.runtime import startup

    startup.begin("compare")  # before the other imports

    from alexnet_ddp import cli

    sys.argv[1:] = cli.with_positions(sys.argv[1:], ("first", "second"))
    cli.run("compare", "alexnet_ddp.compare:main")

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.runs import CompareConfig
from alexnet_ddp.runtime.accuracy import interval_text, metric_interval
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.run_record import RunRecord, differing, open_run, option_text
from alexnet_ddp.runtime.terminal import Console, Table

_TOP1 = "val/top1"
_CURVES = ("train/loss", "train/lr")
_FORMATS = {"train/loss": ".6g", "train/lr": ".4g", _TOP1: ".2f"}
_HASH = "data/index_hash"


@dataclass(frozen=True)
class Difference:
    """The first step in which two runs have different values, and the last one before it."""

    step: int
    values: tuple[Any, Any]
    last_equal: int | None  # the last earlier step with a row in both runs


def main(cfg: CompareConfig, overrides: list[str]) -> None:
    """Print the comparison.

    Raises ConfigError if a run does not exist or cannot be read, or if both are the same.
    """
    runs = [open_run("first", cfg.first, cfg.root), open_run("second", cfg.second, cfg.root)]
    if runs[0].directory.samefile(runs[1].directory):
        rule = f"is the directory of first ({cfg.first}) too"
        raise ConfigError(f"second ({cfg.second}) {rule}; give another run")
    console = Console()
    options = differing(runs)
    if options:
        console.print(option_table(runs, options))
    else:
        say("all options are equal")
    loss = first_difference(runs, "train/loss", close(cfg.tolerance))
    tables = [
        curve_table(runs, cfg.max_rows, None if loss is None else loss.step),
        evaluation_table(runs, cfg.max_rows),
    ]
    for table in tables:
        if table.row_count:
            console.print(table)
    images = first_difference(runs, _HASH, lambda a, b: a == b)
    rate = first_difference(runs, "train/lr", close(cfg.tolerance))
    rule = f" by more than {cfg.tolerance:g} (relative)"
    say(line("images of a batch", _HASH, images, runs))
    say(line("learning rates", "train/lr", rate, runs, rule))
    say(line("training losses", "train/loss", loss, runs, rule))


def close(tolerance: float) -> Callable[[Any, Any], bool]:
    """A function that compares two numbers; NaN equals NaN."""

    def is_close(a: Any, b: Any) -> bool:
        x, y = float(a), float(b)
        return math.isclose(x, y, rel_tol=tolerance) or (math.isnan(x) and math.isnan(y))

    return is_close


def first_difference(
    runs: list[RunRecord], metric: str, is_equal: Callable[[Any, Any], bool]
) -> Difference | None:
    """The first difference of a metric in the steps that both runs have recorded."""
    last = None
    for step in _common_steps(runs, metric):
        a, b = (run.rows[step][metric] for run in runs)
        if not is_equal(a, b):
            return Difference(step, (a, b), last)
        last = step
    return None


def line(
    what: str, metric: str, found: Difference | None, runs: list[RunRecord], rule: str = ""
) -> str:
    """A sentence about the first difference of a metric."""
    steps = _common_steps(runs, metric)
    if not steps:
        return f"{what}: no step has {metric} in both runs"
    if found is None:
        return f"{what}: equal in all {len(steps):,} common rows, up to step {steps[-1]:,}"
    text = f"{what}: differ{rule} at step {found.step:,} ({found.values[0]} and {found.values[1]})"
    last = 0 if found.last_equal is None else found.last_equal
    if last == found.step - 1:
        return f"{text} for the first time"
    since = "no earlier row" if found.last_equal is None else f"equal at step {last:,}"
    return f"{text}, {since}; rows are {found.step - last:,} steps apart"


def option_table(runs: list[RunRecord], options: list[str]) -> Table:
    """The values of the options that differ. An option that a run does not have is empty."""
    shown = Table("option", *(run.name for run in runs), is_compact=True)
    for key in options:
        shown.add_row(key, *(option_text(run.options.get(key, "")) for run in runs))
    return shown


def curve_table(runs: list[RunRecord], max_rows: int | None, first: int | None) -> Table:
    """Training loss and learning rate of both runs side by side.

    max_rows: print at most about so many, evenly spread. first: a step to print in any case.
    """
    shown = _table_of_steps()
    for metric in _CURVES:
        for run in runs:
            shown.add_column(f"{metric}\n{run.name}", justify="right")
    for step in _steps(runs, list(_CURVES), max_rows, first):
        cells = [_cell(run, step, metric) for metric in _CURVES for run in runs]
        shown.add_row(f"{step:,}", *cells, style="bold" if step == first else None)
    return shown


def evaluation_table(runs: list[RunRecord], max_rows: int | None) -> Table:
    """Top-1 of both runs side by side, with its intervals. max_rows: as for curve_table."""
    shown = _table_of_steps()
    for run in runs:
        shown.add_column(f"{_TOP1}\n{run.name}", justify="right")
        shown.add_column("95 %\ninterval", justify="right", no_wrap=True)
    for step in _steps(runs, [_TOP1], max_rows):
        cells = list[str]()
        for run in runs:
            interval = metric_interval(run.rows.get(step, {}), _TOP1)
            cells += [_cell(run, step, _TOP1), interval_text(interval)]
        shown.add_row(f"{step:,}", *cells)
    return shown


def _table_of_steps() -> Table:
    shown = Table(is_compact=True)
    shown.add_column("\nstep", justify="right")
    return shown


def _steps(
    runs: list[RunRecord], metrics: list[str], max_rows: int | None, first: int | None = None
) -> list[int]:
    """The steps of which a run has one of the metrics: all, or so many, evenly spread."""
    known = {
        step for run in runs for step, row in run.rows.items() if not row.keys().isdisjoint(metrics)
    }
    steps = sorted(known)
    if max_rows is None or len(steps) <= max_rows:
        return steps
    kept = {steps[round(k * (len(steps) - 1) / (max_rows - 1))] for k in range(max_rows)}
    return [step for step in steps if step in kept or step == first]


def _common_steps(runs: list[RunRecord], metric: str) -> list[int]:
    first, second = runs
    return [
        step
        for step, row in first.rows.items()
        if metric in row and metric in second.rows.get(step, {})
    ]


def _cell(run: RunRecord, step: int, metric: str) -> str:
    value = run.rows.get(step, {}).get(metric)
    return "" if value is None else format(float(value), _FORMATS[metric])
