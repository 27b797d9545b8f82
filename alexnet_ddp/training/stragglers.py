"""Times the parts of a step and the pauses between steps, and finds slow ranks.

After the first collective of a step all ranks have waited for the slowest one, so only the time
before it shows which rank is slow. The times are compared when a row is logged.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from alexnet_ddp.runtime.distributed import World, all_gather
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.training.profiler import DATA

log = logging.getLogger(__name__)

PHASES = ("data", "forward")  # before the first collective of a step
_TIMED = (*PHASES, "backward", "exchange", "update")
_PAUSES = ("evaluation", "checkpoint")  # between two steps
_SHARE = 0.2  # a rank is slow if it is later than the others by this share of a step
_WINDOWS = 3  # consecutive windows before a warning
_STEPS = 10  # fewest steps of a window: single steps vary too much


_Mark = Any  # float: seconds of the host's clock; on a GPU a torch.cuda.Event


class Stopwatch:
    """Seconds of this rank by phase; on a GPU also the device's, read when the host waits.

    Each second belongs to one phase. exchange: the rank waits for a collective and computes
    nothing.
    """

    def __init__(self, world: World) -> None:
        self._seconds = dict.fromkeys(_TIMED, 0.0)
        self._on_gpu = world.device.type == "cuda"
        self._events: list[tuple[str, str | None, _Mark, _Mark]] = []
        self._phase: str | None = None  # that is being timed
        self._gradients_at: _Mark = None  # when the last gradient of a backward pass was ready

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

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Time a backward pass. The time after gradients_ready() counts as exchange."""
        self._gradients_at = None
        with self._computation("backward"):
            yield
            if self._gradients_at is not None:
                self._add("exchange", self._gradients_at)

    def gradients_ready(self, parameter: Tensor) -> None:
        """For register_post_accumulate_grad_hook() of the parameter whose gradient comes last."""
        self._gradients_at = self._mark()

    def exchange(self) -> AbstractContextManager[None]:
        """Time a wait for a collective. Another phase that contains the wait does not count it."""
        return self._computation("exchange")

    def update(self) -> AbstractContextManager[None]:
        """Time an update of the weights, with the clipping before it."""
        return self._computation("update")

    @contextmanager
    def _computation(self, phase: str) -> Iterator[None]:
        outer, self._phase = self._phase, phase
        first = self._mark()
        yield
        self._phase = outer
        self._add(phase, first)

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, phase: str, first: _Mark) -> None:
        """Add the time from `first` to now to `phase`, and not to the phase that contains it."""
        last = self._mark()
        if self._on_gpu:
            self._events.append((phase, self._phase, first, last))
        else:
            self._count(phase, self._phase, last - first)

    def _count(self, phase: str, outer: str | None, seconds: float) -> None:
        self._seconds[phase] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds

    def read(self) -> dict[str, float]:
        """Return seconds by phase since the last read. The last update must be complete."""
        for phase, outer, first, last in self._events:
            self._count(phase, outer, first.elapsed_time(last) / 1000)
        seconds = self._seconds
        self._seconds, self._events = dict.fromkeys(_TIMED, 0.0), []
        return seconds


class Stragglers:
    """Warns about a rank that is slow for three consecutive windows, once per slow period.

    Also keeps the times of all ranks since the start of the process, for rank_times.json.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._window, self._steps, self._wall_s = torch.zeros(world.world_size, len(PHASES)), 0, 0.0
        self._total = torch.zeros(world.world_size, len(_TIMED), dtype=torch.float64)
        self._total_steps = 0
        self._pauses = dict.fromkeys(_PAUSES, 0.0)  # of this rank
        self._suspect: tuple[int, str] | None = None
        self._windows = 0

    def row(self, seconds: dict[str, float], steps: int, wall_s: float) -> dict[str, float]:
        """Collective. Add a window. Return seconds per step of this rank, and the slowest rank.

        seconds: this rank's seconds by phase over `steps` steps, which took wall_s seconds.
        """
        if steps == 0:
            return {}
        row = {  # a difference of times may be less than 0 by rounding
            f"time/{phase}_s": max(0.0, seconds[phase]) / steps
            for phase in _TIMED
            if phase != "data"
        }
        if self._world.world_size == 1:
            del row["time/exchange_s"]
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

    def pause(self, part: str, seconds: float) -> None:
        """Add seconds that this rank has spent on an "evaluation" or a "checkpoint"."""
        self._pauses[part] += seconds

    def write(self, file: Path, num_new_steps: int) -> None:
        """Collective. Write the mean seconds per step of each rank, on rank 0 of several ranks.

        Pauses are divided by the number of steps, too. If the file cannot be written, log a
        warning.

        num_new_steps: steps since the last row().
        """
        if self._world.world_size == 1 or self._total_steps == 0:
            return
        mine = torch.tensor(
            list(self._pauses.values()), dtype=torch.float32, device=self._world.device
        )
        pauses = all_gather(mine, self._world).cpu().double()
        if not self._world.is_main:
            return
        num_steps = self._total_steps + num_new_steps
        parts = [self._total / self._total_steps, pauses / num_steps]
        seconds = torch.cat(parts, 1).tolist()
        phases = [*_TIMED, *_PAUSES]
        content = {"num_steps": self._total_steps, "phases": phases, "seconds": seconds}
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
