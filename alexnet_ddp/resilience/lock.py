"""One training a run directory: two that write the same checkpoints would end with neither's."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from alexnet_ddp.errors import ConfigError

log = logging.getLogger(__name__)


def lock_run(run_dir: Path) -> TextIO | None:
    """Hold run_dir until the result is closed, or its process ends. Raises ConfigError where another process does.

    None where the file system has no locks.
    """
    file = (run_dir / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        remedy = "wait for it, end it, or choose another run.name"
        raise ConfigError(f"run.name={run_dir.name} is being trained by {file.read().strip()}; {remedy}") from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): do not start the same run twice", run_dir, error.strerror)
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
