"""List all runs below a folder, with their results and the options in which they differ.

alexnet-ddp runs [FOLDER] [sort=top1] [output=runs.csv]
"""

import sys

if __name__ == "__main__":
    from alexnet_ddp.runtime import startup

    startup.begin("runs")  # before the other imports

    from alexnet_ddp import cli

    sys.argv[1:] = cli.with_positions(sys.argv[1:], ("root",))
    cli.run("runs", "alexnet_ddp.runs:main")

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.runs import RunColumn, RunsConfig
from alexnet_ddp.runtime.accuracy import (
    interval_cells,
    interval_columns,
    interval_text,
    metric_interval,
)
from alexnet_ddp.runtime.files import require_folder_of
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.run_record import RunRecord, differing, find_runs, option_text
from alexnet_ddp.runtime.tables import COUNT, NUMBER, TEXT, open_table, require_pyarrow
from alexnet_ddp.runtime.terminal import Console, Table

log = logging.getLogger(__name__)

_MAX_OPTIONS = 6  # of a run in the printed table
_MAX_VALUE = 30  # characters of an option there
_INTERVAL = interval_columns("val/top1")
_COLUMNS: dict[str, str | int] = {
    RunColumn.name: TEXT,
    RunColumn.status: TEXT,
    RunColumn.top1: NUMBER,
    **dict.fromkeys(_INTERVAL, NUMBER),
    RunColumn.step: COUNT,
    RunColumn.images_per_sec: NUMBER,
    RunColumn.hours: NUMBER,
}


def main(cfg: RunsConfig, overrides: list[str]) -> None:
    """Print the table, or write it to cfg.output. Raises ConfigError if there is no run."""
    if cfg.output is not None:
        require_pyarrow("output", cfg.output)
        require_folder_of("output", cfg.output)
    runs = list(find_runs(Path(cfg.root)))
    if not runs:
        rule = "contains no runs, or only starts that were refused"
        raise ConfigError(f"root ({cfg.root}) {rule}; give the run.root of a training")
    found, readable = rows_of(runs)
    rows, options = sorted_rows(found, cfg.sort), differing(readable)
    by_name = {run.name: run.options for run in readable}
    if cfg.output is None:
        Console().print(table(rows, options, by_name))
        return
    columns = _COLUMNS | dict.fromkeys(options, TEXT)
    with closing(open_table("output", cfg.output, columns)) as file:
        for one in rows:
            known = by_name.get(one["name"], {})
            file.write(one | {key: option_text(known[key]) for key in options if key in known})
    say(f"{len(runs):,} runs in {cfg.output}")


def rows_of(runs: list[RunRecord]) -> tuple[list[dict[str, Any]], list[RunRecord]]:
    """The rows of all runs, and the runs that can be read. The others get a warning."""
    rows, readable = list[dict[str, Any]](), list[RunRecord]()
    for run in runs:
        try:
            one = row(run)
            differing([run])  # reads its options
        except ConfigError as error:
            log.warning("%s", error)
            rows.append({"name": run.name, "status": "unreadable"})
        else:
            rows.append(one)
            readable.append(run)
    return rows, readable


def row(run: RunRecord) -> dict[str, Any]:
    """The columns of a run, without its options. Values that it has not recorded are left out."""
    best = run.best_evaluation
    found = {
        "name": run.name,
        "status": run.status,
        "top1": float(best["val/top1"]) if best else None,
        **interval_cells("val/top1", metric_interval(best, "val/top1")),
        "step": run.step,
        "images_per_sec": run.images_per_sec,
        "hours": run.hours,
    }
    return {key: value for key, value in found.items() if value is not None}


def sorted_rows(rows: list[dict[str, Any]], column: RunColumn) -> list[dict[str, Any]]:
    """By a column, then by name: numbers from the largest. Rows without a value are the last."""
    by_name = sorted(rows, key=lambda row: row["name"])
    if _COLUMNS[column] == TEXT:
        return sorted(by_name, key=lambda row: row[column])
    return sorted(by_name, key=lambda row: -row.get(column, float("-inf")))


def table(rows: list[dict[str, Any]], options: list[str], runs: dict[str, dict[str, Any]]) -> Table:
    """The table to print. options: those in which the runs differ. runs: name -> its options."""
    shown = Table("run", "status", is_compact=True)
    shown.add_column("best\ntop-1 %", justify="right")
    shown.add_column("95 %\ninterval", justify="right", no_wrap=True)
    for heading in ("step", "images/s", "hours"):
        shown.add_column(heading, justify="right")
    shown.add_column("options that differ")
    for one in rows:
        values = runs.get(one["name"], {})
        known = [f"{key}={_short(option_text(values[key]))}" for key in options if key in values]
        more = len(known) - _MAX_OPTIONS
        if more > 0:
            known[_MAX_OPTIONS:] = [f"and {more} more: output=FILE.csv"]
        numbers = (
            _cell(one, "top1", ".2f"),
            interval_text([one[name] for name in _INTERVAL if name in one]),
            _cell(one, "step", ",d"),
            _cell(one, "images_per_sec", ",.0f"),
            _cell(one, "hours", ",.2f"),
        )
        shown.add_row(one["name"], one["status"], *numbers, "  ".join(known))
    return shown


def _short(text: str) -> str:
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _cell(row: dict[str, Any], column: str, form: str) -> str:
    return format(row[column], form) if column in row else ""
