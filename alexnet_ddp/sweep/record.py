"""sweep.json: what a sweep searches, and its trials. It is all that a continued sweep knows.

The file is replaced by renaming, so a sweep that is killed leaves the old or the new one. Neither a
database nor file locks are needed, which network file systems often lack.
"""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from alexnet_ddp.config import ConfigError, SweepConfig
from alexnet_ddp.config.option import shown
from alexnet_ddp.config.space import Space
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.redaction import redact

FILE = "sweep.json"
# Results that another start would repeat: a wrong configuration, and a divergence.
_FINAL_CODES = (64, 70)
# These distribute or monitor the work, or say where it is: the results are the same.
_FREE = ("run.root", "data.root", "data.num_threads", "trainer.hang_timeout_s", "device", "plugins")
_FREE_SECTIONS = ("logger.", "checkpoint.")


class State(StrEnum):
    """What became of a trial. A trial that was interrupted is `running`."""

    running = "running"
    complete = "complete"
    pruned = "pruned"
    failed = "failed"


@dataclass(frozen=True)
class Evaluation:
    """The metric after `step`. is_final: the trial ends with this step."""

    step: int
    value: float
    is_final: bool = False


@dataclass
class Trial:
    """A training of the sweep. values: key -> text of an override.

    evaluations: those that count, in the order of the steps; of a pruned trial, up to the one
    after which it was stopped. hours: of work, over all starts.
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

    def best(self, is_minimised: bool) -> Evaluation | None:
        """The first of the best evaluations; None if none is a number."""
        found = [one for one in self.evaluations if one.value == one.value]  # NaN is not itself
        sign = 1 if is_minimised else -1
        return min(found, key=lambda one: sign * one.value, default=None)


class SweepRecord:
    """The trials of a sweep, and its file. Create it with open_record."""

    def __init__(self, directory: Path, identity: dict[str, str], trials: list[Trial]) -> None:
        self.directory, self.identity, self.trials = directory, identity, trials

    def write(self) -> None:
        """Replace sweep.json. Raises OSError."""
        trials = [_to_json(trial) for trial in self.trials]
        content = {"version": 1, "searches": self.identity, "trials": trials}
        write_json(self.directory / FILE, content)


def open_record(directory: Path, cfg: SweepConfig, space: Space) -> SweepRecord:
    """The record of the sweep in `directory`, or a new one.

    Trials that failed through the machine become `running` again. Raises ConfigError if the file
    belongs to another sweep, or cannot be read.
    """
    identity, file = identity_of(cfg, space), directory / FILE
    if not file.exists():
        return SweepRecord(directory, identity, [])
    try:
        known = json.loads(file.read_bytes())
        recorded = {str(key): str(text) for key, text in known["searches"].items()}
        trials = [_from_json(one) for one in known["trials"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        rule = f"cannot be read ({why})"
        raise ConfigError(f"{file} {rule}; move it away, or give another sweep.name") from error
    if recorded != identity:
        raise ConfigError(_difference(directory.name, recorded, identity))
    for trial in trials:
        if trial.state is State.failed and trial.exit_code not in _FINAL_CODES:
            trial.state, trial.exit_code, trial.message = State.running, None, ""
    return SweepRecord(directory, identity, trials)


def identity_of(cfg: SweepConfig, space: Space) -> dict[str, str]:
    """What determines the results of the trials: option -> text. Secrets are hidden."""
    options = cfg.sweep
    found = {
        "sweep.sampler": options.sampler.value,
        "sweep.pruner": options.pruner.value,
        "sweep.metric": options.metric,
        "sweep.seed": str(options.seed),
    }
    for override in redact(list(space.fixed)):
        key, _, text = override.partition("=")
        if key.lstrip("+") not in _FREE and not key.lstrip("+").startswith(_FREE_SECTIONS):
            found[key.lstrip("+")] = text
    return found | {dimension.key: dimension.text for dimension in space.dimensions}


def _difference(name: str, recorded: dict[str, str], given: dict[str, str]) -> str:
    keys = [key for key in recorded | given if recorded.get(key) != given.get(key)]
    before, now = (
        shown(one[keys[0]]) if keys[0] in one else "not given" for one in (recorded, given)
    )
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    rule = f"is another sweep: its {keys[0]} is {before}, here it is {now}{more}"
    return f"sweep.name ({name}) {rule}; give another sweep.name"


def _to_json(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "values": trial.values,
        "state": trial.state.value,
        "exit_code": trial.exit_code,
        "message": redact(trial.message),
        "hours": trial.hours,
        "evaluations": [[one.step, one.value] for one in trial.evaluations],
    }


def _from_json(known: dict[str, Any]) -> Trial:
    evaluations = [Evaluation(int(step), float(value)) for step, value in known["evaluations"]]
    return Trial(
        int(known["number"]),
        {str(key): str(text) for key, text in known["values"].items()},
        State(known["state"]),
        known["exit_code"],
        str(known["message"]),
        known["hours"],
        evaluations,
    )
