"""The engine of one machine: a pool of processes, or this process alone."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
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

_LOOK_EVERY_S = 1.0  # that a worker looks whether its parent lives


Engine = Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]
"""(function, items) -> the results, in the order in which they are ready."""

log = logging.getLogger(__name__)


def local_engine(workers: int | None) -> Engine:
    """run_local with so many processes; None: one for each core that this process may use."""
    return partial(run_local, workers or num_usable_cores())


def run_local(workers: int, fn: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """fn(item) for each item, as they are done. Closing the iterator ends the workers; the first error is raised."""
    if workers == 1 or len(items) < 2:
        yield from map(fn, items)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork would copy this process's threads in an unknown state
    pool, before = None, signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        try:  # processes inherit that stop signals are blocked: these are for the driver alone
            pool = ProcessPoolExecutor(min(workers, len(items)), context, _start, (os.getpid(),))
            signal.pthread_sigmask(
                signal.SIG_BLOCK, STOP_SIGNALS
            )  # Python's resource tracker unblocks some
            futures = [pool.submit(fn, item) for item in items]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        remedy = "it may have run out of memory: use fewer engine.workers; the same command goes on"
        raise MachineError(f"a worker process was lost; {remedy}") from error
    finally:
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()  # a shard is there whole or not at all
            pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    """A worker ends when the driver is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_LINE_EVERY_S = 60.0  # where stderr is no terminal


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
