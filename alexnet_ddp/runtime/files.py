"""Files that are there whole or not at all, whenever the process or the machine stops."""

import json
import math
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """A value that JSON has: numbers of numpy and torch become Python's, nan and infinities the strings nan, inf, -inf.

    `float(row[name])` reads them all back.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    return float(number) if isinstance(number, float) else number


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one piece: temporary file beside it, fsync, rename, fsync of the directory. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """On the disk when it returns, but not in one piece."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        row = _parse_row(line, fields)
        if row is None:
            num_damaged += 1
        elif row["step"] <= last_step:
            rows.append(row)
            lines.append(line + b"\n")
    kept = b"".join(lines)
    if kept != content:
        write_bytes(path, kept)
    return rows, num_damaged


def _parse_row(line: bytes, fields: frozenset[str]) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_valid = isinstance(row, dict) and isinstance(row.get("step"), int) and fields <= row.keys()
    return row if is_valid else None


def write_json(path: Path, obj: Any) -> None:
    write_bytes(path, (json.dumps(plain(obj), indent=2, allow_nan=False) + "\n").encode())
