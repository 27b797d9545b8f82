"""Writes run.json, config.yaml, classes.json and status.json of a run, each atomically."""

import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from alexnet_ddp import __version__
from alexnet_ddp.runtime.distributed import lost_peer
from alexnet_ddp.runtime.errors import (
    ConfigError,
    DataError,
    Preempted,
    RunError,
    StoppedByService,
    out_of_memory,
)
from alexnet_ddp.runtime.files import write_bytes, write_json
from alexnet_ddp.runtime.redaction import redact, redact_yaml
from alexnet_ddp.runtime.startup import before_exit
from alexnet_ddp.runtime.sweep_record import is_sweep
from alexnet_ddp.tracking import events

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).resolve().parents[1]


def write_status(
    run_dir: Path, state: str, step: int, exit_code: int | None = None, message: str = ""
) -> None:
    """Write status.json for launch scripts.

    state: running, complete, preempted, stopped (for good) or failed.
    """
    status = {
        "state": state,
        "step": step,
        "exit_code": exit_code,
        "message": redact(message),
        **_here(),
    }
    write_json(run_dir / "status.json", status)


def record_run(
    run_dir: Path, config_yaml: str, facts: dict[str, Any], classes: dict[str, list[str]]
) -> None:
    """Write config.yaml, classes.json and run.json.

    run.json contains the facts of this start, and in "starts" those of every start. classes: "ids",
    the folder names in the order of the labels, and "names", their readable names.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(run_dir / "config.yaml", redact_yaml(config_yaml).encode())
    write_json(run_dir / "classes.json", classes)
    start = redact(
        {**_here(), "command": sys.orig_argv, "versions": _versions(), "git": _git(), **facts}
    )
    path = run_dir / "run.json"
    write_json(path, {**start, "starts": [*_earlier_starts(path), start]})


def make_run_dir(run_dir: Path) -> None:
    """Create run_dir. Raises ConfigError if it cannot be written to, or is that of a sweep."""
    if is_sweep(run_dir):
        raise ConfigError(f"run.name ({run_dir.name}) is the name of a sweep; give another one")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.root ({run_dir.parent}) cannot be written to ({error.strerror}); choose another"
        ) from error
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(
            f"run.root ({run_dir.parent}): {run_dir.name} cannot be written to; choose another"
        )


def _here() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "pid": os.getpid(), "host": socket.gethostname()}


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s is not readable (%s: %s): its list of starts is replaced",
            path,
            type(error).__name__,
            error,
        )
        return []
    return starts if isinstance(starts, list) else []


def _versions() -> dict[str, str | None]:
    versions = {name: _version(name) for name in ("torch", "torchvision", "numpy")}
    cv2 = _version("opencv-python-headless") or _version("opencv-python")
    return {"alexnet_ddp": __version__, "python": platform.python_version(), **versions, "cv2": cv2}


def code_facts() -> dict[str, Any]:
    """Return the git commit of the source tree and the versions of what computes, by flat names."""
    git = _git()
    facts = {"git_commit": git["commit"], "git_dirty": git["dirty"]} if git else {}
    return facts | {f"version_{name}": version for name, version in _versions().items()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(tree: Path = PACKAGE) -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree; None for an installed package.

    An installed package may be in a .venv inside of another repository, hence `ls-files`.
    """
    if _git_output(tree, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git_output(tree, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_git_output(tree, "status", "--porcelain"))}


def _git_output(tree: Path, *arguments: str) -> str | None:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(tree), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env=env, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class RunStatus:
    """Writes status.json and events.jsonl on rank 0.

    If that fails, it logs a warning and the run continues.
    """

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self._run_dir = run_dir
        self._is_main = is_main
        self._step = 0
        self._started = False

    def running(self, step: int) -> None:
        """Record that the run starts at `step`."""
        self._step = step
        self._note_lost_start()
        self._started = True
        self._write("running")

    def saved(self, step: int, seconds: float) -> None:
        """Record that a checkpoint of `step` was requested. The training waited for `seconds`."""
        self._step = step
        self._add_event(events.SAVE, seconds=seconds)
        self._write("running")

    def stopped_while_starting(self) -> None:
        """Record a stop signal before the first step."""
        if self._started:
            self._write(
                "preempted", Preempted.exit_code, "stopped while it started; nothing is lost"
            )

    def finished(self, error: BaseException | None) -> None:
        """Record the end of the run: complete, or the error that ended it."""
        if error is None:
            self._write("complete", 0)
        elif not isinstance(error, RunError):
            self._write("failed", 1, f"{type(error).__name__}: {error}")
        elif not self._belongs_to_another(error):
            states = {Preempted.exit_code: "preempted", StoppedByService.exit_code: "stopped"}
            state = states.get(error.exit_code, "failed")
            self._write(state, error.exit_code, str(error))

    def _belongs_to_another(self, error: RunError) -> bool:
        """True if options or data were refused before a step, in the folder of a run or a sweep."""
        codes = (ConfigError.exit_code, DataError.exit_code)
        refused = error.exit_code in codes and not self._started
        return refused and ((self._run_dir / "status.json").exists() or is_sweep(self._run_dir))

    def _write(self, state: str, exit_code: int | None = None, message: str = "") -> None:
        if not self._is_main:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            write_status(self._run_dir, state, self._step, exit_code, message)
        except OSError as error:
            log.warning("status.json could not be written: %s", error)
        if state != "running" and self._started:
            self._add_event(events.END, state=state, message=redact(message))

    def _add_event(self, event: str, **facts: str | float) -> None:
        if not self._is_main:
            return
        try:
            events.add_event(self._run_dir, event, self._step, **facts)
        except OSError as error:
            log.warning("%s could not be written: %s", events.FILE, error)

    def _note_lost_start(self) -> None:
        if not self._is_main:
            return
        try:
            status = json.loads((self._run_dir / "status.json").read_bytes())
            events.note_lost_start(self._run_dir, status)
        except FileNotFoundError:  # the first start
            return
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("the end of the earlier start could not be recorded: %s", error)


@contextmanager
def run_status(run_dir: Path, is_main: bool) -> Iterator[RunStatus]:
    """Write status.json when the block ends, also if it raises.

    Raises the error of the block; an out-of-memory error becomes a MachineError, a lost rank a
    PeerLost.
    """
    status = RunStatus(run_dir, is_main)
    try:
        with before_exit(status.stopped_while_starting):
            yield status
    except BaseException as caught:
        error = out_of_memory(caught) or lost_peer(caught) or caught
        status.finished(error)
        if error is caught:
            raise
        raise error from caught
    status.finished(None)
