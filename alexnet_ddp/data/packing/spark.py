"""The engine of a cluster: one Spark task a shard. The only module that knows pyspark, and it may be absent.

The one rule: Spark carries tasks and small summaries, never images; it may try a task again, or twice at once, and
another executor may do it. A summary comes to the driver through an accumulator: at once, and exactly once.
"""

import atexit
import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from alexnet_ddp.config import AutoEngineConfig, ConfigError, PrepareConfig, SparkEngineConfig
from alexnet_ddp.data.packing.encode import fingerprint
from alexnet_ddp.data.packing.java import find_java
from alexnet_ddp.data.packing.local import run_local
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.errors import DataError, RunError

_PACKAGE = Path(__file__).parents[2]
_AT_ONCE = 1024  # tasks of a job: the JVM of the driver holds them, about 150 kB each
_LOOK_EVERY_S = 0.1
_PATIENCE_S = 30.0  # that the first task may take before we say that nothing happens

log = logging.getLogger("alexnet_ddp")


def choose_engine(cfg: PrepareConfig) -> Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]:
    """Spark, started and looked at; or for engine=auto this machine, where there is neither a master nor a session."""
    engine = cfg.engine
    assert isinstance(engine, SparkEngineConfig)
    if isinstance(engine, AutoEngineConfig) and not (engine.master or _is_there()):
        return partial(run_local, engine.workers or os.cpu_count() or 1)
    try:
        import pyspark  # noqa: F401
    except ImportError:
        raise ConfigError("Spark needs pyspark; pip install 'alexnet-ddp[spark]', or engine=local") from None
    context = _join(engine) if _is_there() else _start(engine)
    _ship_package(context)
    run = partial(run_spark, context, absolute(cfg.source), absolute(cfg.root))
    _preflight(context, run)
    return run


