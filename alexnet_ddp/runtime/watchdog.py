"""The rank's side of its watchdog: a beacon that is shown at each phase of a step, and a thread that ticks."""

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from alexnet_ddp.runtime import helper_process
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.heartbeat import Heartbeat
from alexnet_ddp.runtime.watchdog_process import Watched

_TICK_EVERY_S = 0.5
_LIMITS_S = {
    "start": 3600.0,
    "checkpoint": 900.0,
}  # an index of a large data set, a compilation; a slow disk
_SLOWER = 10  # times a step's limit, for a batch of an evaluation, or for steps that may compile
_STEPS = 100  # whose 95th percentile counts

T = TypeVar("T")


class Watchdog:
    """Kills this rank where it makes no progress for max(timeout_s, 10 x the 95th percentile of a step), and says why.

    Then the others fail too, and whoever started the run starts it again. None: nobody watches.
    """

    def __init__(
        self, timeout_s: float | None, run_dir: Path, world: World, may_compile: bool = False
    ) -> None:
        self._timeout_s, self._step, self._indices = timeout_s, 0, []
        self._factor = _SLOWER if may_compile else 1
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._limit_s, self._began = _LIMITS_S["start"], None
        if timeout_s is None:
            return
        self._beacon, self._stacks = Heartbeat(), helper_process.shared_file("stacks", 0)
        self._beacon.show(_LIMITS_S["start"], "start", 0, [])
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        files = [self._beacon.file, self._stacks]
        numbers = [file.fileno() for file in files]
        watched = Watched(
            os.getpid(), world.rank, socket.gethostname(), str(run_dir.absolute()), *numbers
        )
        self._process = helper_process.start(
            "runtime.watchdog_process", json.dumps(asdict(watched)), files
        )
        self._ended = threading.Event()
        threading.Thread(target=self._tick, name="watchdog", daemon=True).start()

    def begin_step(self, step: int, indices: list[int]) -> None:
        """`step` steps are done, and the next one begins; indices: this rank's images of it."""
        now = time.monotonic()
        if self._began is not None:
            self._steps.append(now - self._began)
            slow = sorted(self._steps)[len(self._steps) * 95 // 100]
            self._limit_s = max(self._timeout_s or 0, 10 * slow) * self._factor
        self._began, self._step, self._indices = now, step, indices
        self.phase("data")

    def phase(self, name: str) -> None:
        """Progress: what comes next is one of beacon.PHASES."""
        if self._timeout_s is not None:
            limit_s = _LIMITS_S.get(name, self._limit_s)
            self._beacon.show(
                limit_s * (_SLOWER if name == "evaluate" else 1), name, self._step, self._indices
            )

    def evaluating(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an evaluation, each of which is progress."""
        for batch in batches:
            self.phase("evaluate")
            yield batch

    def pause(self) -> None:
        """What comes now is no step, and does not count as one."""
        self._began = None

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_EVERY_S):
            self._beacon.tick()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timeout_s is None:
            return
        self.phase("end")
        self._ended.set()
        self._process.stdin.close()
        self._process.wait()
        faulthandler.unregister(signal.SIGUSR2)
