"""The engine of a cluster: one Spark task a shard. The only module that knows pyspark, and it may be absent.

The one rule: a session that is there is used as it is, and left so; one that we start is quiet, and ends with us.
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
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from alexnet_ddp.config import AutoEngineConfig, ConfigError, PrepareConfig, SparkEngineConfig
from alexnet_ddp.data.storage import absolute
from alexnet_ddp.prepare.engine import Engine, local_engine
from alexnet_ddp.prepare.java import find_java
from alexnet_ddp.prepare.spark_tasks import reason_of, run_spark

_PACKAGE = Path(__file__).parents[1]
_PATIENCE_S = 30.0  # that the first task may take before we say that nothing happens

log = logging.getLogger("alexnet_ddp")


def choose_engine(cfg: PrepareConfig) -> Engine:
    """Spark, started and looked at; or for engine=auto this machine, where there is neither a master nor a session."""
    engine = cfg.engine
    assert isinstance(engine, SparkEngineConfig)
    if isinstance(engine, AutoEngineConfig) and not (engine.master or _is_there()):
        return local_engine(engine.workers)
    try:
        import pyspark  # noqa: F401
    except ImportError:
        raise ConfigError(
            "Spark needs pyspark; pip install 'alexnet-ddp[spark]', or engine=local"
        ) from None
    context = _join(engine) if _is_there() else _start(engine)
    run = partial(run_spark, context, absolute(cfg.source or cfg.root), absolute(cfg.root))
    try:
        _ship_package(context)
        _preflight(context, run)
    except Exception as error:
        if not hasattr(error, "java_exception"):
            raise
        # Where no master answers, a session starts, and ends a minute later in whatever it is doing.
        remedy = "check engine.master, and that the cluster is up"
        raise ConfigError(
            f"Spark ({context.master}) ended by itself: {reason_of(str(error.java_exception))}; {remedy}"
        ) from None
    return run


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

    context = _active()
    if context is None:
        with _our_interrupt():
            context = SparkContext.getOrCreate()
    asked = {"engine.master": (engine.master, context.master)}
    asked |= {
        f"engine.conf.{name}": (value, context.getConf().get(name))
        for name, value in engine.conf.items()
    }
    ignored = [
        f"{name}={value}" for name, (value, real) in asked.items() if value not in (None, real)
    ]
    if ignored:
        log.warning(
            "the Spark session that is here is used as it is; ignored: %s", ", ".join(ignored)
        )
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
    try:
        with _our_interrupt(), open(folder / "spark.log", "wb") as words:
            gateway = launch_gateway(settings, {"stdout": words, "stderr": words})
            context = SparkContext(conf=settings, gateway=gateway)
    except Exception as error:
        said = (folder / "spark.log").read_text(errors="replace")
        reason = reason_of(str(getattr(error, "java_exception", said or error)))
        raise ConfigError(
            f"Spark ({master}) did not start: {reason}; more in {folder}/spark.log"
        ) from None
    atexit.register(_stop, context, folder)
    return context


@contextlib.contextmanager
def _our_interrupt() -> Iterator[None]:
    """Whoever makes a SparkContext gets a ctrl-C that talks to the JVM, also in the middle of another call to it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _stop(context: Any, folder: Path) -> None:
    with contextlib.suppress(Exception):  # the JVM may be gone already
        context.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _retrying(master: str) -> str:
    """local[N] gives up at the first error; local[N,4] does not."""
    found = re.fullmatch(r"local(?:\[([^,\]]+)\])?", master)
    return f"local[{found[1] or 1},4]" if found else master


def _ship_package(context: Any) -> None:
    """Our own code, for executors that lack it or have another version of it."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(_PACKAGE.rglob("*.py")):
            name = str(path.relative_to(_PACKAGE.parent))
            archive.writestr(
                zipfile.ZipInfo(name), path.read_bytes()
            )  # ZipInfo: without the time of the file
    # The content is in the name: a session that lives on may have an older one.
    name = f"alexnet_ddp-{hashlib.sha256(raw.getvalue()).hexdigest()[:12]}.zip"
    folder = tempfile.mkdtemp(prefix="alexnet_ddp.package.")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, name).write_bytes(raw.getvalue())
    context.addPyFile(f"{folder}/{name}")
