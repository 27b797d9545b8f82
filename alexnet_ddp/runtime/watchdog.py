"""The rank's side of its watchdog: a heartbeat in shared memory, and the class that updates it.

The other side is watchdog_process.py, which imports this module: it needs no torch.
"""

import faulthandler
import json
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from alexnet_ddp.runtime import helper_process

if TYPE_CHECKING:
    from alexnet_ddp.runtime.distributed import World

WAITING = "wait for the others"  # this rank is blocked in a collective
PHASES = ("start", "data", "forward", WAITING, "update", "evaluate", "checkpoint", "end")

_HEARTBEAT = struct.Struct("<dddiiq16q")  # the fields of HeartbeatState; 16 indices
_MAX_INDICES = 16
_TICK_EVERY_S = 0.5
# "start" may scan a large data set or compile; "checkpoint" may wait for a slow disk.
_PHASE_LIMITS_S = {"start": 3600.0, "checkpoint": 900.0}
_SLOW_FACTOR = 10  # multiplies the limit for evaluation batches, and for steps that may compile
_NUM_TIMED_STEPS = 100  # the limit is derived from the 95th percentile of this many steps

T = TypeVar("T")


@dataclass(frozen=True)
class HeartbeatState:
    """The last state that a rank reported. Times are time.monotonic(), shared by all processes."""

    progress_at: float
    ticked_at: float  # by a thread; old if the GIL is held or the process is stopped
    limit_s: float  # allowed time without progress
    phase: str  # one of PHASES
    step: int  # completed optimizer steps
    indices: list[int]  # the first images of the current batch


class Heartbeat:
    """A HeartbeatState in shared memory: written by the rank, read by its watchdog process.

    Reading needs nothing from the rank, not even its GIL. The memory is freed with its processes.

    Args:
        file: the shared memory of another Heartbeat. Default: create it.
    """

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.file = file or helper_process.shared_file("heartbeat", _HEARTBEAT.size)
        self._map = mmap.mmap(self.file.fileno(), _HEARTBEAT.size)

    def report_progress(self, limit_s: float, phase: str, step: int, indices: list[int]) -> None:
        """Record progress now. See HeartbeatState for the arguments."""
        now = time.monotonic()
        first = indices[:_MAX_INDICES]
        padded = [*first, *[-1] * (_MAX_INDICES - len(first))]
        self._map[:] = _HEARTBEAT.pack(
            now, now, limit_s, PHASES.index(phase), len(first), step, *padded
        )

    def tick(self) -> None:
        """Record that the threads of the process are running."""
        struct.pack_into("<d", self._map, 8, time.monotonic())

    def read(self) -> HeartbeatState:
        progress_at, ticked_at, limit_s, phase, num_indices, step, *indices = _HEARTBEAT.unpack(
            self._map[:]
        )
        return HeartbeatState(
            progress_at, ticked_at, limit_s, PHASES[phase], step, indices[:num_indices]
        )


@dataclass(frozen=True)
class Watched:
    """The rank to watch, and the files that it shares with its watchdog process."""

    pid: int
    rank: int
    host: str
    run_dir: str
    heartbeat_fd: int
    stacks_fd: int


class Watchdog:
    """Starts a process that kills this rank if it hangs, and reports progress to that process.

    A rank hangs if it makes no progress for max(timeout_s, 10 x the 95th percentile of a step).
    After the kill the other ranks fail too, and the launcher restarts the run. Use it as a context
    manager around the training.

    Args:
        timeout_s: the shortest limit. None: no watchdog.
        run_dir: receives failure.json and the stacks of a killed rank.
        world: this rank.
        may_compile: steps may compile, so the limit is 10 times longer.
    """

    def __init__(
        self, timeout_s: float | None, run_dir: Path, world: "World", may_compile: bool = False
    ) -> None:
        self._timeout_s = timeout_s
        self._step = 0
        self._indices: list[int] = []
        self._factor = _SLOW_FACTOR if may_compile else 1
        self._step_times_s: deque[float] = deque(maxlen=_NUM_TIMED_STEPS)
        self._limit_s = _PHASE_LIMITS_S["start"]
        self._step_began_at: float | None = None
        if timeout_s is None:
            return
        self._heartbeat = Heartbeat()
        self._stacks = helper_process.shared_file("stacks", 0)
        self._heartbeat.report_progress(self._limit_s, "start", 0, [])
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        files = [self._heartbeat.file, self._stacks]
        watched = Watched(
            pid=os.getpid(),
            rank=world.rank,
            host=socket.gethostname(),
            run_dir=str(run_dir.absolute()),
            heartbeat_fd=self._heartbeat.file.fileno(),
            stacks_fd=self._stacks.fileno(),
        )
        self._process = helper_process.start(
            "runtime.watchdog_process", json.dumps(asdict(watched)), files
        )
        self._ended = threading.Event()
        threading.Thread(target=self._tick, name="watchdog", daemon=True).start()

    def begin_step(self, step: int, indices: list[int]) -> None:
        """Report that the next step begins.

        Args:
            step: the number of completed steps.
            indices: this rank's images of the next step.
        """
        now = time.monotonic()
        if self._step_began_at is not None:
            self._step_times_s.append(now - self._step_began_at)
            percentile_s = sorted(self._step_times_s)[len(self._step_times_s) * 95 // 100]
            self._limit_s = max(self._timeout_s or 0, 10 * percentile_s) * self._factor
        self._step_began_at = now
        self._step = step
        self._indices = indices
        self.phase("data")

    def phase(self, name: str) -> None:
        """Report progress: the phase `name` (one of PHASES) begins."""
        if self._timeout_s is None:
            return
        limit_s = _PHASE_LIMITS_S.get(name, self._limit_s)
        if name == "evaluate":
            limit_s *= _SLOW_FACTOR
        self._heartbeat.report_progress(limit_s, name, self._step, self._indices)

    def evaluating(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of an evaluation and report progress for each."""
        for batch in batches:
            self.phase("evaluate")
            yield batch

    def pause(self) -> None:
        """Exclude the time until the next begin_step() from the step times."""
        self._step_began_at = None

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_EVERY_S):
            self._heartbeat.tick()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timeout_s is None:
            return
        self.phase("end")
        self._ended.set()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        faulthandler.unregister(signal.SIGUSR2)
