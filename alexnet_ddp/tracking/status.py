"""status.json: how the run stands and how it ended, for launch scripts and for people."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alexnet_ddp.runtime.distributed import lost_peer
from alexnet_ddp.runtime.errors import ConfigError, Preempted, RunError, out_of_memory
from alexnet_ddp.runtime.startup import before_exit
from alexnet_ddp.tracking.record import write_status

log = logging.getLogger(__name__)


class RunStatus:
    """Writes status.json on rank 0; a disk that refuses is a warning, since a run must not die of its status."""

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self._run_dir, self._is_main, self._step, self._started = run_dir, is_main, 0, False

    def running(self, step: int) -> None:
        self._step, self._started = step, True
        self._write("running")

    def stopped_while_starting(self) -> None:
        if self._started:
            self._write(
                "preempted", Preempted.exit_code, "stopped while it started; nothing is lost"
            )

    def is_someone_elses(self, error: RunError) -> bool:
        """A command that was refused before it began has nothing to say about a run that was here before it."""
        refused = error.exit_code == ConfigError.exit_code and not self._started
        return refused and (self._run_dir / "status.json").exists()

    def _write(self, state: str, exit_code: int | None = None, message: str = "") -> None:
        if not self._is_main:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            write_status(self._run_dir, state, self._step, exit_code, message)
        except OSError as error:
            log.warning("status.json could not be written: %s", error)


@contextmanager
def run_status(run_dir: Path, is_main: bool) -> Iterator[RunStatus]:
    """Around a whole run: whatever way it ends, status.json says so."""
    status = RunStatus(run_dir, is_main)
    try:
        with before_exit(status.stopped_while_starting):
            yield status
    except BaseException as caught:
        error = out_of_memory(caught) or lost_peer(caught) or caught
        if not isinstance(error, RunError):
            status._write("failed", 1, f"{type(error).__name__}: {error}")
        elif not status.is_someone_elses(error):
            state = "preempted" if error.exit_code == Preempted.exit_code else "failed"
            status._write(state, error.exit_code, str(error))
        if error is caught:
            raise
        raise error from caught
    status._write("complete", 0)
