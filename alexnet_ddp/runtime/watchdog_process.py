"""The watchdog of one rank, a process of its own: python -m alexnet_ddp.runtime.watchdog_process

It sees the rank's beacon and the end of the rank's life (its standard input closes), and needs nothing else of it: it
works while the rank is stopped, holds the GIL, or waits in a collective for a rank that is gone. It imports no torch.
"""

import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from alexnet_ddp.runtime.errors import PeerLost, write_exit_code
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.heartbeat import WAITING, Heartbeat, Sighting
from alexnet_ddp.runtime.printing import say

_LOOK_EVERY_S = 0.2
_TICK_S = 2.0  # a rank that lives and lets its threads run ticks twice a second
_DUMP_S = 0.7  # for the stacks to be written


@dataclass(frozen=True)
class Watched:
    """Who is watched, and where a failure is to be told."""

    pid: int
    rank: int
    host: str
    run_dir: str
    beacon: int  # file descriptors
    stacks: int


@dataclass(frozen=True)
class Failure:
    """What failure.json says."""

    rank: int
    host: str
    pid: int
    step: int  # steps that were done
    phase: str
    cause: str
    indices: list[int]  # the first ones of the images in work
    time: str = ""
    stacks: str | None = None  # file with the stacks of all threads

    def line(self) -> str:
        where = f"after step {self.step}, phase: {self.phase}, images {self.indices[:4]}..."
        end = f"; its stacks: {self.stacks}" if self.stacks else ""
        return f"alexnet_ddp: rank {self.rank} on {self.host} {self.cause} ({where}){end}"


def watch(rank: Watched) -> None:
    """Until the rank is gone."""
    beacon, began, looked = (
        Heartbeat(os.fdopen(rank.beacon, "r+b", buffering=0)),
        time.time(),
        time.monotonic(),
    )
    while not select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
        seen, now = beacon.see(), time.monotonic()
        if (
            now - looked > 10 * _LOOK_EVERY_S
        ):  # we were stopped too, or the machine was asleep: nobody is late
            beacon.show(seen.limit_s, seen.phase, seen.step, seen.indices)
            seen = beacon.see()
        looked = now
        cause = _hung(rank, seen, now)
        if cause:
            _end(rank, seen, cause, began)
            return
    seen = beacon.see()
    if seen.phase != "end":
        _tell(
            rank,
            Failure(rank.rank, rank.host, rank.pid, seen.step, seen.phase, "died", seen.indices),
            began,
        )


def _hung(rank: Watched, seen: Sighting, now: float) -> str:
    """Why it is taken for hung; empty while it is not.

    Who only waits for others in a collective gets more time than who is at fault, so that the one at fault is named.
    """
    silent = now - seen.progress_at
    if silent <= seen.limit_s:
        return ""
    if _is_stopped(rank.pid):
        return f"made no progress for {silent:.0f} s: it is stopped (SIGSTOP)"
    if now - seen.ticked_at > _TICK_S:
        return f"made no progress for {silent:.0f} s: a thread holds the GIL"
    if seen.phase != WAITING:
        return f"made no progress for {silent:.0f} s"
    if silent > seen.limit_s * 1.25 + 2:
        return f"has waited {silent:.0f} s for the others, of which one is lost"
    return ""


def _end(rank: Watched, seen: Sighting, cause: str, began: float) -> None:
    """Let it write the stacks of its threads, which needs no GIL, and kill it."""
    stacks = Path(rank.run_dir) / f"stacks-rank-{rank.rank}.txt"
    for number in (signal.SIGUSR2, signal.SIGCONT):
        os.kill(rank.pid, number)
    time.sleep(_DUMP_S)
    written = os.pread(rank.stacks, 1 << 20, 0)
    failure = Failure(rank.rank, rank.host, rank.pid, seen.step, seen.phase, cause, seen.indices)
    try:
        stacks.write_bytes(written)
        failure = Failure(**{**asdict(failure), "stacks": str(stacks)})
    except OSError as error:
        say(f"alexnet_ddp: {stacks} could not be written: {error}", sys.stderr)
    _tell(rank, failure, began)
    write_exit_code(PeerLost.exit_code)
    os.kill(rank.pid, signal.SIGKILL)


def _tell(rank: Watched, failure: Failure, began: float) -> None:
    """Say it, and write failure.json, unless another rank has said since `began` what went wrong."""
    path = Path(rank.run_dir) / "failure.json"
    say(failure.line(), sys.stderr)
    try:
        if not (path.exists() and path.stat().st_mtime > began):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(path, {**asdict(failure), "time": now})
    except OSError as error:  # the disk may be what is wrong
        say(f"alexnet_ddp: {path} could not be written: {error}", sys.stderr)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # gone, or no /proc
        return False


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)  # the rank's business
    watch(Watched(**json.loads(sys.argv[1])))
