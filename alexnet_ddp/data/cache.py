"""A cache on the disk of this node for remote shards.

Whole files are fetched by one process of the node and verified. Each file is named by its SHA-256,
so several data sets can share the folder.
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

_ATTEMPTS = 3  # to fetch a file
_PAUSE_S = 1.0  # before the second attempt; doubles with each attempt
_FETCHERS = 2  # background threads per process that fetch files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeCache:
    """Files of `storage` in the folder `directory`, shared by all ranks of a node. Pickles.

    If the files exceed `limit` (bytes), the least recently used ones are deleted. Processes that
    have a deleted file open can still read it.
    """

    storage: Storage
    directory: str
    limit: int | None

    @cached_property
    def _wanted(self) -> SimpleQueue[tuple[str, str, int]]:
        """Queue of files to fetch in the background.

        The threads are daemons, so the end of a run does not wait for them.
        """
        wanted: SimpleQueue[tuple[str, str, int]] = SimpleQueue()

        def fetch() -> None:
            while True:
                name, sha256, size = wanted.get()
                with suppress(OSError):  # get() will try again and raise it to its caller
                    self.get(name, sha256, size)
                self._asked.discard(sha256)

        for _ in range(_FETCHERS):
            Thread(target=fetch, name="fetch", daemon=True).start()
        return wanted

    @cached_property
    def _asked(self) -> set[str]:
        return set()

    def open(self, name: str, sha256: str, size: int) -> int:
        """A file descriptor for reading; fetches the file first if needed. Raises OSError."""
        while True:
            path = self.get(name, sha256, size)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # another process has just deleted it to free space
                continue

    def path(self, sha256: str) -> Path:
        """The path of the file once it has been fetched."""
        return Path(self.directory, sha256)

    def drop(self, name: str, sha256: str) -> None:
        """Remove a file that has changed since it was fetched; the next get() fetches it again."""
        log.warning(
            "%s, fetched from %s, was changed or damaged: fetching it again",
            self.path(sha256),
            name,
        )
        self.path(sha256).unlink(missing_ok=True)

    def get(self, name: str, sha256: str, size: int | None = None) -> Path:
        """The path of the local file, fetched if it is missing or not of `size` bytes.

        Raises OSError if it cannot be fetched.
        """
        path = self.path(sha256)
        if not self._touch(path, size):
            with self._locked(f"{sha256}.lock"):
                if not self._touch(path, size):  # another process may have fetched it meanwhile
                    self._fetch(name, sha256, path)
                    self._free_space(path)
        return path

    def will_need(self, name: str, sha256: str, size: int) -> None:
        """Start to fetch the file in the background. An error is raised by open() or get()."""
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
        """Record the use of the file in its mtime, because access times may be disabled.

        Returns False if the file is missing or not of `size` bytes.
        """
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

    def _free_space(self, newest: Path) -> None:
        """Delete the least recently used files, except `newest`, until `limit` is kept."""
        if self.limit is None:
            return
        with self._locked("room.lock"):
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
    def _locked(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock against all other processes and threads of the node."""
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
