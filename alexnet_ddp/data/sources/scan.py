"""Shared by the scans of folders and archives: name rules, progress and the cache of their results.

Names found by a scan are compared, sorted and shown, but never used as a path to write to.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alexnet_ddp.runtime.files import atomic_file, user_cache
from alexnet_ddp.runtime.printing import printable

# The same as in torchvision's ImageFolder.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Arrays = dict[str, np.ndarray]
Stamps = dict[str, list[int]]
T = TypeVar("T")

_FORMAT = 3  # of the cached arrays; part of the name of the cache file
# A path that changed this recently may change again within one tick of the file system's clock.
_FRESH_NS = 2_000_000_000

log = logging.getLogger(__name__)


@dataclass
class Ignored:
    """Counts the entries that an index leaves out, with an example, for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def merge(self, other: "Ignored") -> None:
        self.counts += other.counts
        self.examples = other.examples | self.examples

    def accepts(self, name: str, folder: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
        """Whether `name` is a visible file with one of `suffixes`; counts it if not."""
        if name.startswith("."):
            self.add("hidden", f"{folder}/{name}")
        elif not name.lower().endswith(suffixes):
            self.add("other types", f"{folder}/{name}")
        else:
            return True
        return False

    def notes(self) -> list[str]:
        """One message for each reason."""
        return [
            f"ignored {n:,} {'entry' if n == 1 else 'entries'} ({reason}), "
            f"such as {self.examples[reason]}"
            for reason, n in self.counts.items()
        ]


def report(found: Arrays) -> None:
    """Log what the scan left out, also if `found` comes from the cache."""
    for note in from_json(found["notes"]):
        log.warning(note)


def watched(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield `items`; after one second, show a progress bar if stderr is a terminal."""
    from alexnet_ddp.runtime.terminal import progress_bar  # slow to import

    bar = progress_bar()
    task, begin = bar.add_task(printable(what), total=total), time.monotonic()
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
    """`value` as JSON in a uint8 array, so that .npz files contain no pickles."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def from_json(array: np.ndarray) -> Any:
    """The value that to_json() stored."""
    return json.loads(array.tobytes())


def stamp(path: str | Path) -> list[int]:
    """[size in bytes, mtime in ns, ctime in ns, inode] of a file or folder.

    The modification time alone does not detect a replaced file, because tar, rsync and cp -p set
    it. On a file system that changes inode numbers with each mount, the only cost is a new scan.
    """
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def cached(
    kind: str,
    path: Path,
    build: Callable[[Stamps], Arrays],
    variant: str = "",
    is_current: Callable[[Arrays], bool] = lambda arrays: True,
) -> Arrays:
    """The arrays that `build` returns for `path`, from the user's cache if nothing has changed.

    build(stamps): must store the `stamp` of each file or folder in `stamps` before it reads it.
    variant: the options of `build`, as part of the cache key.
    is_current: checks for changes that the stamps do not show.
    If the cache is damaged or cannot be written, a warning is logged and the arrays are built.
    Several processes may call this at once, because cache files are created by rename.
    """
    file = _cache_file(kind, path, variant)
    arrays = _load(file) if file else None
    if arrays is None or not is_current(arrays):
        stamps: Stamps = {}
        begin = time.time_ns()
        arrays = build(stamps)
        if file and all(mtime < begin - _FRESH_NS for _, mtime, *_ in stamps.values()):
            _save(file, arrays | {"stamps": to_json(stamps)})
    return arrays


def _cache_file(kind: str, path: Path, variant: str) -> Path | None:
    what = f"{_FORMAT}\0{kind}\0{variant}\0".encode(errors="surrogateescape")
    key = hashlib.sha256(what + os.fsencode(os.path.abspath(path))).hexdigest()
    folder = user_cache("index")
    return None if folder is None else folder / f"{kind}-{key[:32]}.npz"


def _load(file: Path) -> Arrays | None:
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as found:
            if any(stamp(path) != value for path, value in from_json(found["stamps"]).items()):
                return None
            return {name: found[name] for name in found.files if name != "stamps"}
    except FileNotFoundError:  # no cache yet, or one of the stamped paths is gone
        return None
    except Exception as error:  # damaged bytes can raise nearly anything in zipfile and numpy
        log.warning(
            "the index in %s is unreadable (%s: %s): building it again",
            file,
            type(error).__name__,
            error,
        )
        return None


def _save(file: Path, arrays: Arrays) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, draft) as stream:
            # With a CRC for each array, so that a torn file is noticed.
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
    except OSError as error:
        log.warning(
            "the index cannot be cached in %s (%s): the next start builds it again",
            file.parent,
            error,
        )
