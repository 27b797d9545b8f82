"""Profiles some steps of a run: a trace, the operators with the most time, and what bounds a step.

Writes into the directory profile/ of the run, for each profiled rank:

    rankN.trace.json.gz   for ui.perfetto.dev or chrome://tracing
    rankN.txt             the ten operators with the most time of their own
    rankN.json            the conclusion, and where the time of the steps went
    rankN.memory.pickle   on a GPU: for pytorch.org/memory_viz
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import write_json

log = logging.getLogger(__name__)

STEP, DATA = "alexnet_ddp.step", "alexnet_ddp.data"  # names of ranges in the trace
_COMMUNICATION = ("nccl", "gloo:", "c10d::")  # names of collectives begin with these
# Names of what computes on a CPU begin with these: operators, and the graphs of trainer.compile.
# Other events of a compiled network also contain Python.
_COMPUTE = ("aten::", "## Call CompiledFxGraph")
_NUM_OPERATORS = 10

Span = tuple[float, float]  # begin and end, in microseconds


@dataclass(frozen=True)
class TimeShares:
    """Where the time of the profiled steps went on this rank. The shares add up to 1.

    data: waiting for a batch. compute: operators, compiled graphs or kernels other than
    collectives.
    communication: collectives while nothing is computed. other: the rest, such as Python.
    """

    step_ms: float  # mean
    data: float
    compute: float
    communication: float
    other: float

    @property
    def conclusion(self) -> str:
        """One line that names the largest share."""
        reasons = {
            "data": "waits for images: more cores, data.num_threads, or shards",
            "communication": "waits for other ranks: a faster link, larger batches, or "
            "parallel=hybrid",
            "compute": "computes",
            "other": "does none of these: operators are too small to fill the device; larger "
            "batches or trainer.compile=true",
        }
        name = max(reasons, key=lambda one: float(getattr(self, one)))
        share = 100 * float(getattr(self, name))
        return f"bound by {name}: {share:.0f} % of a step of {self.step_ms:.1f} ms {reasons[name]}"

    @property
    def record(self) -> dict[str, str | float]:
        """The content of rankN.json, which `report` reads."""
        return {"conclusion": self.conclusion} | asdict(self)


class StepProfiler:
    """Profiles the steps [first, end) of a run on some ranks. On all others it does nothing.

    steps: None for no profile. ranks: the profiled ones. start: the step at which the run starts or
    resumes. total_steps: of the run. folder: for the files. Raises ConfigError if there is no such
    rank or no such step.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        ranks: list[int],
        start: int,
        total_steps: int,
        folder: Path,
        world: World,
    ) -> None:
        if steps is not None:
            _check(steps, ranks, total_steps, world)
            if start >= steps[1] and world.is_main:
                _warn_if_missed(steps, ranks, start, folder)
        is_profiled = steps is not None and start < steps[1] and world.rank in ranks
        self._steps = steps if is_profiled else None
        self._folder, self._world = folder, world
        self._profile: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context manager of step `step` (0-based)."""
        if self._profile is None and self._steps is not None and step in range(*self._steps):
            self._begin()
        if self._profile is None:
            yield
            return
        with record_function(STEP):
            yield

    def is_due(self, step: int) -> bool:
        """True if write() must be called now that `step` steps are complete."""
        return self._profile is not None and self._steps is not None and step >= self._steps[1]

    def write(self) -> None:
        """End the profile and write its files. This takes seconds.

        Files that cannot be written do not end the training: that is logged.
        """
        assert self._profile is not None
        self._profile.stop()
        found, self._profile, self._steps = self._profile, None, None
        shares, rank = time_shares(found), self._world.rank
        try:
            self._write_files(found, shares)
            log.info("profile of rank %d: %s; see %s", rank, shares.conclusion, self._folder)
        except OSError as error:
            rule = "its files cannot be written"
            log.warning("profile of rank %d: %s; %s: %s", rank, shares.conclusion, rule, error)
        if self._world.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write_files(self, found: profile, shares: TimeShares) -> None:
        """Write the files of this rank. Raises OSError."""
        self._folder.mkdir(exist_ok=True)
        stem, device = self._folder / f"rank{self._world.rank}", self._world.device.type
        found.export_chrome_trace(f"{stem}.trace.json.gz")
        order = f"self_{device}_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=_NUM_OPERATORS)
        Path(f"{stem}.txt").write_text(table)
        if device == "cuda":
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
        write_json(Path(f"{stem}.json"), shares.record)

    def close(self) -> None:
        """End a profile whose last step was not reached. Nothing is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        if self._steps is not None:
            log.warning("the run ended before the end of trainer.profile_steps: no profile")

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
            torch.cuda.synchronize()
        self._profile = profile(activities=activities)
        self._profile.start()


