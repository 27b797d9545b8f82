"""Who is late: what each rank does before the first collective of a step, timed, and compared at the log step.

After that collective all ranks wait for the slowest one, so only the time before it tells who that is.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from alexnet_ddp.runtime.distributed import World, all_gather

log = logging.getLogger(__name__)

PHASES = ("data", "forward")
_SHARE = 0.2  # of the step: so much must a rank be behind the others to count as slow
_WINDOWS = 3  # in a row
_STEPS = 10  # of a window, at least: a few steps may be anybody's


class Stopwatch:
    """Seconds of this rank by phase. On a GPU those of the device too, read where the host waits for it anyway."""

    def __init__(self, world: World) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._on_gpu = world.device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.monotonic()
        yield
        self._seconds["data"] += time.monotonic() - began

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass."""
        if self._on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
            return
        began = time.monotonic()
        yield
        self._seconds["forward"] += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within a forward pass, around a wait for other ranks. On a GPU the host does not wait there."""
        began = time.monotonic()
        yield
        self._seconds["forward"] -= 0 if self._on_gpu else time.monotonic() - began

    def read(self) -> list[float]:
        """Seconds by phase since the last read. The device must have passed the last forward pass."""
        self._seconds["forward"] += sum(
            first.elapsed_time(last) / 1000 for first, last in self._events
        )
        seconds = [self._seconds[phase] for phase in PHASES]
        self._seconds, self._events = dict.fromkeys(PHASES, 0.0), []
        return seconds


class Stragglers:
    """Names a rank that is slow for three windows in a row, once each time that it becomes slow."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._window, self._steps, self._wall_s = torch.zeros(world.world_size, len(PHASES)), 0, 0.0
        self._suspect: tuple[int, str] | None = None
        self._windows = 0

    def row(self, seconds: list[float], steps: int, wall_s: float) -> dict[str, int]:
        """Collective. seconds: this rank's by phase, over `steps` that took wall_s together."""
        if self._world.world_size == 1 or steps == 0:
            return {}
        mine = torch.tensor(seconds, dtype=torch.float32, device=self._world.device)
        found = all_gather(mine, self._world).cpu()
        self._window += found
        self._steps, self._wall_s = self._steps + steps, self._wall_s + wall_s
        if self._steps >= _STEPS:
            self.judge(self._window / self._steps, self._wall_s / self._steps)
            self._window, self._steps, self._wall_s = torch.zeros_like(self._window), 0, 0.0
        return {"train/slowest_rank": int(found.sum(1).argmax())}

    def judge(self, seconds: Tensor, step_s: float) -> str | None:
        """A window. seconds: [ranks, phases] a step. The warning that it leads to."""
        behind = seconds - seconds.median(0).values  # of two ranks the faster one is the median
        rank, phase = divmod(int(behind.argmax()), len(PHASES))
        slow = (rank, PHASES[phase]) if behind.max() > _SHARE * step_s else None
        self._windows = self._windows + 1 if slow == self._suspect else 1
        self._suspect = slow
        if slow is None or self._windows != _WINDOWS:
            return None
        late, usual = 1000 * float(seconds[rank, phase]), 1000 * float(seconds[:, phase].median())
        warning = (
            f"rank {rank} is slow in {PHASES[phase]}: {late:.0f} ms a step where the others take {usual:.0f}, "
            f"of steps of {1000 * step_s:.0f} ms"
        )
        log.warning(warning)
        return warning
