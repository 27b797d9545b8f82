"""One log() for a run: console, metrics.jsonl, TensorBoard, wandb. Its one rule: only rank 0 has them; no caller asks.

Only metrics.jsonl must work; another sink that fails says so in one line and is switched off.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from alexnet_ddp.config import LoggerConfig
from alexnet_ddp.tracking.console import Console, build_console, headline
from alexnet_ddp.tracking.record import (
    RunStatus,
    make_run_dir,
    read_classes,
    record_run,
    run_status,
    write_status,
)
from alexnet_ddp.tracking.sinks import JsonlSink, TensorBoardSink
from alexnet_ddp.tracking.wandb_sink import WandbSink, wandb_mode

__all__ = [
    "RunInfo",
    "RunStatus",
    "Tracker",
    "build_tracker",
    "headline",
    "make_run_dir",
    "read_classes",
    "record_run",
    "run_status",
    "write_status",
]


@dataclass(frozen=True)
class RunInfo:
    """What the sinks must know of the run. `config` is the resolved one, plain, for wandb."""

    name: str
    is_main: bool
    start_step: int
    total_steps: int
    steps_per_epoch: int
    config: dict[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    name: str

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None: ...
    def close(self, exit_code: int) -> None: ...


class Tracker:
    """One log() for a run. On ranks other than 0 it has no console and no sinks, and every call is a no-op."""

    def __init__(
        self, run_dir: Path, console: Console | None = None, record: JsonlSink | None = None
    ) -> None:
        self._run_dir = run_dir
        self._console = console
        self._record = record
        self._sinks: list[Sink] = []

    def record(
        self, config_yaml: str, facts: dict[str, Any], classes: dict[str, list[str]]
    ) -> None:
        """What this start of the run is: see record_run."""
        if self._record:
            record_run(self._run_dir, config_yaml, facts, classes)

    def log(self, step: int, epoch: float, metrics: dict[str, float | int | str]) -> None:
        """One row: `epoch` counts passes over the data, with their fraction; names as in the design's section 6."""
        if self._record:
            self._record.write(step, epoch, metrics)
        for sink in list(self._sinks):
            self._attempt(sink, lambda sink=sink: sink.write(step, epoch, metrics))
        if self._console:
            self._console.write(step, epoch, metrics)

    def advance(self, step: int) -> None:
        """Move the progress bar. Cheap enough for every step."""
        if self._console:
            self._console.advance(step)

    def say(self, text: str) -> None:
        """One line for the user."""
        if self._console:
            self._console.say(text)

    def close(self, exit_code: int) -> None:
        """Flush and finish, with the code that the run will exit with. Seconds at most; a second call does nothing."""
        sinks, self._sinks = self._sinks, []
        record, self._record = self._record, None
        if record:
            record.close(exit_code)
        for sink in sinks:
            self._attempt(sink, lambda sink=sink: sink.close(exit_code))
        if self._console:
            self._console.close(exit_code)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0 if error is None else getattr(error, "exit_code", 1))

    def add(self, name: str, build: Callable[[], Sink]) -> None:
        """A sink that may fail: without it, the run is the same."""
        try:
            self._sinks.append(build())
        except Exception as error:
            self._switched_off(name, error)

    def _attempt(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._sinks = [other for other in self._sinks if other is not sink]
            self._switched_off(sink.name, error)

    def _switched_off(self, name: str, error: Exception) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.say(f"warning: {name} failed ({text}) and is switched off; the run goes on")


def build_tracker(cfg: LoggerConfig, run_dir: Path, run: RunInfo) -> Tracker:
    """The tracker of this rank. On rank 0, metrics.jsonl is cut back to `run.start_step`.

    Errors: OSError if metrics.jsonl cannot be written.
    """
    if not run.is_main:
        return Tracker(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    console = build_console(cfg.progress, run.start_step, run.total_steps, run.steps_per_epoch)
    record = JsonlSink(run_dir / "metrics.jsonl", run.start_step, console.say)
    tracker = Tracker(run_dir, console, record)
    if cfg.tensorboard:
        tracker.add(
            TensorBoardSink.name, lambda: TensorBoardSink(run_dir / "tensorboard", run.start_step)
        )
    mode = wandb_mode(cfg.wandb.value)
    if mode != "disabled":
        spec = {"mode": mode, "project": cfg.wandb_project, "name": run.name, "config": run.config}
        spec |= {"offset": record.start_offset, "program": sys.argv[0]}
        tracker.add(WandbSink.name, lambda: WandbSink(run_dir, spec, tracker.say))
    return tracker