def _check(steps: tuple[int, int], ranks: list[int], total_steps: int, world: World) -> None:
    """Raise ConfigError if there is no such rank or no such step."""
    if max(ranks) >= world.world_size:
        rule = "must be less than the number of ranks"
        remedy = f"give ranks from 0 to {world.world_size - 1}"
        raise ConfigError(f"trainer.profile_ranks ({ranks}) {rule}; {remedy}")
    first, end = steps
    if end > total_steps:
        rule = f"must end at the last step of the run, {total_steps}, or before it"
        raise ConfigError(f"trainer.profile_steps ({first}:{end}) {rule}; give earlier steps")


def _warn_if_missed(steps: tuple[int, int], ranks: list[int], start: int, folder: Path) -> None:
    """Warn if the run resumes after the profiled steps, and an earlier start has no profile."""
    missing = [rank for rank in ranks if not (folder / f"rank{rank}.json").exists()]
    if missing:
        value = f"trainer.profile_steps ({steps[0]}:{steps[1]})"
        rule = f"the run resumes at step {start}, so there is no profile of ranks {missing}"
        log.warning("%s: %s; give later steps", value, rule)


def time_shares(found: profile) -> TimeShares:
    """The shares of a profile that has ended, with at least one range STEP."""
    steps, waits, collectives, operators = [], [], [], []
    on_gpu = any(event.device_type is torch.autograd.DeviceType.CUDA for event in found.events())
    for event in found.events():
        span = event.time_range.start, event.time_range.end
        is_kernel = event.device_type is torch.autograd.DeviceType.CUDA
        if event.name == STEP and not is_kernel:
            steps.append(span)
        elif event.name == DATA and not is_kernel:
            waits.append(span)
        elif event.name.startswith(_COMMUNICATION):
            if is_kernel is on_gpu:
                collectives.append(span)
        elif is_kernel if on_gpu else event.name.startswith(_COMPUTE):
            operators.append(span)
    wall = _union(steps)
    computed = _overlap(wall, _union(operators))
    waited = _without(_overlap(wall, _union(waits)), computed)
    sent = _without(_without(_overlap(wall, _union(collectives)), computed), waited)
    total = _length(wall)
    data, compute, communication = (_length(one) / total for one in (waited, computed, sent))
    other = max(0.0, 1 - data - compute - communication)
    return TimeShares(total / 1000 / len(steps), data, compute, communication, other)


def _union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans in order that cover the same times."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _overlap(some: list[Span], others: list[Span]) -> list[Span]:
    """The times in both. The arguments and the result are disjoint and in order."""
    found, i, k = [], 0, 0
    while i < len(some) and k < len(others):
        begin, end = max(some[i][0], others[k][0]), min(some[i][1], others[k][1])
        if begin < end:
            found.append((begin, end))
        if some[i][1] < others[k][1]:
            i += 1
        else:
            k += 1
    return found


def _without(some: list[Span], others: list[Span]) -> list[Span]:
    """The times in `some` and not in `others`."""
    edges = [-torch.inf, *(edge for span in others for edge in span), torch.inf]
    return _overlap(some, list(zip(edges[::2], edges[1::2])))


def _length(spans: list[Span]) -> float:
    return sum(end - begin for begin, end in spans)
