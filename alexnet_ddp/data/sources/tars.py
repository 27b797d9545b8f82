"""Tar archives: finds the byte ranges of their files, and writes archives deterministically."""

import errno
import hashlib
import os
import re
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from alexnet_ddp.config.data import MAX_BYTES
from alexnet_ddp.runtime.errors import DataError

_BLOCK = 512  # bytes, the unit of a tar archive
_RECORD_SIZE = 20 * _BLOCK  # bytes; archives are padded to a multiple of it
_MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records; a larger one is damage
_SUMMED = struct.Struct("148B8x356B")  # a tar header without its checksum
_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")  # the beginning of a pax record


class Member(NamedTuple):
    """A regular file in a tar archive."""

    name: str
    offset: int  # of its bytes, from the start of the outermost archive
    size: int  # in bytes


def tar_members(
    fd: int, path: Path, start: int, stop: int, may_be_cut: bool = False
) -> Iterator[Member]:
    """The regular files of the tar archive in bytes [start, stop) of the open file `fd`, in order.

    Reads ustar, GNU (long names, large sizes) and pax headers and verifies their checksums, but
    does not read the files themselves: about 10 us each. With `may_be_cut`, a last file that is cut
    short is returned with the bytes that exist.
    Raises DataError with `path` and the offset if the archive is cut short, damaged or sparse, or
    contains links, devices or paths that lead out of it.
    """
    position, extra = start, dict[str, str]()
    while header := _header(fd, path, position, stop):
        kind, offset = header[156:157], position + _BLOCK
        size = int(extra["size"]) if extra.get("size", "").isdecimal() else _number(header[124:136])
        if size < 0:
            raise _damaged(path, position, "holds no valid tar header")
        if offset + size > stop:
            if may_be_cut and kind in b"0\x007":
                yield Member(extra.get("path") or header_name(header), offset, stop - offset)
                return
            raise _damaged(path, position, "is cut short in the file that begins")
        if kind in b"Lx" and size <= _MAX_EXTENSION:
            body = os.pread(fd, size, offset)
            extra |= {"path": _text(body)} if kind == b"L" else _pax_records(body)
        elif kind in b"LxS" or any(key.startswith("GNU.sparse") for key in extra):
            raise _damaged(path, position, "holds a sparse file or an overlong header")
        elif kind not in b"gK":
            name = extra.get("path") or header_name(header)
            if kind in b"12346" or name.startswith("/") or ".." in name.split("/"):
                raise _damaged(
                    path, position, f"holds a link, a device or a path out of it ({name[:80]!r})"
                )
            if kind in b"0\x007":
                yield Member(name, offset, size)
            extra = {}
        position = offset + -(-size // _BLOCK) * _BLOCK


def header_name(header: bytes) -> str:
    """The name in a 512-byte tar header."""
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _header(fd: int, path: Path, position: int, stop: int) -> bytes | None:
    """The header at `position`; None for the block of zeros that ends the archive."""
    header = os.pread(fd, _BLOCK, position) if position + _BLOCK <= stop else b""
    if len(header) < _BLOCK:
        raise _damaged(path, position, "is cut short")
    if header == bytes(_BLOCK):
        return None
    if sum(_SUMMED.unpack_from(header)) + 8 * ord(" ") != _number(header[148:156]):
        raise _damaged(path, position, "holds no valid tar header")
    return header


def _number(digits: bytes) -> int:
    """The value of octal digits, or of GNU's big-endian binary form; -1 if it is neither."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(body: bytes) -> dict[str, str]:
    """Parse records 'LENGTH KEY=VALUE\\n'; LENGTH counts the bytes of the whole record."""
    records = {}
    while found := _RECORD.match(body):
        key, rest = _text(found[2]), int(found[1])
        records[key], body = _text(body[found.end() : rest].rstrip(b"\n")), body[rest:]
        if rest <= found.end():
            break
    return records


def _damaged(path: Path, offset: int, what: str) -> DataError:
    return DataError(
        f"{path} {what} at byte {offset:,}; "
        "compare its size and MD5 with the source's, and copy it again"
    )


def pread(descriptor: int, size: int, offset: int) -> bytes:
    """Read exactly `size` bytes, in several calls if needed, as on network file systems.

    Raises OSError if the file ends earlier, or if `size` exceeds the limit for an image.
    """
    if size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{size:,} bytes, an image has at most {MAX_BYTES:,}")
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise OSError(f"the file ends at byte {offset + len(data):,}, inside the image")
        data += more
    return data


def will_need(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to read ahead, if the platform supports it: this hides the storage latency."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True, eq=False)
class ArchiveStore:
    """Images that are members of one tar archive, or of tar archives inside it, read in place.

    The file is opened when the first image is read and stays open. Threads and forked processes may
    read at the same time, because pread uses no shared position. Pickles without the open file.
    """

    path: str
    offsets: np.ndarray  # int64 [N]: the offset of each image's first byte
    sizes: np.ndarray  # int64 [N], in bytes

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.sizes.nbytes

    def take(self, positions: np.ndarray) -> "ArchiveStore":
        return ArchiveStore(self.path, self.offsets[positions], self.sizes[positions])

    def read(self, i: int) -> bytes:
        return self._pread(int(self.offsets[i]), int(self.sizes[i]))

    def dimensions(self, indices: np.ndarray) -> None:
        return None

    def will_need(self, indices: np.ndarray) -> None:
        """Ask the kernel to read these images ahead. Raises OSError."""
        descriptor = self._descriptor()
        for offset, size in zip(self.offsets[indices].tolist(), self.sizes[indices].tolist()):
            will_need(descriptor, offset, size)

    def name(self, i: int) -> str:
        """archive:member, from the tar header before the image; archive:offset if it is gone."""
        try:
            return f"{self.path}:{header_name(self._pread(int(self.offsets[i]) - 512, 512))}"
        except OSError:
            return f"{self.path}:{self.offsets[i]}"

    def _pread(self, offset: int, size: int) -> bytes:
        return pread(self._descriptor(), size, offset)

    def _descriptor(self) -> int:
        fd = self.__dict__.get("_fd")
        if fd is None:
            mine = os.open(self.path, os.O_RDONLY)
            fd = self.__dict__.setdefault("_fd", mine)  # one thread wins
            if fd == mine:
                weakref.finalize(self, os.close, fd)
            else:
                os.close(mine)
        return fd

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_fd"}


class TarWriter:
    """Appends files to `stream` as USTAR with mode 0444, owner 0 and time 0.

    The archive depends on the names and contents only. Computes its SHA-256 along the way.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest = stream, hashlib.sha256()
        self.size = 0  # bytes written so far

    def add(self, name: str, data: bytes) -> int:
        """Append a file; returns the offset of its first byte. name: ASCII, <= 100 characters."""
        self._write(_new_header(name, len(data)))
        offset = self.size
        self._write(data + bytes(-len(data) % _BLOCK))
        return offset

    def close(self) -> str:
        """Write the end of the archive; returns the SHA-256 (hex) of the whole archive."""
        end = self.size + 2 * _BLOCK
        self._write(bytes(2 * _BLOCK + -end % _RECORD_SIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)


def _new_header(name: str, size: int) -> bytes:
    fields = (
        name.encode("ascii").ljust(100, b"\0"),
        b"0000444\0" + b"0000000\0" * 2,  # mode, uid, gid
        b"%011o\0" % size,
        b"00000000000\0",  # mtime
        b" " * 8,  # the checksum is computed as if it were blanks
        b"0".ljust(101, b"\0"),  # a regular file, no link
        b"ustar\0" + b"00",
    )
    header = b"".join(fields).ljust(_BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
