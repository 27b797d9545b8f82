"""Engines run a function over a list of items. This module has the engine of one machine.

It is a pool of processes, or this process alone. spark.py has the engine of a cluster.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from typing import Any

from alexnet_ddp.runtime.environment import num_usable_cores
from alexnet_ddp.runtime.errors import MachineError
from alexnet_ddp.runtime.printing import printable
from alexnet_ddp.runtime.startup import STOP_SIGNALS
from alexnet_ddp.runtime.terminal import (
    BarColumn,
    MofNCompleteColumn,
    TimeRemainingColumn,
    column,
    progress_bar,
)

_PARENT_CHECK_S = 1.0  # interval at which a worker checks that its parent is alive
_LOG_EVERY_S = 60.0  # interval of progress lines if stderr is not a terminal

Engine = Callable[[Callable[[Any], Any], list[Any]], Generator[Any, None, None]]
"""(function, items) -> the results, in the order in which they are ready."""

log = logging.getLogger(__name__)


def local_engine(workers: int | None) -> Engine:
    """An engine of `workers` processes; None: one for each core that this process may use."""
    return partial(run_local, workers or num_usable_cores())


def run_local(
    workers: int, fn: Callable[[Any], Any], items: list[Any]
) -> Generator[Any, None, None]:
    """Yield fn(item) for each item, in the order in which they finish.

    Closing the iterator kills the workers. Raises the first error of fn, or MachineError if a
    worker dies.
    """
    if workers == 1 or len(items) < 2:
        yield from map(fn, items)
        return
    # A fork would copy this process's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool, before = None, signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        try:  # the workers inherit the blocked stop signals: only this process handles them
            pool = ProcessPoolExecutor(min(workers, len(items)), context, _start, (os.getpid(),))
            # Python's resource tracker unblocks some of them.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            futures = [pool.submit(fn, item) for item in items]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "a worker process was lost; it may have run out of memory: use fewer engine.workers "
            "and rerun the same command to resume"
        ) from error
    finally:
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()  # safe: a shard is renamed into place when it is complete
            pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    """Initialise a worker: it exits when process `parent` has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def with_progress(
    engine: Engine, fn: Callable[[Any], dict], tasks: list[Any], what: str
) -> Generator[dict, None, None]:
    """Yield fn(task) for each task, with a progress bar, or a line each minute without a terminal.

    A task has an attribute `images`, its number of images. fn returns a dict with "images".
    """
    total, done, began = sum(task.images for task in tasks), 0, time.monotonic()
    rate = column("{task.fields[rate]}")
    columns = (
        column("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        TimeRemainingColumn(),
    )
    last_line, is_terminal = began, sys.stderr.isatty()
    with progress_bar(*columns, disable=not is_terminal) as bar:
        task = bar.add_task(printable(what), total=total, rate="")
        with closing(engine(fn, tasks)) as results:
            for result in results:
                done += result["images"] + result.get("quarantined", 0)
                now = time.monotonic()
                speed = done / max(1e-9, now - began)
                bar.update(task, completed=done, rate=f"{speed:,.0f} images/s")
                if not is_terminal and now - last_line > _LOG_EVERY_S:
                    minutes = (total - done) / max(1e-9, speed) / 60
                    log.info(
                        "%s: %s of %s images, %.0f/s, %.0f min left",
                        what,
                        f"{done:,}",
                        f"{total:,}",
                        speed,
                        minutes,
                    )
                    last_line = now
                yield result
