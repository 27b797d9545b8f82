"""Runs a list of items as Spark tasks, with results and errors as if they were computed locally.

Spark transports tasks and small summaries, never images. It may retry a task on any executor, or
run it twice at the same time. An accumulator delivers each result at once and exactly once.
"""

import contextlib
import re
import socket
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from alexnet_ddp.config import ConfigError
from alexnet_ddp.data.storage import SCRATCH, Storage
from alexnet_ddp.prepare.encode import fingerprint
from alexnet_ddp.runtime.errors import DataError, MachineError, RunError

_TASKS_PER_JOB = 1024  # the driver's JVM keeps them in memory, about 150 kB each
_POLL_S = 0.1


def run_spark(
    context: Any, source: str, root: str, fn: Callable[[Any], Any], items: list[Any]
) -> Generator[Any, None, None]:
    """Yield fn(item) for each item, in the order in which they finish.

    Closing the iterator cancels the remaining tasks. Raises the first error.
    """
    storage, mark = Storage(root), f"{SCRATCH}/seen-{uuid.uuid4().hex}"
    storage.write(mark, b"")
    do = partial(_do, _Place(source, root, mark, fingerprint()), fn)
    try:
        for start in range(0, len(items), _TASKS_PER_JOB):
            yield from _run_job(context, do, items[start : start + _TASKS_PER_JOB])
    finally:
        storage.remove(mark)
        with contextlib.suppress(OSError):  # a cancelled task may write there at this moment
            if not storage.names(SCRATCH):
                storage.remove(SCRATCH)


def _run_job(context: Any, do: Callable, items: list[Any]) -> Iterator[Any]:
    outcomes = context.accumulator([], _Appended())
    group, errors = f"alexnet_ddp-{uuid.uuid4().hex}", []

    def work() -> None:
        try:
            context.setJobGroup(group, "alexnet_ddp.prepare", interruptOnCancel=True)
            context.parallelize(items, len(items)).foreach(partial(do, outcomes))
        except Exception as error:  # raised below, by the thread that reads the results
            errors.append(error)

    thread, seen = threading.Thread(target=work, daemon=True), 0
    thread.start()
    try:
        while True:
            ended = not thread.is_alive()  # read first: if it has ended, all results are in
            for outcome in outcomes.value[seen:]:
                if isinstance(outcome, RunError):
                    raise outcome
                seen += 1
                yield outcome
            if ended:
                break
            thread.join(_POLL_S)
        if errors:
            raise _explained(errors[0]) from None
        assert seen == len(items), f"Spark gave {seen} results of {len(items)}"
    finally:
        if thread.is_alive():
            with contextlib.suppress(Exception):  # the JVM may have ended already
                context.cancelJobGroup(group)
            thread.join(10)


class _Appended:
    """pyspark's AccumulatorParam for a list."""

    def zero(self, value: list[Any]) -> list[Any]:
        return []

    def addInPlace(self, value: list[Any], more: list[Any]) -> list[Any]:
        value.extend(more)
        return value


@dataclass(frozen=True)
class _Place:
    """What must be the same on an executor as on the driver."""

    source: str
    root: str
    mark: str  # a file that the driver has just written below root
    encoder: str


def _do(place: _Place, fn: Callable[[Any], Any], outcomes: Any, item: Any) -> None:
    """Run one item on an executor. A RunError is a result; Spark retries after any other error."""
    try:
        _check(place)
        outcome = fn(item)
    except RunError as error:
        outcome = error
    outcomes.add([outcome])


@cache
def _check(place: _Place) -> None:
    """Check this worker process, once. Raises DataError."""
    host, remedy = socket.gethostname(), "give a path that all machines share, or a URL"
    if fingerprint() != place.encoder:
        raise DataError(
            f"an executor on {host} has {fingerprint()}, the driver has {place.encoder}: "
            "they write different bytes; install the same Pillow everywhere"
        )
    if not Storage(place.source).exists():
        raise DataError(
            f"an executor on {host} cannot read source ({place.source}), the driver can; {remedy}"
        )
    if Storage(place.root).size(place.mark) is None:
        raise DataError(
            f"an executor on {host} cannot read root ({place.root}), the driver can; {remedy}"
        )


def _explained(error: Exception) -> Exception:
    """Convert an error of Spark.

    A worker's OSError becomes an OSError, a failure of Spark one line, a bug keeps its trace.
    """
    if not hasattr(error, "java_exception"):
        is_lost = isinstance(error, OSError) or type(error).__module__.startswith("py4j")
        return (
            MachineError(f"Spark's JVM was lost ({error}); rerun the same command to resume")
            if is_lost
            else error
        )
    text = str(error.java_exception)
    trace = re.search(r"Traceback \(most recent call last\):\n(?:(?! *\tat ).*\n)*", text)
    if trace is None:
        reason = reason_of(text)
        return MachineError(f"Spark failed: {reason}; rerun the same command to resume")
    last = re.findall(r"^[\w.]+: .*$|^\w+(?:Error|Exception)$", trace[0], re.MULTILINE)[-1]
    if found := re.match(r"\w*Error: \[Errno (\d+)\] (.*)", last):
        return OSError(int(found[1]), found[2])
    if last.startswith("ModuleNotFoundError"):
        return ConfigError(
            f"the executors' Python lacks a module ({last.split(': ')[1]}); "
            "install alexnet-ddp on them, or name a Python that has it: PYSPARK_PYTHON"
        )
    return RuntimeError(f"a Spark task failed each time, the last time with\n{trace[0]}")


def reason_of(text: str) -> str:
    """Return the relevant line of a Java exception or of a JVM's output."""
    if "stopped SparkContext" in text:
        return "does the master run, and accept this driver (spark.authenticate)?"
    lines = [
        line for line in text.splitlines() if re.search(r"Exception|Error", line)
    ] or text.splitlines()
    noise = r".*most recent failure: |.*\bin thread \S+ |[a-z]+\.\S+(Exception|Error): "
    return re.sub(noise, "", lines[0]).rstrip(". ")
