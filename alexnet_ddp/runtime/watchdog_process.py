"""The watchdog process of one rank: python -m alexnet_ddp.runtime.watchdog_process

It reads the rank's heartbeat from shared memory and notices the rank's end when its own standard
input closes. It therefore works while the rank is stopped, holds the GIL, or waits in a collective
for a lost rank. It imports no torch.
"""

import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from alexnet_ddp.runtime.errors import PeerLost, write_exit_code
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.startup import ignore_stop_signals
from alexnet_ddp.runtime.watchdog import WAITING, Heartbeat, HeartbeatState, Watched

_CHECK_EVERY_S = 0.2
_MAX_TICK_AGE_S = 2.0  # a rank whose threads run ticks twice a second
_DUMP_S = 0.7  # time for faulthandler to write the stacks


@dataclass(frozen=True)
class Failure:
    """The content of failure.json."""

    rank: int
    host: str
    pid: int
    step: int  # completed optimizer steps
    phase: str
    cause: str
    indices: list[int]  # the first images of the current batch
    time: str = ""
    stacks: str | None = None  # the file with the stacks of all threads

    def line(self) -> str:
        position = f"after step {self.step}, phase: {self.phase}, images {self.indices[:4]}..."
        stacks = f"; its stacks: {self.stacks}" if self.stacks else ""
        return f"alexnet_ddp: rank {self.rank} on {self.host} {self.cause} ({position}){stacks}"


def watch(rank: Watched) -> None:
    """Watch `rank` until it ends. Kill it if it hangs; report it if it died."""
    heartbeat = Heartbeat(os.fdopen(rank.heartbeat_fd, "r+b", buffering=0))
    started = time.time()
    checked_at = time.monotonic()
    while not select.select([sys.stdin], [], [], _CHECK_EVERY_S)[0]:
        state = heartbeat.read()
        now = time.monotonic()
        if now - checked_at > 10 * _CHECK_EVERY_S:
            # This process was stopped too, or the machine slept: restart the rank's time.
            heartbeat.report_progress(state.limit_s, state.phase, state.step, state.indices)
            state = heartbeat.read()
        checked_at = now
        cause = _why_hung(rank, state, now)
        if cause:
            _kill(rank, state, cause, started)
            return
    state = heartbeat.read()
    if state.phase != "end":
        _report(rank, _failure(rank, state, "died"), started)


def _why_hung(rank: Watched, state: HeartbeatState, now: float) -> str:
    """Return why the rank counts as hung, or "" if it does not.

    A rank that waits in a collective gets a longer limit, so that the rank which caused the hang is
    reported first.
    """
    silent_s = now - state.progress_at
    if silent_s <= state.limit_s:
        return ""
    if _is_stopped(rank.pid):
        return f"made no progress for {silent_s:.0f} s: it is stopped (SIGSTOP)"
    if now - state.ticked_at > _MAX_TICK_AGE_S:
        return f"made no progress for {silent_s:.0f} s: a thread holds the GIL"
    if state.phase != WAITING:
        return f"made no progress for {silent_s:.0f} s"
    if silent_s > state.limit_s * 1.25 + 2:
        return f"has waited {silent_s:.0f} s for the other ranks, one of which is lost"
    return ""


def _kill(rank: Watched, state: HeartbeatState, cause: str, started: float) -> None:
    """Let the rank write the stacks of its threads, which needs no GIL, report it and kill it."""
    stacks = Path(rank.run_dir) / f"stacks-rank-{rank.rank}.txt"
    for number in (signal.SIGUSR2, signal.SIGCONT):
        os.kill(rank.pid, number)
    time.sleep(_DUMP_S)
    written = os.pread(rank.stacks_fd, 1 << 20, 0)
    failure = _failure(rank, state, cause)
    try:
        stacks.write_bytes(written)
        failure = replace(failure, stacks=str(stacks))
    except OSError as error:
        say(f"alexnet_ddp: {stacks} could not be written: {error}", sys.stderr)
    _report(rank, failure, started)
    write_exit_code(PeerLost.exit_code)
    os.kill(rank.pid, signal.SIGKILL)


def _failure(rank: Watched, state: HeartbeatState, cause: str) -> Failure:
    return Failure(rank.rank, rank.host, rank.pid, state.step, state.phase, cause, state.indices)


def _report(rank: Watched, failure: Failure, started: float) -> None:
    """Print the failure. Write failure.json unless another rank wrote it after `started`."""
    path = Path(rank.run_dir) / "failure.json"
    say(failure.line(), sys.stderr)
    try:
        if not (path.exists() and path.stat().st_mtime > started):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(path, {**asdict(failure), "time": now})
    except OSError as error:  # a failing disk may be the cause of the hang
        say(f"alexnet_ddp: {path} could not be written: {error}", sys.stderr)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # the process has ended, or there is no /proc
        return False


if __name__ == "__main__":
    ignore_stop_signals()  # they are meant for the rank
    watch(Watched(**json.loads(sys.argv[1])))
