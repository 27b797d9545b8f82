"""sweep.json: what a sweep searches, and its trials. It is all that a continued sweep knows.

The file is replaced by renaming, so a sweep that is killed leaves the old or the new one. Neither a
database nor file locks are needed, which network file systems often lack.
"""

import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from alexnet_ddp.runtime.accuracy import Interval, checked_counts, interval_cells, percent_interval
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.redaction import redact

_FILE = "sweep.json"
_MINIMISED = "val/loss"
_HUGE = 1e6
_DAMAGES = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError),
)


class State(StrEnum):
    """What became of a trial. A trial that was interrupted is `running`."""

    running = "running"
    complete = "complete"
    pruned = "pruned"
    failed = "failed"


_ORDER = (State.complete, State.pruned, State.failed, State.running)


@dataclass(frozen=True)
class Evaluation:
    """The metric after `step`.

    is_final: it is the last one by its epochs or max_steps. counts: the correct images and all
    images, if the metric is their share.
    """

    step: int
    value: float
    is_final: bool = False
    counts: tuple[int, int] | None = None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the metric, in percent; None if it is not a share of images."""
        return None if self.counts is None else percent_interval(*self.counts)


@dataclass
class Trial:
    """A training of the sweep. values: key -> text of an override.

    evaluations: those that count, in the order of the steps; of a pruned trial, up to the one
    after which it was stopped. hours: those of its run.
    """

    number: int
    values: dict[str, str]
    state: State = State.running
    exit_code: int | None = None
    message: str = ""
    hours: float | None = None
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its run, whose folder is in the directory of the sweep."""
        return f"{self.number:03d}"

    @property
    def is_over(self) -> bool:
        return self.state is not State.running

    @property
    def has_result(self) -> bool:
        """True if it trained without an error."""
        return self.state in (State.complete, State.pruned)

    def best(self, is_minimised: bool) -> Evaluation | None:
        """The first of the best evaluations; None if no value is finite."""
        found = [one for one in self.evaluations if math.isfinite(one.value)]
        sign = 1 if is_minimised else -1
        return min(found, key=lambda one: sign * one.value, default=None)


@dataclass
class SweepRecord:
    """A sweep's directory, the text of every option that determines its results, its trials."""

    directory: Path
    identity: dict[str, str]
    trials: list[Trial]

    @property
    def metric(self) -> str:
        return self.identity["sweep.metric"]

    @property
    def is_minimised(self) -> bool:
        """True if a lower value of the metric is better."""
        return is_minimised(self.metric)

    @property
    def ranked(self) -> list[Trial]:
        """Complete trials, then pruned ones, then failed ones; each from the best metric on.

        Complete and pruned trials without a finite metric come after those that have one.
        """

        def key(trial: Trial) -> tuple[int, int, bool, float, int]:
            best, sign = trial.best(self.is_minimised), 1 if self.is_minimised else -1
            value = 0.0 if best is None else sign * best.value
            group = 2 if not trial.has_result else 1 if best is None else 0
            return group, _ORDER.index(trial.state), best is None, value, trial.number

        return sorted(self.trials, key=key)

    @property
    def best(self) -> Trial | None:
        """The trial with the best result: a complete one, else a pruned one; None if none has."""
        found = (one for one in self.ranked if one.has_result)
        return next((one for one in found if one.best(self.is_minimised) is not None), None)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The ranked trials as cells by column; cells without a value are left out."""
        return [self._row(trial, rank) for rank, trial in enumerate(self.ranked, 1)]

    def write(self) -> None:
        """Replace sweep.json. Raises OSError."""
        trials = [_to_json(trial) for trial in self.trials]
        content = {"version": 1, "searches": self.identity, "trials": trials}
        write_json(self.directory / _FILE, content)

    def remove(self) -> None:
        """Remove sweep.json, if it exists. Raises OSError."""
        (self.directory / _FILE).unlink(missing_ok=True)

    def _row(self, trial: Trial, rank: int) -> dict[str, Any]:
        best = trial.best(self.is_minimised)
        found = {
            "rank": rank if trial.state is not State.failed else None,
            "trial": trial.name,
            **trial.values,
            self.metric: None if best is None else best.value,
            **interval_cells(self.metric, None if best is None else best.interval),
            "step": None if best is None else best.step,
            "status": trial.state.value,
            "exit_code": trial.exit_code,
            "hours": trial.hours,
            "message": redact(trial.message) or None,
        }
        return {key: value for key, value in found.items() if value is not None}


def result_text(value: float) -> str:
    """A metric for a table, with four decimals; a huge one with six digits."""
    return f"{value:.4f}" if abs(value) < _HUGE else f"{value:.6g}"


def is_minimised(metric: str) -> bool:
    """True if a lower value of this metric is better."""
    return metric == _MINIMISED


def is_sweep(directory: Path) -> bool:
    """True if `directory` is that of a sweep."""
    return (directory / _FILE).is_file()


def read_sweep(directory: Path) -> SweepRecord:
    """The record of the sweep in `directory`. Raises ConfigError if it cannot be read."""
    file = directory / _FILE
    try:
        known = json.loads(file.read_bytes())
        identity = {str(key): str(text) for key, text in known["searches"].items()}
        trials = [_from_json(one) for one in known["trials"]]
        _check_keys(identity, trials)
    except _DAMAGES as error:
        why = f"{type(error).__name__}: {error}"
        rule = f"cannot be read ({why})"
        raise ConfigError(f"{file} {rule}; move it away, or name another sweep") from error
    return SweepRecord(directory, identity, trials)


def _check_keys(identity: dict[str, str], trials: list[Trial]) -> None:
    """Raise ValueError if the metric is missing, or trials have values of different options."""
    if "sweep.metric" not in identity:
        raise ValueError("it names no metric")
    if any(trial.values.keys() != trials[0].values.keys() for trial in trials):
        raise ValueError("its trials have values of different options")


def _to_json(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "values": trial.values,
        "state": trial.state.value,
        "exit_code": trial.exit_code,
        "message": redact(trial.message),
        "hours": trial.hours,
        "evaluations": [[one.step, one.value, *(one.counts or ())] for one in trial.evaluations],
    }


def _from_json(known: dict[str, Any]) -> Trial:
    code, hours = known["exit_code"], known["hours"]
    return Trial(
        int(known["number"]),
        {str(key): str(text) for key, text in known["values"].items()},
        State(known["state"]),
        None if code is None else int(code),
        str(known["message"]),
        None if hours is None else float(hours),
        [_evaluation(*one) for one in known["evaluations"]],
    )


def _evaluation(step: Any, value: Any, *counts: Any) -> Evaluation:
    """counts: two numbers; none in the sweep.json of an older version."""
    correct, images = checked_counts(*(counts or (0, 0)))
    return Evaluation(int(step), float(value), counts=(correct, images) if images else None)
