"""The results of a sweep: a table, sweep.csv, and the command that trains the best trial."""

import shlex
from contextlib import closing
from typing import Any

from alexnet_ddp import cli
from alexnet_ddp.config.space import Space
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.tables import COUNT, NUMBER, TEXT, open_table
from alexnet_ddp.runtime.terminal import Console, Table
from alexnet_ddp.sweep.record import State, SweepRecord, Trial

CSV = "sweep.csv"
_ORDER = (State.complete, State.pruned, State.failed, State.running)


def ranked(trials: list[Trial], is_minimised: bool) -> list[Trial]:
    """Complete trials, then pruned ones, then failed ones; each from the best metric on."""

    def key(trial: Trial) -> tuple[int, bool, float, int]:
        best, sign = trial.best(is_minimised), 1 if is_minimised else -1
        value = 0.0 if best is None else sign * best.value
        return _ORDER.index(trial.state), best is None, value, trial.number

    return sorted(trials, key=key)


def report(record: SweepRecord, space: Space, metric: str, is_minimised: bool) -> None:
    """Print the table and the command of the best trial, and write sweep.csv.

    Raises ConfigError if the file cannot be written.
    """
    trials = ranked(record.trials, is_minimised)
    rows = [row(trial, rank, metric, is_minimised) for rank, trial in enumerate(trials, 1)]
    keys = [dimension.key for dimension in space.dimensions]
    Console().print(table(rows, keys, metric))
    columns: dict[str, str | int] = {"rank": COUNT, "trial": TEXT, **dict.fromkeys(keys, TEXT)}
    columns |= {metric: NUMBER, "step": COUNT, "status": TEXT, "exit_code": COUNT}
    columns |= {"hours": NUMBER, "message": TEXT}
    with closing(open_table("sweep.name", str(record.directory / CSV), columns)) as file:
        for one in rows:
            file.write(one)
    say(f"{len(rows)} trials in {printable(record.directory / CSV)}")
    best = next((one for one in trials if one.state in (State.complete, State.pruned)), None)
    if best is not None:
        _print_command(best, record, space)


def row(trial: Trial, rank: int, metric: str, is_minimised: bool) -> dict[str, Any]:
    """The cells of a trial, of which those without a value are left out."""
    best, is_ranked = trial.best(is_minimised), trial.state is not State.failed
    found = {
        "rank": rank if is_ranked else None,
        "trial": trial.name,
        **trial.values,
        metric: None if best is None else best.value,
        "step": None if best is None else best.step,
        "status": trial.state.value,
        "exit_code": trial.exit_code,
        "hours": trial.hours,
        "message": redact(trial.message) or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def table(rows: list[dict[str, Any]], keys: list[str], metric: str) -> Table:
    """The table to print. keys: the swept options."""
    shown = Table(is_compact=True)
    for heading in ("rank", "trial"):
        shown.add_column(heading, justify="right")
    for key in keys:
        shown.add_column(key, justify="right")
    shown.add_column(f"best {metric}", justify="right")
    shown.add_column("at step", justify="right")
    shown.add_column("status")
    shown.add_column("hours", justify="right")
    for one in rows:
        status = one["status"]
        if status == State.failed:
            status = f"failed ({one['exit_code']})"
        values = [one[key] for key in keys]
        result = (_cell(one, metric, ".4f"), _cell(one, "step", ",d"))
        hours = _cell(one, "hours", ".3f")
        shown.add_row(_cell(one, "rank", "d"), one["trial"], *values, *result, status, hours)
    return shown


def _print_command(best: Trial, record: SweepRecord, space: Space) -> None:
    overrides = [*cli.config_dir_arguments(), *redact(space.overrides(best.values))]
    name = f"run.name={record.directory.name}-best"
    say(
        f"best: trial {best.name}, in {printable(record.directory / best.name)}; to train it again:"
    )
    say(f"  {shlex.join(['python', '-m', 'alexnet_ddp.train', *overrides, name])}")


def _cell(row: dict[str, Any], column: str, form: str) -> str:
    return format(row[column], form) if column in row else ""
