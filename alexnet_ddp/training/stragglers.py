"""Times the parts of a step, and finds slow ranks.

After the first collective of a step all ranks have waited for the slowest one, so only the time
before it shows which rank is slow. The times are compared when a row is logged.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from alexnet_ddp.runtime.distributed import World, all_gather
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.training.profiler import DATA

log = logging.getLogger(__name__)

PHASES = ("data", "forward")  # before the first collective of a step
_TIMED = (*PHASES, "backward", "update")
_SHARE = 0.2  # a rank is slow if it is later than the others by this share of a step
_WINDOWS = 3  # consecutive windows before a warning
_STEPS = 10  # fewest steps of a window: single steps vary too much


class Stopwatch:
    """Seconds of this rank by phase; on a GPU also the device's, read when the host waits."""

    def __init__(self, world: World) -> None:
        self._seconds = dict.fromkeys(_TIMED, 0.0)
        self._on_gpu = world.device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time the wait for a batch."""
        began = time.monotonic()
        with record_function(DATA):
            yield
        self._seconds["data"] += time.monotonic() - began

    def forward(self) -> AbstractContextManager[None]:
        """Time a forward pass."""
        return self._computation("forward")

    def backward(self) -> AbstractContextManager[None]:
        """Time a backward pass, with the exchange of gradients that it waits for."""
        return self._computation("backward")

    def update(self) -> AbstractContextManager[None]:
        """Time an update of the weights, with the clipping before it."""
        return self._computation("update")

    @contextmanager
    def _computation(self, phase: str) -> Iterator[None]:
        if self._on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((phase, first, last))
            return
        began = time.monotonic()
        yield
        self._seconds[phase] += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out a wait for other ranks in a forward pass. On a GPU the host does not wait."""
        began = time.monotonic()
        yield
        self._seconds["forward"] -= 0 if self._on_gpu else time.monotonic() - began

    def read(self) -> dict[str, float]:
        """Return seconds by phase since the last read. The last update must be complete."""
        seconds = self._seconds
        for phase, first, last in self._events:
            seconds[phase] += first.elapsed_time(last) / 1000
        self._seconds, self._events = dict.fromkeys(_TIMED, 0.0), []
        return seconds


class Stragglers:
    """Warns about a rank that is slow for three consecutive windows, once per slow period."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._window, self._steps, self._wall_s = torch.zeros(world.world_size, len(PHASES)), 0, 0.0
        self._total = torch.zeros(world.world_size, len(_TIMED), dtype=torch.float64)
        self._total_steps = 0
        self._suspect: tuple[int, str] | None = None
        self._windows = 0

    def row(self, seconds: dict[str, float], steps: int, wall_s: float) -> dict[str, float]:
        """Collective. Add a window. Return seconds per step of this rank, and the slowest rank.

        seconds: this rank's seconds by phase over `steps` steps, which took wall_s seconds.
        """
        if steps == 0:
            return {}
        row = {f"time/{phase}_s": seconds[phase] / steps for phase in _TIMED if phase != "data"}
        if self._world.world_size == 1:
            return row
        timed = [seconds[phase] for phase in _TIMED]
        mine = torch.tensor(timed, dtype=torch.float32, device=self._world.device)
        all_parts = all_gather(mine, self._world).cpu()
        self._total, self._total_steps = self._total + all_parts, self._total_steps + steps
        found = all_parts[:, : len(PHASES)]
        self._window += found
        self._steps, self._wall_s = self._steps + steps, self._wall_s + wall_s
        if self._steps >= _STEPS:
            self.judge(self._window / self._steps, self._wall_s / self._steps)
            self._window, self._steps, self._wall_s = torch.zeros_like(self._window), 0, 0.0
        return row | {"train/slowest_rank": int(found.sum(1).argmax())}

    def write(self, file: Path) -> None:
        """Write the mean seconds per step of each rank, on rank 0 of several ranks.

        If that fails, log a warning.
        """
        if not self._world.is_main or self._total_steps == 0:
            return
        seconds = (self._total / self._total_steps).tolist()
        content = {"num_steps": self._total_steps, "phases": list(_TIMED), "seconds": seconds}
        try:
            write_json(file, content)
        except OSError as error:
            log.warning("%s could not be written: %s", file, error.strerror or error)

    def judge(self, seconds: Tensor, step_s: float) -> str | None:
        """Look at one window. Return its warning if there is one.

        seconds: float [ranks, phases] per step; step_s: seconds per step.
        """
        behind = seconds - seconds.median(0).values  # of two ranks the faster one is the median
        rank, phase = divmod(int(behind.argmax()), len(PHASES))
        slow = (rank, PHASES[phase]) if behind.max() > _SHARE * step_s else None
        self._windows = self._windows + 1 if slow == self._suspect else 1
        self._suspect = slow
        if slow is None or self._windows != _WINDOWS:
            return None
        late, usual = 1000 * float(seconds[rank, phase]), 1000 * float(seconds[:, phase].median())
        warning = (
            f"rank {rank} is slow in {PHASES[phase]}: {late:.0f} ms a step where the others take "
            f"{usual:.0f}, of steps of {1000 * step_s:.0f} ms"
        )
        log.warning(warning)
        return warning
