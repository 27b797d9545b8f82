"""Reads what a run has written in its directory: status, options and metrics. Needs no torch."""

import json
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any

from alexnet_ddp.runtime.accuracy import counts_of
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.files import parse_row
from alexnet_ddp.runtime.printing import listed

_OF_A_RUN = ("run.json", "status.json")
# What is read of these files, with its types. A value may be left out.
_TYPES: dict[str, dict[str, type | UnionType]] = {
    "status.json": {"state": str, "step": int, "message": str, "exit_code": int | None},
    "run.json": {
        **dict.fromkeys(("choices", "versions"), dict),
        **dict.fromkeys(("command", "overrides", "starts"), list),
        **dict.fromkeys(("world_size", "num_nodes", "local_world_size", "start_step"), int),
        "time": str,
        "git": dict | None,
        "peak_tflops": int | float,
    },
}
# Where a run is. Its name is in the table, and every run has its own.
_PLACE = {"run.name", "run.root"}
_TEXTS = ("data/index_hash",)  # of a row of metrics.jsonl
_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers
# Metrics that are never one of these, and all times of a row, such as time/step_s.
_FINITE = ("epoch", "val/num_images", "train/slowest_rank")
_LONGEST_S = 1e9  # 30 years
_LARGEST_INTEGER = 2**53  # float() is exact up to it
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
}


