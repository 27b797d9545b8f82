"""The work of an engine as it comes: a progress bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from alexnet_ddp.runtime.printing import printable
from alexnet_ddp.runtime.terminal import (
    BarColumn,
    MofNCompleteColumn,
    TimeRemainingColumn,
    column,
    progress_bar,
)

Engine = Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]

_LINE_EVERY_S = 60.0  # where stderr is no terminal

log = logging.getLogger(__name__)


def watched(
    engine: Engine, fn: Callable[[Any], dict], tasks: list[Any], what: str
) -> Iterator[dict]:
    """fn(task) for each task, a dict with "images", as the engine gives them. A task says how many `images` it has."""
    total, done, began = sum(task.images for task in tasks), 0, time.monotonic()
    rate = column("{task.fields[rate]}")
    columns = (
        column("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        TimeRemainingColumn(),
    )
    said, is_terminal = began, sys.stderr.isatty()
    with progress_bar(*columns, disable=not is_terminal) as bar:
        task = bar.add_task(printable(what), total=total, rate="")
        with closing(engine(fn, tasks)) as results:
            for result in results:
                done += result["images"] + result.get("quarantined", 0)
                now = time.monotonic()
                speed = done / max(1e-9, now - began)
                bar.update(task, completed=done, rate=f"{speed:,.0f} images/s")
                if not is_terminal and now - said > _LINE_EVERY_S:
                    minutes = (total - done) / max(1e-9, speed) / 60
                    log.info(
                        "%s: %s of %s images, %.0f/s, %.0f min left",
                        what,
                        f"{done:,}",
                        f"{total:,}",
                        speed,
                        minutes,
                    )
                    said = now
                yield result
