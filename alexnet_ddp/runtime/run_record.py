"""Reads what a run has written in its directory: status, options and metrics. Needs no torch."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from alexnet_ddp.runtime.errors import ConfigError

_OF_A_RUN = ("run.json", "status.json")
# Where a run is. Its name is in the table, and every run has its own.
_PLACE = {"run.name", "run.root"}


@dataclass(frozen=True)
class RunRecord:
    """A run's directory. Its files are read when they are needed; a missing one is empty.

    Raises ConfigError for a file that cannot be read.
    """

    directory: Path
    name: str  # for tables: the directory relative to the root of the runs

    @property
    def exists(self) -> bool:
        """True if the directory is that of a run."""
        return _is_run(self.directory)

    @cached_property
    def options(self) -> dict[str, Any]:
        """OPTION -> value of the last start, with the choice of each group, such as "model"."""
        import yaml

        file = self.directory / "config.yaml"
        try:
            values = yaml.safe_load(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise _unreadable(file, error) from error
        if not isinstance(values, dict):
            raise _unreadable(file, TypeError("it holds no options"))
        # The choice augment=none has no options, so that flat() has an empty mapping for it.
        found = dict(flat(values)) | self._json("run.json").get("choices", {})
        return {key: value for key, value in found.items() if key not in _PLACE}

    @cached_property
    def given(self) -> set[str]:
        """The options on the command line of the last start."""
        overrides = self._json("run.json").get("overrides", [])
        return {str(one).partition("=")[0].lstrip("+~") for one in overrides}

    @cached_property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Step -> its metrics of metrics.jsonl, in the order of the steps.

        Damaged rows are left out.
        """
        file, found = self.directory / "metrics.jsonl", dict[int, dict[str, Any]]()
        try:
            lines = file.read_bytes().splitlines() if file.exists() else []
        except OSError as error:
            raise _unreadable(file, error) from error
        for line in lines:
            try:
                row = json.loads(line)
                found.setdefault(int(row["step"]), {}).update(row)
            except (ValueError, KeyError, TypeError):
                continue  # a run that was killed may leave a part of a row, and drops it on resume
        return dict(sorted(found.items()))

    @property
    def status(self) -> str:
        """The state in status.json; killed if it is running and its process has ended."""
        known = self._json("status.json")
        state = str(known.get("state", "unknown"))
        is_here = known.get("host") == socket.gethostname() and os.path.isdir("/proc/self")
        if state == "running" and is_here and not os.path.exists(f"/proc/{known.get('pid')}"):
            return "killed"
        return state

    @property
    def message(self) -> str:
        """Why the last start ended; "" if it runs, or is complete."""
        return str(self._json("status.json").get("message", ""))

    @property
    def exit_code(self) -> int | None:
        """With which code the last start ended; None if it runs, was killed, or is unknown."""
        code = self._json("status.json").get("exit_code")
        return code if isinstance(code, int) else None

    @property
    def status_time(self) -> str:
        """When the status was recorded, in ISO 8601; "" if it is unknown."""
        return str(self._json("status.json").get("time", ""))

    @property
    def facts(self) -> dict[str, Any]:
        """Of the last start: command, overrides, versions, git, world_size, host and so on."""
        return self._json("run.json")

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The facts of every start, the first one first."""
        starts = self.facts.get("starts", [])
        return [one for one in starts if isinstance(one, dict)] if isinstance(starts, list) else []

    @property
    def step(self) -> int:
        """The last step that the run has recorded."""
        return max([int(self._json("status.json").get("step", 0)), *self.rows])

    @property
    def best_evaluation(self) -> dict[str, Any]:
        """The row with the largest val/top1, the first of equal ones; empty without evaluations."""
        found = (row for row in self.rows.values() if "val/top1" in row)
        return max(found, key=lambda row: float(row["val/top1"]), default={})

    @property
    def images_per_sec(self) -> float | None:
        """The median throughput of all ranks together."""
        return self.median("train/images_per_sec")

    def median(self, metric: str) -> float | None:
        """The median of a metric over all rows that have it."""
        values = list(self.values(metric).values())
        return median(values) if values else None

    @property
    def hours(self) -> float | None:
        """Hours of work, over all starts."""
        values = list(self.values("time_s").values())
        return values[-1] / 3600 if values else None

    def values(self, metric: str) -> dict[int, float]:
        """Step -> value of a metric, of the steps that have it."""
        return {step: float(row[metric]) for step, row in self.rows.items() if metric in row}

    def _json(self, name: str) -> dict[str, Any]:
        file = self.directory / name
        try:
            found = json.loads(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise _unreadable(file, error) from error
        if not isinstance(found, dict):
            raise _unreadable(file, TypeError("it holds no object"))
        return found


def find_runs(root: Path) -> Iterator[RunRecord]:
    """Every run below `root`, or `root` itself if it is one, in the order of their names.

    The directories of a run are not searched. A folder is searched once, also if links lead back.
    """
    if _is_run(root):
        yield RunRecord(root, root.absolute().name)
        return
    seen = set[str]()
    for folder, below, _ in os.walk(root, followlinks=True):
        here, kept, place = Path(folder), list[str](), os.path.realpath(folder)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        for name in sorted(below):
            if _is_run(here / name):
                yield RunRecord(here / name, str((here / name).relative_to(root)))
            else:
                kept.append(name)
        below[:] = kept


def open_run(option: str, run: str, root: str, root_option: str = "root") -> RunRecord:
    """The run `run`: a directory, or a name below `root`. Raises ConfigError if there is none.

    root_option: the option with the value `root`, for the message.
    """
    for directory in (Path(root, run), Path(run)):
        if _is_run(directory):
            return RunRecord(directory, run)
    known = ", ".join(sorted(one.name for one in find_runs(Path(root)))) or "none"
    rule = f"is neither a run below {root} nor the directory of one"
    raise ConfigError(f"{option} ({run}) {rule}; there are: {known}; or give {root_option}=DIR")


def run_of_weights(weights: str, root: str) -> Path | None:
    """The directory of the run that the option model.weights names; None if it names no run.

    weights: runs/NAME, run:NAME (in `root`), or the directory of a checkpoint.
    """
    name = weights.removeprefix("run:")
    directory = Path(weights) if name == weights else Path(root, name)
    if not os.path.isdir(directory):  # is_dir() raises if the name is too long
        return None
    if directory.absolute().parent.name == "checkpoints":
        directory = directory.absolute().parents[1]
    return directory if _is_run(directory) else None


def differing(runs: list[RunRecord]) -> list[str]:
    """The options that do not have the same value in all runs which have recorded their options.

    Those of the command lines come first, and of these the ones with the most different values.
    """
    recorded = [run.options for run in runs if run.options]
    given = set().union(*(run.given for run in runs))
    values = {
        key: len({json.dumps(options.get(key), default=str) for options in recorded})
        for key in dict.fromkeys(key for options in recorded for key in options)
    }
    found = [key for key, count in values.items() if count > 1]
    return sorted(found, key=lambda key: (key not in given, -values[key]))


def option_text(value: Any) -> str:
    """A value as on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their full names, such as ("optimizer.lr", 0.1)."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _OF_A_RUN)


def _unreadable(file: Path, error: Exception) -> ConfigError:
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError(f"{file} cannot be read ({why}); move its directory elsewhere")
