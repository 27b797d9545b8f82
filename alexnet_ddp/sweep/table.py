"""The results of a sweep: a table, sweep.csv, and the command that trains the best trial."""

from contextlib import closing
from typing import Any

from alexnet_ddp.config.space import Space
from alexnet_ddp.runtime.accuracy import interval_columns, interval_text
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.runtime.run_command import command_of
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.runtime.sweep_record import State, SweepRecord, Trial, result_text
from alexnet_ddp.runtime.tables import COUNT, NUMBER, TEXT, open_table
from alexnet_ddp.runtime.terminal import Console, Table

CSV = "sweep.csv"


def show_results(record: SweepRecord, space: Space) -> None:
    """Print the table and the command of the best trial, and write sweep.csv.

    Raises ConfigError if the file cannot be written, or a record of the best trial cannot be read.
    """
    rows, metric = record.rows, record.metric
    keys = [dimension.key for dimension in space.dimensions]
    Console().print(table(rows, keys, metric))
    columns: dict[str, str | int] = {"rank": COUNT, "trial": TEXT, **dict.fromkeys(keys, TEXT)}
    columns |= dict.fromkeys((metric, *interval_columns(metric)), NUMBER)
    columns |= {"step": COUNT, "status": TEXT, "exit_code": COUNT}
    columns |= {"hours": NUMBER, "message": TEXT}
    with closing(open_table("sweep.name", str(record.directory / CSV), columns)) as file:
        for one in rows:
            file.write(one)
    say(f"{len(rows)} trials in {printable(record.directory / CSV)}")
    best = record.best
    if best is not None:
        _print_command(best, record)


def table(rows: list[dict[str, Any]], keys: list[str], metric: str) -> Table:
    """The table to print. keys: the swept options."""
    shown = Table(is_compact=True)
    for heading in ("rank", "trial"):
        shown.add_column(heading, justify="right")
    for key in keys:
        shown.add_column(key, justify="right")
    shown.add_column(f"best {metric}", justify="right")
    ends = interval_columns(metric)
    if ends:
        shown.add_column("95 %\ninterval", justify="right", no_wrap=True)
    shown.add_column("at step", justify="right")
    shown.add_column("status")
    shown.add_column("hours", justify="right")
    for one in rows:
        status = one["status"]
        if status == State.failed:
            status = f"failed ({one['exit_code']})"
        values = [one[key] for key in keys]
        result = [result_text(one[metric]) if metric in one else ""]
        if ends:
            result.append(interval_text([one[name] for name in ends if name in one]))
        step, hours = _cell(one, "step", ",d"), _cell(one, "hours", ".3f")
        shown.add_row(_cell(one, "rank", "d"), one["trial"], *values, *result, step, status, hours)
    return shown


def _print_command(best: Trial, record: SweepRecord) -> None:
    directory = record.directory / best.name
    command = command_of(RunRecord(directory, best.name), f"{record.directory.name}-best")
    say(f"best: trial {best.name}, in {directory}" + ("; to train it again:" if command else ""))
    if command:
        say(f"  {command}")


def _cell(row: dict[str, Any], column: str, form: str) -> str:
    return format(row[column], form) if column in row else ""
