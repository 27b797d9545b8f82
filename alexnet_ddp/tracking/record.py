"""What a run writes about itself: run.json, config.yaml, status.json. Its one rule: no reader sees half a file."""

import json
import logging
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from alexnet_ddp import __version__
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.files import write_bytes, write_json
from alexnet_ddp.runtime.redaction import redact, redact_yaml

LOG = logging.getLogger(__name__)
PACKAGE = Path(__file__).resolve().parents[1]


def write_status(
    run_dir: Path, state: str, step: int, exit_code: int | None = None, message: str = ""
) -> None:
    """How the run stands, for launch scripts. `state` is running, complete, preempted or failed."""
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
    """config.yaml, classes.json and run.json. Each start appends to `starts`; beside it stand the latest one's facts.

    classes: "ids", the names of the folders in the order of the labels, and "names", what people call them.
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
    """Raises ConfigError where nothing can be written there: before an hour of work, not after."""
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


def read_classes(run_dir: Path) -> dict[str, list[str]]:
    """What record_run wrote. Raises DataError where it is gone."""
    try:
        return json.loads((run_dir / "classes.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run_dir / 'classes.json'} cannot be read ({error}); start the training once more"
        ) from error


def _here() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "pid": os.getpid(), "host": socket.gethostname()}


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning(
            "%s is not readable (%s: %s): its list of starts begins anew",
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


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(tree: Path = PACKAGE) -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree; None for an installed package (its .venv may lie in another tree)."""
    if _git_says(tree, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git_says(tree, "rev-parse", "HEAD")
    return commit and {"commit": commit, "dirty": bool(_git_says(tree, "status", "--porcelain"))}


def _git_says(tree: Path, *arguments: str) -> str | None:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(tree), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env=env, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
