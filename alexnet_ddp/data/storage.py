"""A directory that may be far away: a path of this machine, or any URL that fsspec knows (s3://, gs://, hdfs://, ...).

The one rule: a name is there whole or not at all. Here that is a temporary file and a rename; object stores have it by
nature. Errors are OSErrors with an errno where the machine is at fault: nothing here calls that a bad image.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import fsspec
import fsspec.core

_CHUNK = 1 << 22  # bytes read at once


def absolute(url: str) -> str:
    """The same place, whatever the working directory of the process that looks."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


@dataclass(frozen=True)
class Storage:
    """Files below `root`, by names relative to it. Pickles; each process opens its own connection."""

    root: str

    @cached_property
    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, path = fsspec.core.url_to_fs(self.root)
        return fs, path.rstrip("/")

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    def path(self, name: str) -> str:
        """For messages, and for local files."""
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        fs, top = self._place
        return fs.exists(f"{top}/{name}".rstrip("/"))

    def size(self, name: str) -> int | None:
        """In bytes; None if there is no such file."""
        fs, top = self._place
        try:
            return fs.info(f"{top}/{name}")["size"]
        except FileNotFoundError:
            return None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """The whole file, or up to `size` bytes from `offset`."""
        if self.is_local:
            with open(self.path(name), "rb", buffering=0) as file:
                file.seek(offset)
                return _read(file, os.fstat(file.fileno()).st_size - offset if size is None else size)
        fs, top = self._place
        return fs.cat_file(f"{top}/{name}", offset or None, None if size is None else offset + size)

    def names(self, folder: str = "") -> list[str]:
        """The files directly in `folder`, sorted, relative to it; none if it is not there."""
        return self._list(folder, "file")

    def folders(self, folder: str = "") -> list[str]:
        """The folders directly in `folder`, as `names`."""
        return self._list(folder, "directory")

    def _list(self, folder: str, kind: str) -> list[str]:
        fs, top = self._place
        try:
            found = fs.ls(f"{top}/{folder}".rstrip("/"), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in found if entry["type"] == kind)

    def tree(self, folder: str) -> list[str]:
        """All files below `folder`, sorted, relative to it."""
        fs, top = self._place
        start = f"{top}/{folder}"
        return sorted(path[len(start) + 1 :] for path in fs.find(start))

    @contextmanager
    def create(self, name: str, scratch: str = "") -> Iterator[BinaryIO]:
        """A new file, there under `name` when the block ends without an error. scratch: a folder for drafts."""
        fs, top = self._place
        if not self.is_local:
            with fs.open(f"{top}/{name}", "wb") as file:
                try:
                    yield file
                except BaseException:
                    if hasattr(file, "discard"):
                        file.discard()
                    raise
            return
        target = self.path(name)
        folder = self.path(scratch) if scratch else os.path.dirname(target)
        draft = f"{folder}/.{os.path.basename(name)}.{uuid.uuid4().hex[:12]}.tmp"
        os.makedirs(folder, exist_ok=True)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            with open(draft, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        finally:
            if os.path.exists(draft):
                os.unlink(draft)

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as file:
            file.write(data)

    def remove(self, name: str) -> None:
        """A file or a folder with what is in it; nothing if it is not there."""
        fs, top = self._place
        if fs.exists(f"{top}/{name}"):
            fs.rm(f"{top}/{name}", recursive=True)

    def sha256(self, name: str) -> str:
        """Of the file as it can be read now."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self, name: str) -> Iterator[bytes]:
        """The file, a few MB at a time."""
        fs, top = self._place
        with fs.open(f"{top}/{name}", "rb", block_size=_CHUNK) as file:
            while chunk := file.read(_CHUNK):
                yield chunk


def _read(file: Any, size: int) -> bytes:
    """`size` bytes, or what there is before the end of the file."""
    parts, left = [], size
    while left > 0 and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