def run_spark(context: Any, source: str, root: str, fn: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """fn(item) for each item, as they are done. Closing the iterator cancels the rest; the first error is raised."""
    mark = f"_state/seen-{uuid.uuid4().hex}"
    Storage(root).write(mark, b"")
    do = partial(_do, _Place(source, root, mark, fingerprint()), fn)
    try:
        for at in range(0, len(items), _AT_ONCE):
            yield from _run_job(context, do, items[at : at + _AT_ONCE])
    finally:
        Storage(root).remove(mark)


def _run_job(context: Any, do: Callable, items: list[Any]) -> Iterator[Any]:
    from pyspark import InheritableThread

    outcomes = context.accumulator([], _Appended())
    group, errors = f"alexnet_ddp-{uuid.uuid4().hex}", []

    def work() -> None:
        try:
            context.setJobGroup(group, "alexnet_ddp.prepare", interruptOnCancel=True)
            context.parallelize(items, len(items)).foreach(partial(do, outcomes))
        except Exception as error:  # for the other thread
            errors.append(error)

    thread, seen = InheritableThread(target=work, daemon=True), 0
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
        raise DataError(f"an executor on {host} does not see source ({place.source}), the driver does; {remedy}")
    if Storage(place.root).size(place.mark) is None:
        raise DataError(f"an executor on {host} does not see root ({place.root}) as the driver does; {remedy}")


def _nothing(item: int) -> None:
    """The checks are all there is to do."""


def _preflight(context: Any, run: Callable[..., Iterator[Any]]) -> None:
    """On the executors that are here; _check also looks at those that come later."""
    words = "Spark (%s) has not run a task yet: has it free workers, with the cores and the memory that are asked for?"
    alarm = threading.Timer(_PATIENCE_S, log.warning, (words, context.master))
    alarm.daemon = True
    alarm.start()
    try:
        for _ in run(_nothing, list(range(2 * context.defaultParallelism))):
            alarm.cancel()
    finally:
        alarm.cancel()


def _is_there() -> bool:
    """An active session, or spark-submit's."""
    return "PYSPARK_GATEWAY_PORT" in os.environ or _active() is not None


def _active() -> Any:
    pyspark = sys.modules.get("pyspark")
    return pyspark.SparkContext._active_spark_context if pyspark else None


def _join(engine: SparkEngineConfig) -> Any:
    """The session that is here, as it is."""
    from pyspark import SparkContext

    context = _active() or SparkContext.getOrCreate()
    asked = {"engine.master": (engine.master, context.master)}
    asked |= {f"engine.conf.{name}": (value, context.getConf().get(name)) for name, value in engine.conf.items()}
    ignored = [f"{name}={value}" for name, (value, real) in asked.items() if value not in (None, real)]
    if ignored:
        log.warning("the Spark session that is here is used as it is; ignored: %s", ", ".join(ignored))
    return context


def _start(engine: SparkEngineConfig) -> Any:
    """A session of our own, ended with this process."""
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway

    master = _retrying(engine.master or "local[*]")
    os.environ["JAVA_HOME"] = find_java(engine.java_home)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = {
        "spark.master": master,
        "spark.app.name": "alexnet_ddp.prepare",
        "spark.ui.enabled": "false",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",  # the driver computes little: half the start
    }
    if re.match(r"local\b|spark://(localhost|127\.)", master):
        conf |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    settings = SparkConf().setAll((conf | engine.conf).items())
    folder = Path(tempfile.mkdtemp(prefix="alexnet_ddp.spark."))
    log.info("starting Spark: %s", master)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with open(folder / "spark.log", "wb") as words:
            gateway = launch_gateway(settings, {"stdout": words, "stderr": words})
        context = SparkContext(conf=settings, gateway=gateway)
    except Exception as error:
        said = (folder / "spark.log").read_text(errors="replace")
        reason = _reason(str(getattr(error, "java_exception", said or error)))
        raise ConfigError(f"Spark ({master}) did not start: {reason}; more in {folder}/spark.log") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Spark's own would talk to the JVM in the middle of a call
    atexit.register(_stop, context, folder)
    return context


def _stop(context: Any, folder: Path) -> None:
    with contextlib.suppress(Exception):  # the JVM may be gone already
        context.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _retrying(master: str) -> str:
    """local[N] gives up at the first error; local[N,4] does not."""
    found = re.fullmatch(r"local(?:\[([^,\]]+)\])?", master)
    return f"local[{found[1] or 1},4]" if found else master


def _ship_package(context: Any) -> None:
    """Our own code, for executors that lack it or have another version of it. Without what needs torch."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(_PACKAGE.rglob("*.py")):
            name = str(path.relative_to(_PACKAGE.parent))
            text = b"" if name == "alexnet_ddp/data/__init__.py" else path.read_bytes()
            archive.writestr(zipfile.ZipInfo(name), text)
    # The content is in the name: a session that lives on may have an older one.
    name = f"alexnet_ddp-{hashlib.sha256(raw.getvalue()).hexdigest()[:12]}.zip"
    folder = tempfile.mkdtemp(prefix="alexnet_ddp.package.")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, name).write_bytes(raw.getvalue())
    context.addPyFile(f"{folder}/{name}")


def _explained(error: Exception) -> Exception:
    """A worker's OSError as an OSError; Spark's own trouble in one line; a bug with its trace."""
    if not hasattr(error, "java_exception"):
        return DataError(f"Spark's JVM was lost ({error}); the same command goes on")
    text = str(error.java_exception)
    trace = re.search(r"Traceback \(most recent call last\):\n(?:(?! *\tat ).*\n)*", text)
    if trace is None:
        return DataError(f"Spark gave up: {_reason(text)}; the same command goes on")
    last = re.findall(r"^[\w.]+: .*$|^\w+(?:Error|Exception)$", trace[0], re.MULTILINE)[-1]
    if found := re.match(r"\w*Error: \[Errno (\d+)\] (.*)", last):
        return OSError(int(found[1]), found[2])
    if last.startswith("ModuleNotFoundError"):
        remedy = "install alexnet-ddp there, or name a Python that has it: PYSPARK_PYTHON"
        return ConfigError(f"the executors' Python lacks a module ({last.split(': ')[1]}); {remedy}")
    return RuntimeError(f"a Spark task failed each time, the last time with\n{trace[0]}")


def _reason(text: str) -> str:
    """The line that matters of a Java exception, or of what a JVM said before it ended."""
    if "stopped SparkContext" in text:
        return "it ended by itself; is the master there, and does it accept us (spark.authenticate)?"
    lines = [line for line in text.splitlines() if re.search(r"Exception|Error", line)] or text.splitlines()
    return re.sub(r".*most recent failure: |.*\bin thread \S+ |[a-z]+\.\S+(Exception|Error): ", "", lines[0]).rstrip(
        ". "
    )
