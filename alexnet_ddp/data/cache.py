"""Shards that are far away, on the disk of this node: whole files, each fetched by one process of the node, verified.

The one rule: a file is named by its SHA-256, so it is the right one or it is not there, whatever else uses the folder.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from alexnet_ddp.data.storage import Storage
from alexnet_ddp.runtime.files import atomic_file, lock_file

_ATTEMPTS, _PAUSE_S = 3, 1.0  # to fetch a file; the pause doubles
_FETCHERS = 2  # files fetched at once, a process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeCache:
    """Files of `storage` in `directory`, which all ranks of a node share. Pickles.

    With `limit` (bytes), those that were used least recently give way to new ones; who has one open may go on reading.
    """

    storage: Storage
    directory: str
    limit: int | None

    @cached_property
    def _wanted(self) -> SimpleQueue[tuple[str, str, int]]:
        """What to fetch in the background. Daemon threads do it: the end of a run does not wait for them."""
        wanted: SimpleQueue[tuple[str, str, int]] = SimpleQueue()

        def fetch() -> None:
            while True:
                name, sha256, size = wanted.get()
                with suppress(OSError):  # shows when the file is asked for
                    self.get(name, sha256, size)
                self._asked.discard(sha256)

        for _ in range(_FETCHERS):
            Thread(target=fetch, name="fetch", daemon=True).start()
        return wanted

    @cached_property
    def _asked(self) -> set[str]:
        return set()

    def open(self, name: str, sha256: str, size: int) -> int:
        """A file descriptor, for reading; the file is fetched first if it is not here. Raises OSError."""
        while True:
            path = self.get(name, sha256, size)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # another process needed the room just now
                continue

    def path(self, sha256: str) -> Path:
        """Where the file is, once it is fetched."""
        return Path(self.directory, sha256)

    def drop(self, name: str, sha256: str) -> None:
        """Remove a file that is not what was fetched: the next get fetches it again."""
        log.warning(
            "%s, fetched from %s, was changed or damaged: fetching it again",
            self.path(sha256),
            name,
        )
        self.path(sha256).unlink(missing_ok=True)

    def get(self, name: str, sha256: str, size: int | None = None) -> Path:
        """The local file. One that is not of `size` bytes, if that is known, is fetched again."""
        path = self.path(sha256)
        if not self._touch(path, size):
            with self._alone(f"{sha256}.lock"):
                if not self._touch(path, size):  # another process has fetched it meanwhile
                    self._fetch(name, sha256, path)
                    self._make_room(path)
        return path

    def will_need(self, name: str, sha256: str, size: int) -> None:
        """Begin to fetch it, without waiting; an error shows when the file is asked for."""
        if sha256 not in self._asked and not Path(self.directory, sha256).exists():
            self._asked.add(sha256)
            self._wanted.put((name, sha256, size))

    def _fetch(self, name: str, sha256: str, path: Path) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                self._copy(name, sha256, path)
                return
            except OSError as error:
                if attempt == _ATTEMPTS - 1:
                    raise
                log.warning(
                    "%s could not be fetched (%s): trying again", self.storage.path(name), error
                )
                time.sleep(_PAUSE_S * 2**attempt)

    def _copy(self, name: str, sha256: str, path: Path) -> None:
        digest = hashlib.sha256()
        draft = path.with_name(f".{sha256}.tmp")  # only the holder of the lock writes it
        with atomic_file(path, draft) as out:
            for chunk in self.storage.chunks(name):
                digest.update(chunk)
                out.write(chunk)
            if digest.hexdigest() != sha256:
                raise OSError("its SHA-256 is not the one in the index")

    def _touch(self, path: Path, size: int | None) -> bool:
        """Note that the file was used, if it is there. The time of the last change says so: access times may be off."""
        try:
            found = path.stat()
            if size is not None and found.st_size != size:
                log.warning(
                    "%s has %s bytes instead of %s: fetching it again", path, found.st_size, size
                )
                return False
            if time.time() - found.st_mtime > 1:
                os.utime(path)
            return True
        except FileNotFoundError:
            return False

    def _make_room(self, newest: Path) -> None:
        if self.limit is None:
            return
        with self._alone("room.lock"):
            found = []
            for entry in os.scandir(self.directory):
                if len(entry.name) == len(newest.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(item for item in found if item[2] != newest):
                if total <= self.limit:
                    return
                path.unlink(missing_ok=True)
                total -= size

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process of the node, and one thread of it, at a time."""
        os.makedirs(self.directory, exist_ok=True)
        with open(Path(self.directory, name), "w") as file:
            lock_file(file, wait=True)
            yield

    def __getstate__(self) -> dict[str, object]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_wanted", "_asked")
        }
