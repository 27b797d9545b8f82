"""Small processes beside a rank, its watchdog and its checkpoints' writer: how they start, and what both sides see.

They import no torch, so they start in a tenth of a second, and find this package where the rank found it.
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
    """`size` bytes to map, without a place in any folder: they go when the last process that has them goes."""
    if hasattr(os, "memfd_create"):  # not /dev/shm, which containers make small
        file = os.fdopen(os.memfd_create(f"alexnet_ddp.{name}"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as the process)
    file.truncate(size)
    return file


def start(module: str, argument: str, files: list[BinaryIO], **pipes: Any) -> subprocess.Popen:
    """python -m alexnet_ddp.MODULE ARGUMENT, with `files` open under their numbers and a pipe to its standard input.

    That pipe is its lifeline: it closes when this process ends, by whatever means. Raises OSError.
    """
    # Ctrl-C and Slurm send stop signals to these processes too. They end when the rank does, so they inherit a mask
    # that blocks the signals from their first instruction on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    path = os.pathsep.join(filter(None, (str(_SOURCE), os.getenv("PYTHONPATH"))))
    try:
        return subprocess.Popen(
            [sys.executable, "-m", f"alexnet_ddp.{module}", argument], stdin=subprocess.PIPE,
            pass_fds=[f.fileno() for f in files], env={**os.environ, "PYTHONPATH": path}, **pipes,
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
