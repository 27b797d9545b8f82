"""The engine of one machine: a pool of processes, or this process alone."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from alexnet_ddp.prepare.watch import Engine
from alexnet_ddp.runtime.environment import num_usable_cores
from alexnet_ddp.runtime.errors import MachineError
from alexnet_ddp.runtime.startup import STOP_SIGNALS

_LOOK_EVERY_S = 1.0  # that a worker looks whether its parent lives


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
