"""Slurm's time limit: stop a run while there is still time for its final checkpoint."""

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable

from alexnet_ddp.runtime.signals import StopSignal

log = logging.getLogger(__name__)

_MIN_MARGIN_S = 30.0  # for a step, a small checkpoint, the end of the processes, and the requeue


class Deadline:
    """Requests a stop once the remaining job time is needed for the final checkpoint.

    The margin is 30 s plus twice the longest save, but at most half of the job's remaining time at
    the start, so that a short job still trains.

    Args:
        stop: its flag `received` is set.
        save_s: returns the duration of the longest save so far.
    """

    def __init__(self, stop: StopSignal, save_s: Callable[[], float]) -> None:
        self._stop = stop
        self._save_s = save_s

    def watch(self, is_main: bool) -> None:
        """Start the thread that watches the limit, on rank 0 of a Slurm job; else do nothing."""
        if is_main and "SLURM_JOB_ID" in os.environ:
            threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def _watch(self) -> None:
        left_s = time_left()
        if left_s is None:
            return
        max_margin_s = left_s / 2
        while (wait_s := left_s - min(_MIN_MARGIN_S + 2 * self._save_s(), max_margin_s)) > 0:
            pause_s = max(wait_s / 2, 0.2)  # about a dozen queries a day: a limit may be changed
            time.sleep(pause_s)
            now_left_s = time_left()
            left_s = left_s - pause_s if now_left_s is None else now_left_s
        log.info("Slurm ends this job in %.0f s: saving as soon as the ranks are equal", left_s)
        self._stop.received = True


def time_left() -> float | None:
    """Return the seconds until Slurm's time limit; None if there is none or it is unknown."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:  # the id of an array's last task is also the id of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    try:
        end = subprocess.run(
            command,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        # The limit as it was when the job started. Not every version of Slurm sets it.
        end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdecimal() else None
