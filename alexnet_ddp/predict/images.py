"""The paths of the images to classify."""

import glob
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from alexnet_ddp.data.sources.index import FileStore, list_images
from alexnet_ddp.runtime.errors import DataError

log = logging.getLogger(__name__)

STDIN = "-"


def find_images(pattern: str) -> FileStore:
    """Paths of images: those below a directory, one file, or the files that a glob matches.

    "-" reads one path per line from standard input. A directory is searched as for training. A
    file that is given, or matched by a glob, is used regardless of its suffix. Raises DataError.
    """
    if pattern == STDIN:
        found, notes = FileStore.pack("", _lines_of_stdin()), list[str]()
    elif os.path.isdir(pattern):
        found, notes = list_images(pattern)
    else:
        matched = [pattern] if os.path.lexists(pattern) else _matches(pattern)
        found = FileStore.pack("", (path for path in matched if os.path.isfile(path)))
        is_deep = "**" in pattern  # "**" matches the folders above the files, too
        others = [
            p for p in matched if not os.path.isfile(p) and not (is_deep and os.path.isdir(p))
        ]
        notes = (
            [f"ignored {len(others):,} entries (not regular files), such as {others[0]}"]
            if others
            else []
        )
    if len(found) == 0:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(
            f"images ({pattern}) matches no image{why}; "
            "use a file, a directory, or a glob in quotes"
        )
    for note in notes:
        log.warning(note)
    return found


def _lines_of_stdin() -> Iterator[str]:
    """The lines of standard input that are not empty, with any bytes that a path may have."""
    text = io.TextIOWrapper(sys.stdin.buffer, errors="surrogateescape", newline="\n")
    return (line for line in (line.removesuffix("\n") for line in text) if line)


def _matches(pattern: str) -> list[str]:
    """The sorted matches of a glob. Leading folders that exist are literal, with their brackets."""
    folder, rest = pattern, ""
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest) if rest else name
    found = sorted(glob.glob(os.path.join(glob.escape(folder), rest), recursive=True))
    for path in found if "**" in rest else ():
        parents = [os.path.realpath(parent) for parent in Path(os.path.abspath(path)).parents]
        if len(set(parents)) < len(parents):  # glob would follow such a link 40 times
            raise DataError(
                f"{path} is below a link to a folder that contains it; "
                "remove that link, or list the folders"
            )
    return found
