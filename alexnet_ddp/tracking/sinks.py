"""metrics.jsonl, the complete record of a run. Its one rule: one row is one write, and no step is told twice.

A row is flat: step, epoch, time_s (seconds of work, over all restarts), then the metrics. JSON has no nan and no
infinities: they are the strings "nan", "inf", "-inf".
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alexnet_ddp.runtime.files import plain, write_bytes

Say = Callable[[str], None]


class JsonlSink:
    """Rows after `start_step` are dropped from an existing file: the run, resumed there, will tell them again."""

    def __init__(self, path: Path, start_step: int, say: Say) -> None:
        rows = _kept_rows(path, start_step, say)
        self._path = path
        self._say = say
        self._num_lost = 0
        self._began = time.monotonic() - (float(rows[-1].get("time_s", 0.0)) if rows else 0.0)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.start_offset = os.fstat(self._fd).st_size  # bytes; a follower of the file starts here

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        """A full disk costs rows, not the run: a torn row is cut off again."""
        time_s = round(time.monotonic() - self._began, 3)
        line = _encode({"step": step, "epoch": epoch, "time_s": time_s} | metrics)
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) < len(line):
                os.ftruncate(self._fd, size)
                raise OSError("the disk took only a part of the row")
        except OSError as error:
            self._num_lost += 1
            if self._num_lost == 1:
                self._say(f"warning: a row of {self._path} is lost: {error}")

    def close(self, exit_code: int) -> None:
        os.close(self._fd)
        if self._num_lost:
            self._say(f"warning: {self._num_lost} rows of {self._path} are lost")


def _encode(row: dict[str, Any]) -> bytes:
    return (json.dumps(plain(row), allow_nan=False) + "\n").encode()


def _kept_rows(path: Path, start_step: int, say: Say) -> list[dict[str, Any]]:
    """Rows up to `start_step`, evaluations at it included; none when the run starts at 0. The file is rewritten so."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [_parse(line) for line in lines]
    kept = [(line, row) for line, row in zip(lines, rows) if row and 0 < start_step >= row["step"]]
    num_torn = rows.count(None)
    if num_torn:
        say(f"{path}: {num_torn} torn {'row' if num_torn == 1 else 'rows'} dropped")
    if len(kept) < len(lines):
        write_bytes(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a row that a killed process or a bad disk tore."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


class TensorBoardSink:
    name = "TensorBoard"

    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # seconds of imports that not every run wants

        # A resumed run tells the steps after start_step again; one that starts at 0 tells step 0 again too.
        self._writer = SummaryWriter(directory, purge_step=start_step + 1 if start_step else 0)

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        """Strings are skipped. Flushed, so that a killed process loses nothing that it has told."""
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        self._writer.close()
