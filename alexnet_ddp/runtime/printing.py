"""Plain lines for users. Names of files and classes are untrusted, so they are escaped."""

import codecs
import io
import os
import sys
from collections.abc import Sequence
from typing import IO, TextIO

_ERRORS = "alexnet_ddp.escape"  # the name of an error handler of codecs


def printable(text: object, keep: str = "") -> str:
    r"""Return `text` with control characters, invalid UTF-8 and the like escaped, such as \x1b.

    Args:
        text: converted with str().
        keep: characters that are not escaped, such as the newlines of a heading.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in shown
    )


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names, and the number of the others: `a, b, c and 9 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def say(line: object = "", stream: TextIO | None = None) -> None:
    """Print one escaped line, on stdout by default. A reader that has ended is no error."""
    stream = stream or sys.stdout
    escape_unencodable(stream)
    try:
        print(printable(line), file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)


def escape_unencodable(stream: TextIO) -> None:
    """Escape characters that the encoding of `stream` lacks, such as a Latin-1 locale's.

    The dash of an interval becomes "-".
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors != _ERRORS:
        stream.reconfigure(errors=_ERRORS)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what cannot be encoded: a handler for codecs.register_error."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = error.object[error.start : error.end].replace("\N{EN DASH}", "-")
    return shown.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(_ERRORS, _escape)


def discard(stream: IO[str]) -> None:
    """Redirect `stream` to /dev/null, including Python's last flush."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
