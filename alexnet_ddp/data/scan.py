"""Looking at a disk once: walks through folders and tar archives, and the cache that remembers what they found.

The one rule: a name found here is compared, sorted and shown; it never becomes a path that something is written to.
"""

import hashlib
import json
import logging
import os
import re
import stat
import struct
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from alexnet_ddp.errors import DataError

# torchvision's ImageFolder takes the same ones.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Arrays = dict[str, np.ndarray]
Stamps = dict[str, list[int]]
T = TypeVar("T")

_FORMAT = 1  # of the cached arrays: another number, another file
_FRESH_NS = 2_000_000_000  # what changed so recently may change again within one tick of the file system's clock
_BLOCK = 512  # bytes, the unit of a tar archive
_MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records: anything larger is damage
_SUMMED = struct.Struct("148B8x356B")  # a tar header without its checksum
_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")  # the beginning of a pax record

log = logging.getLogger(__name__)


@dataclass
class Ignored:
    """What an index leaves out: a count and an example for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def merge(self, other: "Ignored") -> None:
        self.counts += other.counts
        self.examples = other.examples | self.examples

    def accepts(self, name: str, where: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
        """Whether `name` is that of a visible image; if not, it is counted."""
        if name.startswith("."):
            self.add("hidden", f"{where}/{name}")
        elif not name.lower().endswith(suffixes):
            self.add("other types", f"{where}/{name}")
        else:
            return True
        return False

    def notes(self) -> list[str]:
        return [
            f"ignored {n:,} entries ({reason}), such as {self.examples[reason]}" for reason, n in self.counts.items()
        ]


def report(found: Arrays) -> None:
    """Log what a scan left out, in the run that scanned and in those that read its cache."""
    for note in from_json(found["notes"]):
        log.warning(note)


def listed(names: list[str]) -> str:
    """At most five names, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def watched(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass `items` on. If that takes more than a second, and stderr is a terminal, a progress bar shows it."""
    bar = Progress(console=Console(stderr=True), transient=True)
    task, begin = bar.add_task(what, total=total), time.monotonic()
    try:
        for item in items:
            yield item
            bar.advance(task)
            if bar.console.is_terminal and not bar.live.is_started and time.monotonic() - begin > 1:
                bar.start()
    finally:
        if bar.live.is_started:
            bar.stop()


def to_json(value: Any) -> np.ndarray:
    """`value` as JSON in a uint8 array, so that .npz files hold no pickles."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def from_json(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())


def stamp(path: str | Path) -> list[int]:
    """[size in bytes (0 for a folder), mtime in ns] of what is there now."""
    found = os.stat(path)
    return [found.st_size if stat.S_ISREG(found.st_mode) else 0, found.st_mtime_ns]


def cached(kind: str, path: Path, build: Callable[[Stamps], Arrays]) -> Arrays:
    """The arrays `build` makes of `path`, from the user's cache while nothing they were made of has changed.

    `build` puts the `stamp` of each file or folder it looks at into the dict it is given, before it looks. A cache
    that is damaged or cannot be written costs a line in the log and the time to build again, never the run. Any
    number of processes may do this at once: files appear by rename, complete.
    """
    file = _cache_file(kind, path)
    arrays = _load(file) if file else None
    if arrays is None:
        stamps: Stamps = {}
        begin = time.time_ns()
        arrays = build(stamps)
        if file and all(mtime < begin - _FRESH_NS for _, mtime in stamps.values()):
            _save(file, arrays | {"stamps": to_json(stamps)})
    return arrays


def _cache_file(kind: str, path: Path) -> Path | None:
    key = hashlib.sha256(f"{_FORMAT}\0{kind}\0".encode() + os.fsencode(os.path.abspath(path))).hexdigest()
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return base / "alexnet_ddp" / "index" / f"{kind}-{key[:32]}.npz"


def _load(file: Path) -> Arrays | None:
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as found:
            if any(stamp(path) != value for path, value in from_json(found["stamps"]).items()):
                return None
            return {name: found[name] for name in found.files if name != "stamps"}
    except FileNotFoundError:  # no cache yet, or something it was made of is gone
        return None
    except Exception as error:  # damaged bytes can raise nearly anything in zipfile and numpy
        log.warning("the index in %s is unreadable (%s: %s): building it again", file, type(error).__name__, error)
        return None


def _save(file: Path, arrays: Arrays) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as stream:
            np.savez(stream, **arrays)  # with a CRC for each array, so a torn file is noticed
        os.replace(draft, file)
    except OSError as error:
        log.warning("the index cannot be cached in %s (%s): the next start builds it again", file.parent, error)
        if draft.parent.is_dir():
            draft.unlink(missing_ok=True)


class Member(NamedTuple):
    """A regular file in a tar archive."""

    name: str
    offset: int  # of its bytes, from the start of the outermost archive
    size: int  # in bytes


def tar_members(fd: int, path: Path, start: int, stop: int) -> Iterator[Member]:
    """The regular files of the tar archive in bytes [start, stop) of the open file `fd`, in the order stored.

    Reads ustar, GNU (long names, large sizes) and pax headers, each checksummed, and never the files themselves: about
    10 us each. Raises DataError with `path` and the offset where the archive is cut short, damaged or sparse.
    """
    position, extra = start, dict[str, str]()
    while header := _header(fd, path, position, stop):
        kind, offset = header[156:157], position + _BLOCK
        size = int(extra["size"]) if extra.get("size", "").isdecimal() else _number(header[124:136])
        if size < 0:
            raise _damaged(path, position, "holds no valid tar header")
        if offset + size > stop:
            raise _damaged(path, position, "is cut short in the file that begins")
        if kind in b"Lx" and size <= _MAX_EXTENSION:
            body = os.pread(fd, size, offset)
            extra |= {"path": _text(body)} if kind == b"L" else _pax_records(body)
        elif kind in b"LxS" or any(key.startswith("GNU.sparse") for key in extra):
            raise _damaged(path, position, "holds a sparse file or an overlong header")
        elif kind not in b"gK":
            if kind in b"0\x007":
                yield Member(extra.get("path") or header_name(header), offset, size)
            extra = {}
        position = offset + -(-size // _BLOCK) * _BLOCK


def header_name(header: bytes) -> str:
    """The name in a 512-byte tar header."""
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _header(fd: int, path: Path, position: int, stop: int) -> bytes | None:
    """The header at `position`; None where a block of zeros ends the archive."""
    header = os.pread(fd, _BLOCK, position) if position + _BLOCK <= stop else b""
    if len(header) < _BLOCK:
        raise _damaged(path, position, "is cut short")
    if header == bytes(_BLOCK):
        return None
    if sum(_SUMMED.unpack_from(header)) + 8 * ord(" ") != _number(header[148:156]):
        raise _damaged(path, position, "holds no valid tar header")
    return header


def _number(digits: bytes) -> int:
    """Octal digits, or GNU's big-endian binary for numbers that do not fit; -1 for neither."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(body: bytes) -> dict[str, str]:
    """The keys that matter here of the records 'LENGTH KEY=VALUE\\n', where LENGTH counts the whole record."""
    records = {}
    while found := _RECORD.match(body):
        key, rest = _text(found[2]), int(found[1])
        records[key], body = _text(body[found.end() : rest].rstrip(b"\n")), body[rest:]
        if rest <= found.end():
            break
    return records


def _damaged(path: Path, offset: int, what: str) -> DataError:
    return DataError(f"{path} {what} at byte {offset:,}; compare its size and MD5 with the source's, and copy it again")
