"""Slurm's time limit: known beforehand, so that a run stops itself while there is still time to save, signal or not."""

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable

from alexnet_ddp.runtime.signals import StopSignal

log = logging.getLogger(__name__)

_LEAST_MARGIN_S = 30.0  # a step, a save of some MB, the end of the processes, and the requeue


class Deadline:
    """Sets `stop` when what is left of the job's time is what a last save needs: 30 s and twice save_s(), the longest.

    However short the time, half of it is for training: a run that only starts and stops would be requeued for ever.
    """

    def __init__(self, stop: StopSignal, save_s: Callable[[], float]) -> None:
        self._stop, self._save_s = stop, save_s

    def watch(self, is_main: bool) -> None:
        """A thread of rank 0 does so; elsewhere, and outside of Slurm, nothing happens."""
        if is_main and "SLURM_JOB_ID" in os.environ:
            threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def _watch(self) -> None:
        left = time_left()
        if left is None:
            return
        most = left / 2
        while (wait := left - min(_LEAST_MARGIN_S + 2 * self._save_s(), most)) > 0:
            pause = max(wait / 2, 0.2)  # asks a dozen times a day, for a limit may be moved
            time.sleep(pause)
            now = time_left()
            left = left - pause if now is None else now
        log.info("Slurm ends this job in %.0f s: saving as soon as the ranks are equal", left)
        self._stop.received = True


def time_left() -> float | None:
    """Seconds until Slurm's time limit; None where there is none, or nobody knows it."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:  # the id of an array's last task is also that of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    ask = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    try:
        said = subprocess.run(
            ask,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        said = os.environ.get("SLURM_JOB_END_TIME", "")  # of the start, and not in every Slurm
    return float(said) - time.time() if said.isdecimal() else None
