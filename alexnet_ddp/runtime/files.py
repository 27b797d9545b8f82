"""Atomic writes, JSON values, file locks and free space. Needs no torch."""

import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO, runtime_checkable

from alexnet_ddp.runtime.errors import ConfigError

_LEASE_S = 120.0  # a network file system keeps the lock of a dead machine for about this long

log = logging.getLogger(__name__)


# --- writing ------------------------------------------------------------------------------------


@contextmanager
def durable_file(path: Path, evict: bool = False) -> Iterator[BinaryIO]:
    """Open `path` for writing; when the block ends, its content is on the disk (fsync).

    If the block raises, an incomplete file remains: use atomic_file to avoid that.

    Args:
        path: the file, which is created or overwritten.
        evict: drop the content from the page cache after the fsync.
    """
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        if evict and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def atomic_file(path: Path, draft: Path | None = None) -> Iterator[BinaryIO]:
    """Open a draft for writing; when the block ends, rename it to `path`, replacing an older file.

    If the block raises, the draft is removed and `path` is unchanged. Raises OSError.

    Args:
        path: the final name.
        draft: name of the temporary file, on the same file system. Default: a hidden file in the
            same directory whose name contains the process id.
    """
    draft = draft or path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with durable_file(draft) as file:
            yield file
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` atomically. Raises OSError."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as JSON to `path` atomically. See plain() for the values. Raises OSError."""
    write_bytes(path, (json.dumps(plain(obj), indent=2, allow_nan=False) + "\n").encode())


def keep_rows(
    path: Path, last_step: int, fields: frozenset[str] = frozenset()
) -> tuple[list[dict[str, Any]], int]:
    """Drop damaged lines and rows after `last_step` from a JSON-lines file; it need not exist.

    A row must be an object with `fields` and an integer "step". Returns the kept rows and the
    number of damaged lines. The file is only written if it changes. Raises OSError.
    """
    content = path.read_bytes() if path.exists() else b""
    rows, lines, num_damaged = [], [], 0
    for line in content.splitlines():
        row = parse_row(line)
        if row is None or not fields <= row.keys():
            num_damaged += 1
        elif row["step"] <= last_step:
            rows.append(row)
            lines.append(line + b"\n")
    kept = b"".join(lines)
    if kept != content:
        write_bytes(path, kept)
    return rows, num_damaged


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The object in a line of JSON; None if it is damaged, or has no integer "step"."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def sync_directory(path: Path) -> None:
    """fsync the directory `path`, so that a rename inside it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@runtime_checkable
class _Scalar(Protocol):
    """A number of numpy or torch."""

    def item(self) -> Any: ...


def plain(value: Any) -> Any:
    """Convert a value to types that JSON supports.

    Numbers of numpy and torch become Python numbers; NaN and infinities become the strings "nan",
    "inf" and "-inf", which float() converts back. Paths become strings.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    number = value.item() if isinstance(value, _Scalar) else value
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    return float(number) if isinstance(number, float) else number


# --- places and free space ------------------------------------------------------------------------


def user_cache(kind: str) -> Path | None:
    """Return this user's cache folder for files of `kind`: $XDG_CACHE_HOME/alexnet_ddp/KIND.

    The folder need not exist. None if the user has no home directory, as in some containers.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "alexnet_ddp" / kind


def existing_parent(path: Path) -> Path:
    """Return `path`, or its nearest parent directory that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def require_folder_of(option: str, path: str | Path) -> None:
    """Raise ConfigError unless the folder of `path`, the value of `option`, exists."""
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{option} ({path}) must be in an existing directory; create it first")


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that contains `path`, which need not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


# --- locks --------------------------------------------------------------------------------------


def lock_file(file: TextIO | int, wait: bool = False) -> bool:
    """Take the exclusive lock of an open file or directory; closing the file releases it.

    Returns False if another process holds the lock and `wait` is false. Raises OSError if the file
    system does not support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_run(run_dir: Path) -> TextIO | None:
    """Take the lock of a run directory, so that no second process trains the same run.

    Returns the lock file; closing it, or the end of the process, releases the lock. Returns None if
    the file system does not support locks.

    Raises:
        ConfigError: another process holds the lock.
    """
    file = (run_dir / ".lock").open("a+")
    started = time.monotonic()
    try:
        while not lock_file(file):
            file.seek(0)
            holder = file.read().strip()
            if _is_running(holder) or time.monotonic() - started > _LEASE_S:
                raise ConfigError(
                    f"run.name={run_dir.name} is being trained by {holder}; "
                    "wait for it, end it, or choose another run.name"
                )
            time.sleep(1)
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): do not start the same run twice", run_dir, error.strerror
        )
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _is_running(holder: str) -> bool:
    """Return whether `holder`, a line that lock_run wrote, names a live process on this machine."""
    found = re.fullmatch(r"process (\d+) on (.*)", holder)
    return (
        found is not None
        and found[2] == socket.gethostname()
        and Path(f"/proc/{found[1]}").exists()
    )
