"""A directory that may be far away: a path of this machine, or any URL that fsspec knows (s3://, gs://, hdfs://, ...).

The one rule: a name is there whole or not at all. Here that is a draft and a rename; there a draft and an upload.
An OSError names the file, and has an errno where the machine is at fault: nothing here calls that a bad image.
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
from typing import Any, BinaryIO

from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import atomic_file

SCRATCH = "_tmp"  # the folder of drafts, below root
_CHUNK = 1 << 22  # bytes read at once


class NotAFile(OSError):
    """What should be read is a pipe, a device, a folder, a link without a target or too large: no disk has failed."""

    def __str__(self) -> str:
        return self.strerror


def read_regular(
    path: str, offset: int = 0, size: int | None = None, largest: int | None = None
) -> bytes:
    """Up to `size` bytes from `offset` of a regular file, by default all of it. Never waits for a pipe.

    Raises NotAFile for anything else, for a link without a target, and for a file of more than `largest` bytes.
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
    """The same place, whatever the working directory of the process that looks. file:// URLs become paths."""
    if url.startswith(("file://", "local://")):
        url = url.split("://", 1)[1]
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


@dataclass(frozen=True)
class Storage:
    """Files below `root`, by names relative to it. Pickles; each process opens its own connection."""

    root: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    @cached_property
    def _far(self) -> tuple[Any, str]:
        """(fsspec file system, path of root in it), where root is a URL."""
        from fsspec.core import url_to_fs  # slow to import, and few need it

        try:
            fs, path = url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            rule = "cannot be reached; mend the address, or install the driver that fsspec needs for it"
            raise ConfigError(f"{self.root} {rule} ({error})") from error
        return fs, path.rstrip("/")

    def path(self, name: str) -> str:
        """For messages, and for local files."""
        return f"{self.root.rstrip('/')}/{name}".rstrip("/")

    def exists(self, name: str = "") -> bool:
        if self.is_local:
            return os.path.exists(self.path(name))
        fs, top = self._far
        return fs.exists(f"{top}/{name}".rstrip("/"))

    def size(self, name: str) -> int | None:
        """In bytes; None if there is no such file."""
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
        """The whole file, or up to `size` bytes from `offset`. Raises NotAFile as read_regular does."""
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
        """The files directly in `folder`, sorted, relative to it; none if it is not there."""
        return self._list(folder, "file")

    def folders(self, folder: str = "") -> list[str]:
        """The folders directly in `folder`, as `names`."""
        return self._list(folder, "directory")

    def tree(self, folder: str) -> list[str]:
        """All files below `folder`, sorted, relative to it."""
        return list(self.tree_sizes(folder))

    def tree_sizes(self, folder: str) -> dict[str, int]:
        """All files below `folder`, sorted, relative to it, and their sizes in bytes (0 if a store does not tell)."""
        if self.is_local:
            top = self.path(folder)
            paths = (
                f"{where}/{name}"
                for where, _, names in os.walk(top, followlinks=True)
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
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A new file, there under `name` when the block ends without an error."""
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
        """A file or a folder with what is in it; nothing if it is not there."""
        if self.is_local:
            path = self.path(name)
            shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
            return
        fs, top = self._far
        if fs.exists(f"{top}/{name}"):
            fs.rm(f"{top}/{name}", recursive=True)

    def sha256(self, name: str) -> str:
        """Of the file as it can be read now."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def _read_small(self, name: str, offset: int, largest: int) -> bytes:
        """A remote file from `offset`, without fetching much more than `largest` bytes."""
        try:
            data = self.read(name, offset, largest + 1)
        except Exception:
            if (
                self.size(name) == 0
            ):  # stores answer with an error if a range of an empty file is asked for
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
            fs.invalidate_cache()  # workers elsewhere may have written meanwhile
            found = fs.ls(f"{top}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in found if entry["type"] == kind
        )


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """An error of a file that is open already does not say which one it is."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


def _open_at_once(path: str) -> BinaryIO:
    """Open `path`, without waiting for somebody to write to it."""
    try:
        return open(
            path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        )
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder; a socket
            raise NotAFile(error.errno, "it is no regular file", path) from error
        if error.errno in (
            errno.ENOENT,
            errno.ENOTDIR,
            errno.ELOOP,
            errno.ENAMETOOLONG,
        ) and os.path.islink(path):
            raise NotAFile(error.errno, "it is a link without a target", path) from error
        raise


def _read(file: Any, size: int) -> bytes:
    """`size` bytes, or what there is before the end of the file."""
    parts, left = [], size
    while left > 0 and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
