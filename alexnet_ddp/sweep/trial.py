"""The process of a trial, and what its run has recorded."""

import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from alexnet_ddp import cli
from alexnet_ddp.config import Config
from alexnet_ddp.launch import SOURCES
from alexnet_ddp.runtime.accuracy import counts_of
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.runtime.sweep_record import Evaluation
from alexnet_ddp.sweep.slots import Slot

# They belong to one run of wandb, and every trial is another one.
_OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_SWEEP_ID")
_PROJECT = Path(__file__).resolve().parents[2]
_SCRIPT = SOURCES["launch"] / "local.sh"
LOG = "output.log"
_MIN_WAIT_S = 1.0  # between two looks at a growing file
_WAIT_FACTOR = 50  # at least so many times longer than a look takes


def trial_env() -> dict[str, str]:
    """The variables of this process that a trial gets too."""
    known = {"PYTHON": sys.executable, **os.environ}
    return {name: value for name, value in known.items() if name not in _OF_ONE_RUN}


class TrialProcess:
    """launch/local.sh, which trains with all devices of `slot` and restarts a run that crashed.

    Its output is appended to output.log in the run's directory. It is stopped when this process
    ends, however that happens.
    """

    def __init__(self, run_dir: Path, overrides: list[str], slot: Slot) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (str(_PROJECT), os.getenv("PYTHONPATH"))))
        env = trial_env() | {"PYTHONPATH": path, "COMMAND": "train"}
        cores = ",".join(map(str, slot.cores))
        start = [str(os.getpid()), str(run_dir / ".trial.lock"), cores]
        script = ["bash", str(_SCRIPT), *cli.config_dir_arguments(), *overrides]
        with (run_dir / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "alexnet_ddp.sweep.start_trial", *start, *script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env | slot.env,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops the trials
            )
        self._began = time.time()
        self._is_stopped = False

    def stop(self) -> None:
        """Ask the run to save and to end; once, because a second signal ends it at once."""
        if not self._is_stopped:
            self._is_stopped = True
            self._process.send_signal(signal.SIGTERM)

    def start_s(self, run: RunRecord) -> float | None:
        """Seconds from this start until the run began to train; None before that."""
        began = run.facts.get("time")
        if began is None:
            return None
        took = datetime.fromisoformat(began).timestamp() - self._began
        # Times are recorded in whole seconds. An earlier one is of an earlier start.
        return max(took, 1.0) if took > -1 else None

    def exit_code(self) -> int | None:
        """The exit code, as a shell gives it; None if the process is running."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code


class Evaluations:
    """Reads the evaluations of a run from its metrics.jsonl while the file grows.

    cfg: of the trial, whose length tells which evaluation is the last one.
    left_s: seconds that the rest of the training takes at the speed so far; None if it is unknown.
    """

    def __init__(self, run_dir: Path, metric: str, cfg: Config) -> None:
        self._run_dir, self._metric = run_dir, metric
        self._epochs, self._max_steps = cfg.trainer.epochs, cfg.trainer.max_steps or math.inf
        self._seen: tuple[int, int] | None = None
        self._next_look = 0.0
        self._found: list[Evaluation] = []
        self.left_s: float | None = None

    def read(self, at_once: bool = False) -> list[Evaluation]:
        """All evaluations so far. at_once: also if the last look was a moment ago.

        Raises ConfigError if the file cannot be read.
        """
        began = time.monotonic()
        if began >= self._next_look or at_once:
            file = self._run_dir / "metrics.jsonl"
            stat = file.stat() if file.exists() else None
            seen = None if stat is None else (stat.st_ino, stat.st_size)
            if seen != self._seen:
                self._seen, self._found = seen, self._look()
            took = time.monotonic() - began
            self._next_look = began + max(_MIN_WAIT_S, _WAIT_FACTOR * took)
        return self._found

    def _look(self) -> list[Evaluation]:
        rows = RunRecord(self._run_dir, self._run_dir.name).rows
        self.left_s = self._time_left(rows)
        return [
            Evaluation(
                step,
                float(row[self._metric]),
                self._is_final(step, row.get("epoch", 0.0)),
                counts_of(row, self._metric),
            )
            for step, row in rows.items()
            if self._metric in row
        ]

    def _time_left(self, rows: dict[int, dict[str, Any]]) -> float | None:
        step, row = next(reversed(rows.items()), (0, {}))
        done = max(row.get("epoch", 0.0) / self._epochs, step / self._max_steps)
        if not row.get("time_s") or done <= 0:
            return None
        return float(row["time_s"] * (1 - done) / done)

    def _is_final(self, step: int, epoch: float) -> bool:
        return step >= self._max_steps or epoch > self._epochs - 1e-6
