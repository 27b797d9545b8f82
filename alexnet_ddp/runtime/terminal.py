"""Tables and progress bars that show text literally.

rich would interpret a class named "cat [male]" or ":smile:" as markup. Other modules therefore use
these classes instead of rich's own; tests/test_architecture.py checks that.
"""

import sys
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.style import StyleType
from rich.table import Table as RichTable
from rich.text import Text

from alexnet_ddp.runtime.printing import discard, escape_unencodable, printable

__all__ = [
    "BarColumn",
    "Console",
    "MofNCompleteColumn",
    "Table",
    "TimeRemainingColumn",
    "column",
    "progress_bar",
]

_NO_LIMIT = 1_000_000  # characters; a table in a file or a pipe is not wrapped


class Console(RichConsole):
    """Prints text literally. Without a terminal, nothing is wrapped or cut.

    Args:
        stderr: print to stderr instead of stdout.
        width: characters per line without a terminal.
    """

    def __init__(self, stderr: bool = False, width: int = _NO_LIMIT) -> None:
        stream = sys.stderr if stderr else sys.stdout
        escape_unencodable(stream)
        limit = None if stream.isatty() else width
        super().__init__(stderr=stderr, width=limit, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Discard output after the reader has ended. rich would exit with 1."""
        discard(self.file)


class Table(RichTable):
    """A table of plain text. Cells that are too wide for the terminal are wrapped, not cut."""

    def __init__(self, *headings: str, title: str | None = None, is_compact: bool = False) -> None:
        shown = (
            None if title is None else Text(printable(title), style="table.title", justify="center")
        )
        style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
        super().__init__(title=shown, **(style if is_compact else {}))
        for heading in headings:
            self.add_column(heading)

    def add_column(
        self, header: RenderableType = "", footer: RenderableType = "", **options: Any
    ) -> None:
        heading, end = _literal(header, keep="\n"), _literal(footer, keep="\n")
        super().add_column(heading, end, **{"overflow": "fold"} | options)

    def add_row(
        self,
        *cells: RenderableType | None,
        style: StyleType | None = None,
        end_section: bool = False,
    ) -> None:
        shown = (None if cell is None else _literal(cell) for cell in cells)
        super().add_row(*shown, style=style, end_section=end_section)


def _literal(content: RenderableType, keep: str = "") -> RenderableType:
    return Text(printable(content, keep)) if isinstance(content, str) else content


def column(template: str) -> TextColumn:
    """Return a text column of a progress bar for a template such as "{task.description}"."""
    return TextColumn(template, markup=False)


def progress_bar(*columns: ProgressColumn, **options: Any) -> Progress:
    """Return a progress bar on stderr that disappears when it is complete."""
    columns = columns or (
        column("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, **options)
