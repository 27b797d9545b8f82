"""launch/torchrun.py whose ranks are forked from it, after it has imported what they import.

    python tests/drills/preloaded/torchrun.py .../launch/torchrun.py [torchrun's arguments]

One import serves all ranks and all restarts; with server.py it serves all jobs. Otherwise a rank is the process that
torchrun starts: own session, environment, signals and files. `comm` in /proc is "rank N" and the end of the job's mark.
`--full` runs the drills without this.
"""

import atexit
import gc
import importlib
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

IMPORTS = (
    "alexnet_ddp.cli",
    "alexnet_ddp.config.compose",
    "alexnet_ddp.training.trainer",
    "alexnet_ddp.doctor.port",
    "torch._dynamo",
    "torch.distributed.run",
)


def import_all() -> None:
    for module in IMPORTS:
        importlib.import_module(module)


class ForkedRank:
    """What torchrun uses of a subprocess.Popen, for `python -u -m MODULE ARGUMENTS` as a fork of this process."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]) -> None:
        import_all()
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _be_rank(args, env, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(0.02)
        return code


def _be_rank(args: tuple[str, ...], env: dict[str, str], signals_blocked: set[int]) -> None:
    """Undo what torchrun has set in this process, then run the module. Does not return."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals_blocked)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ |= env
    logging.disable(logging.NOTSET)
    sys.orig_argv[:] = args
    module = args.index("-m") + 1
    sys.argv[:] = args[module:]
    if faults := sys.modules.get("sitecustomize"):
        faults.inject()
    end_as(
        f"rank {env['RANK']}",
        lambda: runpy.run_module(args[module], run_name="__main__", alter_sys=True),
    )


def end_as(name: str, function: Callable[[], object]) -> None:
    """Call the function in this forked process, and end as a Python program ends. Does not return."""
    token = os.environ.get("ALEXNET_DDP_DRILL", "").rpartition("-")[2]
    Path("/proc/self/comm").write_text(f"{name} {token}")
    code = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_ranks() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.SubprocessHandler._popen = lambda self, args, env: ForkedRank(args, env)
    gc.freeze()
    gc.enable()


def main() -> None:
    from alexnet_ddp.runtime import startup

    startup.resume_garbage_collection = (
        _fork_ranks  # called when launch/torchrun.py has imported torch
    )
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
