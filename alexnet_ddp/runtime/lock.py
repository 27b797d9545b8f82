"""One training a run directory: two that write the same checkpoints would end with neither's."""

import fcntl
import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import TextIO

from alexnet_ddp.runtime.errors import ConfigError

_LEASE_S = 120.0  # for which a network file system keeps the lock of a machine that is gone

log = logging.getLogger(__name__)


def lock_run(run_dir: Path) -> TextIO | None:
    """Hold run_dir until the result is closed, or its process ends. Raises ConfigError where another process does.

    None where the file system has no locks.
    """
    file, since = (run_dir / ".lock").open("a+"), time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            if _lives(holder) or time.monotonic() - since > _LEASE_S:
                remedy = "wait for it, end it, or choose another run.name"
                raise ConfigError(
                    f"run.name={run_dir.name} is being trained by {holder}; {remedy}"
                ) from None
            time.sleep(1)
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): do not start the same run twice", run_dir, error.strerror
            )
            return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _lives(holder: str) -> bool:
    """Whether the process on this machine, which `holder` names as lock_run writes it, is there."""
    found = re.fullmatch(r"process (\d+) on (.*)", holder)
    return (
        found is not None
        and found[2] == socket.gethostname()
        and Path(f"/proc/{found[1]}").exists()
    )