@dataclass(frozen=True)
class RunRecord:
    """A run's directory. Its files are read when they are needed; a missing one is empty.

    Raises ConfigError for a file that cannot be read, or has a value of another type.
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
            if not isinstance(values, dict):
                raise TypeError("it holds no options")
            options = dict(flat(values))
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            raise _unreadable(file, error) from error
        # The choice augment=none has no options, so that flat() has an empty mapping for it.
        found = options | self._json("run.json").get("choices", {})
        return {key: value for key, value in found.items() if key not in _PLACE}

    @cached_property
    def given(self) -> set[str]:
        """The options on the command line of the last start."""
        overrides = self._json("run.json").get("overrides", [])
        return {str(one).partition("=")[0].lstrip("+~") for one in overrides}

    @cached_property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Step -> its metrics of metrics.jsonl, in the order of the steps.

        Lines that are no rows are left out. Values are numbers, or "nan", "inf" and "-inf", which
        float() converts; only data/index_hash is a text. Times, epochs and counts are finite.
        """
        file, found = self.directory / "metrics.jsonl", dict[int, dict[str, Any]]()
        try:
            lines = file.read_bytes().splitlines() if file.exists() else []
        except OSError as error:
            raise _unreadable(file, error) from error
        for line in lines:
            row = parse_row(line)  # a run that was killed may leave a part of a row
            if row is not None:
                found.setdefault(row["step"], {}).update(row)
        for row in found.values():
            _require_sound(file, row)
        return dict(sorted(found.items()))

    @property
    def status(self) -> str:
        """The state in status.json; killed if it is running and its process has ended."""
        known = self._json("status.json")
        state = known.get("state", "unknown")
        is_here = known.get("host") == socket.gethostname() and os.path.isdir("/proc/self")
        if state == "running" and is_here and not os.path.exists(f"/proc/{known.get('pid')}"):
            return "killed"
        return state

    @property
    def message(self) -> str:
        """Why the last start ended; "" if it runs, or is complete."""
        return self._json("status.json").get("message", "")

    @property
    def exit_code(self) -> int | None:
        """With which code the last start ended; None if it runs, was killed, or is unknown."""
        return self._json("status.json").get("exit_code")

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
        file = self.directory / "run.json"
        return [_checked(file, one) for one in self.facts.get("starts", [])]

    @property
    def step(self) -> int:
        """The last step that the run has recorded."""
        return max([self._json("status.json").get("step", 0), *self.rows])

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
        """Hours of work over all starts, without work that was lost and repeated."""
        values = list(self.values("time_s").values())
        return values[-1] / 3600 if values else None

    def values(self, metric: str) -> dict[int, float]:
        """Step -> value of a metric, of the steps that have it."""
        return {step: float(row[metric]) for step, row in self.rows.items() if metric in row}

    def _json(self, name: str) -> dict[str, Any]:
        file = self.directory / name
        try:
            found = json.loads(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise _unreadable(file, error) from error
        return _checked(file, found)


def find_runs(root: Path) -> Iterator[RunRecord]:
    """Every run below `root`, or `root` itself if it is one, in the order of their names.

    Folders in which every start was refused are left out: see _is_refused.
    The directories of a run are not searched. A folder is searched once, also if links lead back.
    """
    if _is_run(root):
        if not _is_refused(root):
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
            if not _is_run(here / name):
                kept.append(name)
            elif not _is_refused(here / name):
                yield RunRecord(here / name, str((here / name).relative_to(root)))
        below[:] = kept


def open_run(option: str, run: str, root: str, root_option: str = "root") -> RunRecord:
    """The run `run`: a directory, or a name below `root`. Raises ConfigError if there is none.

    root_option: the option with the value `root`, for the message.
    """
    for directory in (Path(root, run), Path(run)):
        if _is_run(directory):
            return RunRecord(directory, run)
    known = listed(sorted(one.name for one in find_runs(Path(root)))) or "none"
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


def read_classes(run_dir: Path) -> dict[str, list[str]]:
    """The classes of a run: "ids", the folder names in the order of the labels, and "names".

    Raises DataError if the file cannot be read.
    """
    file = run_dir / "classes.json"
    try:
        found = json.loads(file.read_bytes())
        for key in ("ids", "names"):
            if not isinstance(found[key], list):
                raise TypeError(f"{key} is {_type(found[key])} in place of a list")
        return {key: [str(one) for one in found[key]] for key in ("ids", "names")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{file} cannot be read ({why}); start the training again") from error


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
    return value if isinstance(value, str) else json.dumps(value, default=str)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their full names, such as ("optimizer.lr", 0.1)."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _OF_A_RUN)


def _is_refused(directory: Path) -> bool:
    """True if the last start was refused for its options or its data, and no earlier one trained.

    run.json is written right before the first step. A start that is still preparing that step, or
    that failed there for another reason, is a run.
    """
    if (directory / "run.json").is_file():
        return False
    try:
        code = RunRecord(directory, directory.name).exit_code
    except ConfigError:
        return False  # the caller finds that it cannot be read
    return code in (ConfigError.exit_code, DataError.exit_code)


def _checked(file: Path, found: Any) -> dict[str, Any]:
    """`found`, the content of `file` or one of its starts. Raises ConfigError for a wrong type."""
    if not isinstance(found, dict):
        raise _unreadable(file, TypeError(f"it holds {_type(found)} in place of an object"))
    for key, expected in _TYPES[file.name].items():
        if key in found and not isinstance(found[key], expected):
            raise _unreadable(file, TypeError(f"{key} is {_type(found[key])}"))
    return found


def _require_sound(file: Path, row: dict[str, Any]) -> None:
    """Raise ConfigError if a metric is no number, or a time or a count is not a possible one."""
    for name, value in row.items():
        if name not in _TEXTS and not _is_sound(name, value):
            what = "no number" if not _is_number(value) else "out of range"
            why = TypeError(f"{name} of step {row['step']} is {value!r}, and {what}")
            raise _unreadable(file, why)
    try:
        for metric in ("val/top1", "val/top5"):
            counts_of(row, metric)
    except ValueError as error:
        raise _unreadable(file, ValueError(f"step {row['step']} has {error}")) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in _NOT_FINITE


def _is_sound(name: str, value: Any) -> bool:
    if not _is_number(value) or (isinstance(value, int) and abs(value) > _LARGEST_INTEGER):
        return False
    if name == "time_s" or name.startswith("time/"):
        return 0 <= float(value) <= _LONGEST_S
    return name not in _FINITE or 0 <= float(value) < math.inf


def _type(value: Any) -> str:
    """The type of a value as JSON calls it."""
    return _JSON_TYPES.get(type(value), "null")


def _unreadable(file: Path, error: Exception) -> ConfigError:
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError(f"{file} cannot be read ({why}); move its directory elsewhere")
