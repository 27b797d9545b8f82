"""A local or remote directory: a path, or any URL that fsspec supports (s3://, gs://, hdfs://).

A file is complete or absent: it is written to a temporary file, then renamed or uploaded.
OSErrors carry the file name; one with an errno is an I/O failure, never a corrupt image.
"""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, BinaryIO

from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import atomic_file

SCRATCH = "_tmp"  # the folder for temporary files, below root
_CHUNK = 1 << 22  # bytes read at once


class NotAFile(OSError):
    """The path is a pipe, a device, a folder, a link without a target, or too large a file.

    This describes the data; it is no failure of the machine.
    """

    def __str__(self) -> str:
        return str(self.strerror)


def read_regular(
    path: str, offset: int = 0, size: int | None = None, largest: int | None = None
) -> bytes:
    """Read up to `size` bytes of a regular file from `offset`, by default all of them.

    Never blocks on a pipe.
    Raises NotAFile for anything but a regular file, for a link without a target and for a file of
    more than `largest` bytes; OSError for I/O failures.
    """
    with _naming(path), _open_at_once(path) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise NotAFile(errno.EINVAL, "it is no regular file")
        if largest is not None and found.st_size > largest:
            raise NotAFile(
                errno.EFBIG, f"{found.st_size:,} bytes, an image has at most {largest:,}"
            )
        file.seek(offset)
        return _read(file, found.st_size - offset if size is None else size)


def absolute(url: str) -> str:
    """`url` independent of the working directory. file:// URLs become paths."""
    if url.startswith(("file://", "local://")):
        url = url.split("://", 1)[1]
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


@dataclass(frozen=True)
class Storage:
    """Files below `root`; names are relative to it.

    Can be pickled; each process opens its own connection.
    """

    root: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    @cached_property
    def _far(self) -> tuple[Any, str]:
        """(fsspec file system, path of root in it), if root is a URL. Raises ConfigError."""
        from fsspec.core import url_to_fs  # slow to import, and only needed for URLs

        if "::" in self.root:
            rule = "chains file systems of fsspec, some of which run what a file contains"
            raise ConfigError(f"{self.root} {rule}; give a plain URL")
        try:
            fs, path = url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{self.root} cannot be reached; fix the address, or install the driver that "
                f"fsspec needs for it ({error})"
            ) from error
        return fs, path.rstrip("/")

    def path(self, name: str) -> str:
        """The path or URL of `name`."""
        return f"{self.root.rstrip('/')}/{name}".rstrip("/")

    def exists(self, name: str = "") -> bool:
        if self.is_local:
            return os.path.exists(self.path(name))
        fs, top = self._far
        return fs.exists(f"{top}/{name}".rstrip("/"))

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        try:
            if self.is_local:
                return os.stat(self.path(name)).st_size
            fs, top = self._far
            return fs.info(f"{top}/{name}")["size"]
        except FileNotFoundError:
            return None

    def read(
        self, name: str, offset: int = 0, size: int | None = None, largest: int | None = None
    ) -> bytes:
        """Read the whole file, or up to `size` bytes from `offset`; see read_regular."""
        if self.is_local:
            return read_regular(self.path(name), offset, size, largest)
        if size is None and largest is not None:
            return self._read_small(name, offset, largest)
        fs, top = self._far
        return fs.cat_file(f"{top}/{name}", offset or None, None if size is None else offset + size)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The file, a few MB at a time."""
        with _naming(self.path(name)), self._open(name) as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def names(self, folder: str = "") -> list[str]:
        """The names of the files directly in `folder`, sorted; empty if it does not exist."""
        return self._list(folder, "file")

    def folders(self, folder: str = "") -> list[str]:
        """The names of the folders directly in `folder`, sorted; empty if it does not exist."""
        return self._list(folder, "directory")

    def tree(self, folder: str) -> list[str]:
        """All files below `folder`, sorted, relative to it."""
        return list(self.tree_sizes(folder))

    def tree_sizes(self, folder: str) -> dict[str, int]:
        """As tree(), with the size of each file in bytes (0 if the store does not report it)."""
        if self.is_local:
            top = self.path(folder)
            paths = (
                f"{parent}/{name}"
                for parent, _, names in os.walk(top, followlinks=True)
                for name in names
            )
            found = {path: os.stat(path).st_size for path in paths}
        else:
            fs, root = self._far
            top = f"{root}/{folder}".rstrip("/")
            found = {
                path: info.get("size") or 0 for path, info in fs.find(top, detail=True).items()
            }
        return {path[len(top) + 1 :]: found[path] for path in sorted(found)}

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new binary file; it appears as `name` if the block ends without an error."""
        if not self.is_local:
            fs, top = self._far
            with tempfile.NamedTemporaryFile() as file:
                yield file
                file.flush()
                fs.makedirs(f"{top}/{name}".rsplit("/", 1)[0], exist_ok=True)
                fs.put_file(file.name, f"{top}/{name}")
            return
        target, folder = self.path(name), self.path(SCRATCH)
        draft = f"{folder}/{os.path.basename(name)}.{uuid.uuid4().hex[:12]}"
        os.makedirs(folder, exist_ok=True)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with _naming(target), atomic_file(Path(target), Path(draft)) as file:
            yield file

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as file:
            file.write(data)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""
        if self.is_local:
            path = self.path(name)
            shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
            return
        fs, top = self._far
        if fs.exists(f"{top}/{name}"):
            fs.rm(f"{top}/{name}", recursive=True)

    def sha256(self, name: str) -> str:
        """The SHA-256 (hex) of a file."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def _read_small(self, name: str, offset: int, largest: int) -> bytes:
        """A remote file from `offset`, without fetching much more than `largest` bytes."""
        try:
            data = self.read(name, offset, largest + 1)
        except Exception:
            # Stores return an error if a range of an empty file is requested.
            if self.size(name) == 0:
                return b""
            raise
        if len(data) > largest:
            raise NotAFile(errno.EFBIG, f"an image has at most {largest:,} bytes", self.path(name))
        return data

    def _open(self, name: str) -> Any:
        if self.is_local:
            return open(self.path(name), "rb", buffering=0)
        fs, top = self._far
        return fs.open(f"{top}/{name}", "rb", block_size=_CHUNK)

    def _list(self, folder: str, kind: str) -> list[str]:
        try:
            if self.is_local:
                with os.scandir(self.path(folder)) as entries:
                    return sorted(
                        e.name
                        for e in entries
                        if (e.is_dir() if kind == "directory" else e.is_file())
                    )
            fs, top = self._far
            fs.invalidate_cache()  # other machines may have written files meanwhile
            found = fs.ls(f"{top}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in found if entry["type"] == kind
        )


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Add the file name to OSErrors of a file that is already open."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


def _open_at_once(path: str) -> BinaryIO:
    """Open `path` for reading; does not block if it is a pipe without a writer."""
    no_target = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    try:
        return open(
            path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        )
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder; a socket
            raise NotAFile(error.errno, "it is no regular file", path) from error
        if error.errno in no_target and os.path.islink(path):
            raise NotAFile(error.errno, "it is a link without a target", path) from error
        raise


def _read(file: Any, size: int) -> bytes:
    """Read `size` bytes, or fewer at the end of the file."""
    parts, left = [], size
    while left > 0 and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
