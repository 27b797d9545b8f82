"""Logs a run to the console, metrics.jsonl, TensorBoard and wandb. Other ranks than 0 log nothing.

Only metrics.jsonl must work. If another sink fails, a warning is printed and the sink is disabled.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from alexnet_ddp.config import LoggerConfig
from alexnet_ddp.runtime.errors import RunError
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.tracking.classes import ClassResults, Examples
from alexnet_ddp.tracking.console import Console, best_text, build_console, headline
from alexnet_ddp.tracking.histograms import Histogram
from alexnet_ddp.tracking.record import (
    RunStatus,
    code_facts,
    make_run_dir,
    record_run,
    run_status,
    write_status,
)
from alexnet_ddp.tracking.sinks import JsonlSink, TensorBoardSink
from alexnet_ddp.tracking.wandb_settings import (
    check_wandb,
    init_arguments,
    wandb_mode,
    wandb_name,
)
from alexnet_ddp.tracking.wandb_sink import WandbSink

__all__ = [
    "ClassResults",
    "Examples",
    "RunInfo",
    "RunStatus",
    "Tracker",
    "best_text",
    "build_tracker",
    "check_wandb",
    "headline",
    "make_run_dir",
    "record_run",
    "run_status",
    "wandb_mode",
    "write_status",
]


@dataclass(frozen=True)
class RunInfo:
    """Facts about the run that the sinks need.

    config, config_yaml: the configuration, resolved, as JSON types and as text. facts: about this
    start, such as the number of ranks.
    """

    is_main: bool
    start_step: int
    total_steps: int
    steps_per_epoch: int
    config: dict[str, Any] = field(default_factory=dict)
    config_yaml: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """A destination of rows that the run can do without."""

    name: str

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None: ...
    def image(self, name: str, pixels: np.ndarray) -> None: ...
    def classes(self, results: ClassResults) -> None: ...
    def examples(self, examples: Examples) -> None: ...
    def histograms(self, step: int, found: dict[str, Histogram]) -> None: ...
    def close(self, exit_code: int, message: str) -> None: ...


class Tracker:
    """Sends each row to all sinks. On ranks other than 0 every method is a no-op."""

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
        """Write config.yaml, classes.json and run.json: see record_run."""
        if self._record:
            record_run(self._run_dir, config_yaml, facts, classes)

    def log(self, step: int, epoch: float, metrics: dict[str, float | str]) -> None:
        """Write one row. epoch: passes over the data, fractional. Raises no error of a sink."""
        if self._record:
            self._record.write(step, epoch, metrics)
        for sink in list(self._sinks):
            self._attempt(sink, partial(sink.write, step, epoch, metrics))
        if self._console:
            self._console.write(step, epoch, metrics)

    def image(self, name: str, pixels: np.ndarray) -> None:
        """Show a picture, uint8 [height, width, 3]. Raises no error of a sink."""
        for sink in list(self._sinks):
            self._attempt(sink, partial(sink.image, name, pixels))

    @property
    def shows_classes(self) -> bool:
        """Return whether classes() and examples() would show anything on this rank."""
        return bool(self._sinks)

    def classes(self, results: ClassResults) -> None:
        """Show the results of an evaluation by class. Raises no error of a sink."""
        for sink in list(self._sinks):
            self._attempt(sink, partial(sink.classes, results))

    def examples(self, examples: Examples) -> None:
        """Show the images with the largest losses. Raises no error of a sink."""
        for sink in list(self._sinks):
            self._attempt(sink, partial(sink.examples, examples))

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """Show histograms by name. Raises no error of a sink."""
        for sink in list(self._sinks):
            self._attempt(sink, partial(sink.histograms, step, found))

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`. Takes microseconds: call it at every step."""
        if self._console:
            self._console.advance(step)

    def say(self, text: str) -> None:
        """Print one line for the user."""
        if self._console:
            self._console.say(text)

    def close(self, exit_code: int, message: str = "") -> None:
        """Flush and close all sinks: takes seconds, with a slow server up to 75 s.

        Further calls do nothing.

        exit_code: the code that the run will exit with. message: the error that ended it, if any.
        """
        sinks, self._sinks = self._sinks, []
        record, self._record = self._record, None
        if record:
            record.close(exit_code)
        for sink in sinks:
            self._attempt(sink, partial(sink.close, exit_code, message))
        if self._console:
            self._console.close(exit_code)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close(0)
            return
        code = error.exit_code if isinstance(error, RunError) else 1
        name = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        self.close(code, f"{name}{error}")

    def add(self, name: str, build: Callable[[], Sink]) -> None:
        """Add the sink that `build` returns. If it raises, print a warning and continue without."""
        try:
            self._sinks.append(build())
        except Exception as error:
            self._warn_disabled(name, error)

    def _attempt(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._sinks = [other for other in self._sinks if other is not sink]
            self._warn_disabled(sink.name, error)

    def _warn_disabled(self, name: str, error: Exception) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.say(f"warning: {name} failed ({text}) and is disabled; the run continues")


def build_tracker(
    cfg: LoggerConfig,
    run_dir: Path,
    run: RunInfo,
    on_stop: Callable[[], None] = lambda: None,
    is_urgent: Callable[[], bool] = lambda: False,
) -> Tracker:
    """Return the tracker of this rank. Rank 0 drops the rows of metrics.jsonl after run.start_step.

    on_stop: called in a thread if a service asks the run to stop.
    is_urgent: returns whether the process may be killed soon: close() then waits 10 s at most.

    Raises OSError if metrics.jsonl cannot be written.
    """
    if not run.is_main:
        return Tracker(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    console = build_console(cfg.progress, run.start_step, run.total_steps, run.steps_per_epoch)
    record = JsonlSink(run_dir / "metrics.jsonl", run.start_step, console.say)
    tracker = Tracker(run_dir, console, record)
    if cfg.tensorboard:
        arguments = run_dir / "tensorboard", run.start_step, run.config, run.config_yaml
        earlier = RunRecord(run_dir, run_dir.name)  # rows after start_step are dropped
        tracker.add(
            TensorBoardSink.name,
            lambda: TensorBoardSink(*arguments, earlier.rows.values()),
        )
    mode = wandb_mode(cfg.wandb)
    if mode != "disabled":
        spec = {
            "mode": mode,
            "name": wandb_name(run_dir),
            "config": run.config,
            "artifacts": cfg.wandb_artifacts.value,
            "offset": record.start_offset,
            "start_step": run.start_step,
            "program": sys.argv[0],
        }

        def build() -> WandbSink:
            spec["init"] = init_arguments(cfg, run_dir)
            spec["facts"] = code_facts() | run.facts
            return WandbSink(run_dir, spec, tracker.say, on_stop, is_urgent)

        tracker.add(WandbSink.name, build)
    return tracker
