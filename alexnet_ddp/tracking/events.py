"""events.jsonl: when a run was saved, how each start ended, and which start ended without a word.

metrics.jsonl forgets the steps that a resumed run repeats, and status.json is of the last start.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alexnet_ddp.runtime.files import parse_row, plain

FILE = "events.jsonl"
SAVE, END, LOST = "save", "end", "lost"


def add_event(run_dir: Path, event: str, step: int, **facts: Any) -> None:
    """Append a line to events.jsonl, with the time. Raises OSError.

    event: SAVE: a checkpoint was requested; facts: seconds for which the training waited. END: the
    start ended; facts: state, message.
    """
    now = _text(datetime.now(UTC).timestamp())
    _append(run_dir, {"time": now, "event": event, "step": step}, facts)


def note_lost_start(run_dir: Path, status: dict[str, Any]) -> None:
    """Record that the earlier start whose status.json is `status` ended without recording why.

    It was killed, or its machine was lost. The time and the step are those of the last trace that
    it left; the message is its watchdog's, if that has seen the end. Nothing is recorded for a
    start that has recorded its end. Raises OSError.
    """
    is_mine = (status.get("host"), status.get("pid")) == (socket.gethostname(), os.getpid())
    if status.get("state") != "running" or is_mine:
        return
    step, time = _last_row(run_dir / "metrics.jsonl")
    saved = _seconds(status.get("time"))
    time = max(time, saved)
    row = {"time": _text(time), "event": LOST, "step": max(step, int(status.get("step", 0)))}
    _append(run_dir, row, {"message": _failure(run_dir / "failure.json", saved)})


def _append(run_dir: Path, row: dict[str, Any], facts: dict[str, Any]) -> None:
    line = (json.dumps(plain(row | facts), allow_nan=False) + "\n").encode()
    descriptor = os.open(run_dir / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _last_row(file: Path) -> tuple[int, float]:
    """The step of the last row of metrics.jsonl, and the time when it was written."""
    if not file.exists():
        return 0, 0.0
    for line in reversed(file.read_bytes().splitlines()):
        row = parse_row(line)  # a start that was killed may leave a part of a row
        if row is not None:
            return row["step"], file.stat().st_mtime
    return 0, 0.0


def _failure(file: Path, since: float) -> str:
    """What a watchdog has written about a rank; "" if it wrote nothing after `since`."""
    try:
        found = json.loads(file.read_bytes())
        if _seconds(found["time"]) < since - 1:  # both times are in whole seconds
            return ""
        return f"rank {found['rank']} on {found['host']} {found['cause']}, phase: {found['phase']}"
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it was being written
        return ""


def _seconds(time: Any) -> float:
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return 0.0


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
