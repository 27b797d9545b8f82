"""The engine of a Spark cluster: one task per shard. pyspark is optional and only imported here.

An active session is used as it is and stays open. A session that this module starts writes to a
log file, and is stopped at the end of the process.
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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.prepare import AutoEngineConfig, PrepareConfig, SparkEngineConfig
from alexnet_ddp.data.storage import absolute
from alexnet_ddp.prepare.engine import Engine, local_engine
from alexnet_ddp.prepare.java import find_java
from alexnet_ddp.prepare.spark_tasks import reason_of, run_spark

_PACKAGE = Path(__file__).parents[1]
_FIRST_TASK_S = 30.0  # warn if no task has finished after this time

log = logging.getLogger("alexnet_ddp")


def choose_engine(cfg: PrepareConfig) -> Engine:
    """Start or join Spark, check its executors, and return its engine.

    With engine=auto, no master and no session, return the engine of this machine. Raises
    ConfigError if Spark does not start.
    """
    engine = cfg.engine
    assert isinstance(engine, SparkEngineConfig)
    if isinstance(engine, AutoEngineConfig) and not (engine.master or _has_session()):
        return local_engine(engine.workers)
    try:
        import pyspark  # noqa: F401
    except ImportError:
        raise ConfigError(
            "Spark needs pyspark; pip install 'alexnet-ddp[spark]', or engine=local"
        ) from None
    context = _join(engine) if _has_session() else _start(engine)
    run = partial(run_spark, context, absolute(cfg.source or cfg.root), absolute(cfg.root))
    try:
        _ship_package(context)
        _preflight(context, run)
    except Exception as error:
        if not hasattr(error, "java_exception"):
            raise
        # If no master answers, a session starts nevertheless, and fails a minute later.
        reason = reason_of(str(error.java_exception))
        raise ConfigError(
            f"Spark ({context.master}) ended by itself: {reason}; "
            "check engine.master, and that the cluster is up"
        ) from None
    return run


def _nothing(item: int) -> None:
    """A task without work: spark_tasks checks the executor before it calls this."""


def _preflight(context: Any, run: Engine) -> None:
    """Check the executors that exist now, see spark_tasks.py; later ones check themselves."""
    warning = (
        "Spark (%s) has not run a task yet: does it have free workers with the requested cores "
        "and memory?"
    )
    alarm = threading.Timer(_FIRST_TASK_S, log.warning, (warning, context.master))
    alarm.daemon = True
    alarm.start()
    try:
        for _ in run(_nothing, list(range(2 * context.defaultParallelism))):
            alarm.cancel()
    finally:
        alarm.cancel()


def _has_session() -> bool:
    """True if a session is active, or spark-submit has prepared one."""
    return "PYSPARK_GATEWAY_PORT" in os.environ or _active() is not None


def _active() -> Any:
    pyspark = sys.modules.get("pyspark")
    return pyspark.SparkContext._active_spark_context if pyspark else None


def _join(engine: SparkEngineConfig) -> Any:
    """Return the existing session. Warns about options that it does not have."""
    from pyspark import SparkContext

    context = _active()
    if context is None:
        with _keep_sigint_handler():
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
        log.warning("the existing Spark session is used as it is; ignored: %s", ", ".join(ignored))
    return context


def _start(engine: SparkEngineConfig) -> Any:
    """Start a session that ends with this process. Raises ConfigError."""
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway

    master = _retrying(engine.master or "local[*]")
    os.environ["JAVA_HOME"] = find_java(engine.java_home)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = {
        "spark.master": master,
        "spark.app.name": "alexnet_ddp.prepare",
        "spark.ui.enabled": "false",
        # The driver computes little; this halves its start-up time.
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    }
    if re.match(r"local\b|spark://(localhost|127\.)", master):
        conf |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    settings = SparkConf().setAll((conf | engine.conf).items())
    folder = Path(tempfile.mkdtemp(prefix="alexnet_ddp.spark."))
    log.info("starting Spark: %s", master)
    try:
        with _keep_sigint_handler(), open(folder / "spark.log", "wb") as output:
            gateway = launch_gateway(settings, {"stdout": output, "stderr": output})
            context = SparkContext(conf=settings, gateway=gateway)
    except Exception as error:
        printed = (folder / "spark.log").read_text(errors="replace")
        reason = reason_of(str(getattr(error, "java_exception", printed or error)))
        raise ConfigError(
            f"Spark ({master}) did not start: {reason}; more in {folder}/spark.log"
        ) from None
    atexit.register(_stop, context, folder)
    return context


@contextlib.contextmanager
def _keep_sigint_handler() -> Iterator[None]:
    """Restore the SIGINT handler afterwards: SparkContext's calls the JVM, even during a call."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _stop(context: Any, folder: Path) -> None:
    with contextlib.suppress(Exception):  # the JVM may have ended already
        context.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _retrying(master: str) -> str:
    """Turn local[N], which fails at the first error, into local[N,4], which retries."""
    found = re.fullmatch(r"local(?:\[([^,\]]+)\])?", master)
    return f"local[{found[1] or 1},4]" if found else master


def _ship_package(context: Any) -> None:
    """Send this package to the executors, which may lack it or have another version."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(_PACKAGE.rglob("*.py")):
            name = str(path.relative_to(_PACKAGE.parent))
            # ZipInfo has no modification time: the same files give the same bytes.
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
    # The name contains a hash: a long-lived session may have loaded an older version.
    name = f"alexnet_ddp-{hashlib.sha256(raw.getvalue()).hexdigest()[:12]}.zip"
    folder = tempfile.mkdtemp(prefix="alexnet_ddp.package.")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, name).write_bytes(raw.getvalue())
    context.addPyFile(f"{folder}/{name}")
