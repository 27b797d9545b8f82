"""Plain lines for people. Names of files and classes come from anywhere, so they are never printed as they are."""

import os
import sys
from typing import TextIO


def printable(text: object, keep: str = "") -> str:
    """`text` with escapes such as \\x1b in place of control characters, bytes that are not UTF-8 and the like.

    keep: characters that stay, such as the newlines of a heading.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in shown
    )


def say(line: object = "", stream: TextIO | None = None) -> None:
    """Print one line, on stdout by default. A reader who has gone does not end the command."""
    stream = stream or sys.stdout
    escape_unencodable(stream)
    try:
        print(printable(line), file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)


def escape_unencodable(stream: TextIO) -> None:
    """In a Latin-1 locale a name in another alphabet is escaped, instead of ending the command."""
    if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
        stream.reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """What is written to `stream` from now on goes nowhere, also Python's last flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
