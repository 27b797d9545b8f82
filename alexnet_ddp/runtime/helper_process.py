"""The helper processes of a rank (watchdog, checkpoint writer): how they start, and shared memory.

They import no torch, so they start in 0.1 s. They import this package from the same directory as
the rank.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from alexnet_ddp.runtime.startup import STOP_SIGNALS

_SOURCE = Path(__file__).resolve().parents[2]


def shared_file(name: str, size: int) -> BinaryIO:
    """Return an anonymous file of `size` bytes to map; it is freed when the last process closes it.

    Args:
        name: shown in /proc, for debugging.
        size: bytes.
    """
    if hasattr(os, "memfd_create"):  # not /dev/shm, which is small in containers
        file = os.fdopen(os.memfd_create(f"alexnet_ddp.{name}"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as the process)
    file.truncate(size)
    return file


def start(module: str, argument: str, files: list[BinaryIO], **pipes: Any) -> subprocess.Popen:
    """Start `python -m alexnet_ddp.MODULE ARGUMENT` with a pipe to its standard input.

    The pipe closes when this process ends, however it ends; the helper then ends too. Raises
    OSError.

    Args:
        module: name within the package.
        argument: its only argument.
        files: inherited under the same file descriptors.
        pipes: further arguments of Popen.
    """
    # Ctrl-C and Slurm send stop signals to helper processes too, which must live until the rank
    # ends. They inherit a mask that blocks these signals from their first instruction.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    path = os.pathsep.join(filter(None, (str(_SOURCE), os.getenv("PYTHONPATH"))))
    try:
        return subprocess.Popen(
            [sys.executable, "-m", f"alexnet_ddp.{module}", argument],
            stdin=subprocess.PIPE,
            pass_fds=[f.fileno() for f in files],
            env={**os.environ, "PYTHONPATH": path},
            **pipes,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
