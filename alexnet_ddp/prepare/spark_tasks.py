"""A list of items as Spark tasks, and their outcomes and errors as if they had been computed here.

The one rule: Spark carries tasks and small summaries, never images; it may try a task again, or twice at once, and
another executor may do it. An outcome comes to the driver through an accumulator: at once, and exactly once.
"""

import contextlib
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from alexnet_ddp.config import ConfigError
from alexnet_ddp.data.storage import SCRATCH, Storage
from alexnet_ddp.prepare.encode import fingerprint
from alexnet_ddp.runtime.errors import DataError, MachineError, RunError

_AT_ONCE = 1024  # tasks of a job: the JVM of the driver holds them, about 150 kB each
_LOOK_EVERY_S = 0.1


def run_spark(
    context: Any, source: str, root: str, fn: Callable[[Any], Any], items: list[Any]
) -> Iterator[Any]:
    """fn(item) for each item, as they are done. Closing the iterator cancels the rest; the first error is raised."""
    storage, mark = Storage(root), f"{SCRATCH}/seen-{uuid.uuid4().hex}"
    storage.write(mark, b"")
    do = partial(_do, _Place(source, root, mark, fingerprint()), fn)
    try:
        for at in range(0, len(items), _AT_ONCE):
            yield from _run_job(context, do, items[at : at + _AT_ONCE])
    finally:
        storage.remove(mark)
        if not storage.names(SCRATCH):
            storage.remove(SCRATCH)


def _run_job(context: Any, do: Callable, items: list[Any]) -> Iterator[Any]:
    outcomes = context.accumulator([], _Appended())
    group, errors = f"alexnet_ddp-{uuid.uuid4().hex}", []

    def work() -> None:
        try:
            context.setJobGroup(group, "alexnet_ddp.prepare", interruptOnCancel=True)
            context.parallelize(items, len(items)).foreach(partial(do, outcomes))
        except Exception as error:  # for the other thread
            errors.append(error)

    thread, seen = threading.Thread(target=work, daemon=True), 0
    thread.start()
    try:
        while True:
            ended = not thread.is_alive()  # looked at first: what it left behind is complete then
            for outcome in outcomes.value[seen:]:
                if isinstance(outcome, RunError):
                    raise outcome
                seen += 1
                yield outcome
            if ended:
                break
            thread.join(_LOOK_EVERY_S)
        if errors:
            raise _explained(errors[0]) from None
        assert seen == len(items), f"Spark gave {seen} results of {len(items)}"
    finally:
        if thread.is_alive():
            with contextlib.suppress(Exception):  # the JVM may be gone already
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
    """What an executor must have as the driver has it."""

    source: str
    root: str
    mark: str  # a file that the driver has just written below root
    encoder: str


def _do(place: _Place, fn: Callable[[Any], Any], outcomes: Any, item: Any) -> None:
    """Runs on the executors. What trying again cannot mend is an outcome; the rest is raised, and Spark tries again."""
    try:
        _check(place)
        outcome = fn(item)
    except RunError as error:
        outcome = error
    outcomes.add([outcome])


@cache
def _check(place: _Place) -> None:
    """Once in each worker process, also in those that join later. Raises DataError."""
    host, remedy = socket.gethostname(), "give a path that all machines share, or a URL"
    if fingerprint() != place.encoder:
        raise DataError(
            f"an executor on {host} has {fingerprint()}, the driver has {place.encoder}: they write different bytes; "
            "install the same Pillow everywhere"
        )
    if not Storage(place.source).exists():
        raise DataError(
            f"an executor on {host} does not see source ({place.source}), the driver does; {remedy}"
        )
    if Storage(place.root).size(place.mark) is None:
        raise DataError(
            f"an executor on {host} does not see root ({place.root}) as the driver does; {remedy}"
        )


def _explained(error: Exception) -> Exception:
    """A worker's OSError as an OSError; Spark's own trouble in one line; a bug with its trace."""
    if not hasattr(error, "java_exception"):
        is_lost = isinstance(error, OSError) or type(error).__module__.startswith("py4j")
        return (
            MachineError(f"Spark's JVM was lost ({error}); the same command goes on")
            if is_lost
            else error
        )
    text = str(error.java_exception)
    trace = re.search(r"Traceback \(most recent call last\):\n(?:(?! *\tat ).*\n)*", text)
    if trace is None:
        return MachineError(f"Spark gave up: {reason_of(text)}; the same command goes on")
    last = re.findall(r"^[\w.]+: .*$|^\w+(?:Error|Exception)$", trace[0], re.MULTILINE)[-1]
    if found := re.match(r"\w*Error: \[Errno (\d+)\] (.*)", last):
        return OSError(int(found[1]), found[2])
    if last.startswith("ModuleNotFoundError"):
        remedy = "install alexnet-ddp there, or name a Python that has it: PYSPARK_PYTHON"
        return ConfigError(
            f"the executors' Python lacks a module ({last.split(': ')[1]}); {remedy}"
        )
    return RuntimeError(f"a Spark task failed each time, the last time with\n{trace[0]}")


def reason_of(text: str) -> str:
    """The line that matters of a Java exception, or of what a JVM said before it ended."""
    if "stopped SparkContext" in text:
        return "is the master there, and does it accept us (spark.authenticate)?"
    lines = [
        line for line in text.splitlines() if re.search(r"Exception|Error", line)
    ] or text.splitlines()
    noise = r".*most recent failure: |.*\bin thread \S+ |[a-z]+\.\S+(Exception|Error): "
    return re.sub(noise, "", lines[0]).rstrip(". ")
