"""Prints a run's progress: a bar on a terminal, plain lines otherwise. Never stops the run."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Group
from rich.live import Live
from rich.progress import Progress, TimeElapsedColumn
from rich.text import Text

from alexnet_ddp.config import Config, OptimizerConfig, Scaling
from alexnet_ddp.config.plugins import PluginOptimizerConfig, TorchOptimizerConfig
from alexnet_ddp.runtime.accuracy import intervals_text
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.terminal import BarColumn, MofNCompleteColumn, TimeRemainingColumn, column
from alexnet_ddp.runtime.terminal import Console as TerminalConsole


class Console(Protocol):
    """Prints rows and messages of a run. No method raises OSError."""

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None: ...
    def advance(self, step: int) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self, exit_code: int) -> None: ...


def build_console(
    progress: bool, start_step: int, total_steps: int, steps_per_epoch: int
) -> Console:
    """Return a BarConsole if `progress` and stdout is a terminal, else a PlainConsole."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    if progress and terminal:
        return BarConsole(start_step, total_steps, steps_per_epoch)
    return PlainConsole(total_steps)


class PlainConsole:
    """Prints one flushed line per row to stdout."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        train = train_text(metrics)
        if train:
            self.say(f"step {step}/{self._total_steps}  epoch {epoch:.2f}  {train}")
        if eval_text(metrics):
            self.say(f"epoch {_epoch(epoch)}  {eval_text(metrics)}")

    def advance(self, step: int) -> None:
        return

    def say(self, text: str) -> None:
        with suppress(OSError):  # stdout may be a file on a disk that is full for a while
            say(redact(text))

    def close(self, exit_code: int) -> None:
        return


class BarConsole:
    """Shows two live lines: the bar, and the last training and evaluation rows.

    Messages and evaluations are printed above them.
    """

    def __init__(self, start_step: int, total_steps: int, steps_per_epoch: int) -> None:
        self._step = start_step
        self._steps_per_epoch = max(1, steps_per_epoch)
        self._train = self._eval = ""
        self._closed = False
        remaining = (column("ETA"), TimeRemainingColumn())
        columns = (column("step"), MofNCompleteColumn(), BarColumn(), column("{task.description}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), *remaining, speed_estimate_period=60)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)
        self._console = TerminalConsole()
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def _render(self) -> Group:
        """Called by the refresh thread, so that advance() only stores a number."""
        description = f"epoch {self._step / self._steps_per_epoch:.2f}"
        self._bar.update(self._task, completed=self._step, description=description)
        rows = "  |  ".join(text for text in (self._train, self._eval) if text)
        return Group(self._bar.get_renderable(), Text(rows, no_wrap=True, overflow="ellipsis"))

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        self.advance(step)
        self._train = train_text(metrics) or self._train
        text = eval_text(metrics)
        if text:
            self._eval = f"val/top1 {metrics['val/top1']:.2f}" if "val/top1" in metrics else ""
            self.say(f"epoch {_epoch(epoch)}  {text}")

    def advance(self, step: int) -> None:
        """The first step starts the bar."""
        self._step = step
        if not self._live.is_started and not self._closed:
            self._show(self._live.start)
            # Live hides the cursor; a killed process could not restore it.
            self._show(lambda: self._console.show_cursor(True))

    def say(self, text: str) -> None:
        self._show(lambda: self._console.print(Text(printable(redact(text))), soft_wrap=True))

    def close(self, exit_code: int) -> None:
        self._show(self._live.stop)
        self._closed = True

    def _show(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError:  # the terminal was closed: continue without output
            self._closed = True


def train_text(metrics: dict[str, Any]) -> str:
    """Return `loss 1.2034  top1 57.2  lr 0.0200  1,234 img/s`; "" for a row without train/*.

    With a GPU whose peak is known also `mfu 34.1 %`, with a counter of energy `0.215 J/img`.
    """
    formats = {
        "train/loss": "loss {:.4f}",
        "train/top1": "top1 {:.1f}",
        "train/grad_norm": "grad {:.3g}",
    }
    parts = [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
    if "train/lr" in metrics:
        lr = metrics["train/lr"]
        parts.append(f"lr {lr:.4f}" if lr >= 1e-3 or lr == 0 else f"lr {lr:.2e}")
    if "train/images_per_sec" in metrics:
        parts.append(f"{metrics['train/images_per_sec']:,.0f} img/s")
    if "train/mfu" in metrics:
        parts.append(f"mfu {metrics['train/mfu']:.1f} %")
    if "train/joules_per_image" in metrics:
        parts.append(f"{metrics['train/joules_per_image']:.3g} J/img")
    if metrics.get("data/num_bad_images"):
        parts.append(f"{metrics['data/num_bad_images']:,} bad images")
    return "  ".join(parts)


def eval_text(metrics: Mapping[str, Any]) -> str:
    """Return `val/top1 88.10  val/loss 0.40  (1,000 images)`; "" for a row without val/*."""
    names = [name for name in ("val/top1", "val/top5", "val/loss") if name in metrics]
    parts = [f"{name} {metrics[name]:.2f}" for name in names]
    if parts and "val/num_images" in metrics:
        parts.append(f"({metrics['val/num_images']:,} images)")
    return "  ".join(parts)


def best_text(best: Mapping[str, Any]) -> str:
    """Return a line about the best evaluation of a run, with its 95 % intervals.

    best: its step and metrics. Returns "" if it has no metrics.
    """
    text = eval_text(best)
    parts = (f"best evaluation: step {best.get('step')}", text, intervals_text(best))
    return "  ".join(filter(None, parts)) if text else ""


def _epoch(epoch: float) -> str:
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


def headline(
    cfg: Config,
    world: World,
    parameters: int,
    counts: tuple[int, int, int],
    warmup_steps: int,
    progress: str,
) -> str:
    """Return the first line of a run: data, network, global batch, recipe and progress.

    parameters: their number. counts: of training images, validation images and classes.
    progress: text, such as the step to resume from.
    """
    trainer = cfg.trainer
    num_train, num_val, num_classes = counts
    largest = -(-trainer.global_batch_size // world.world_size)  # slice of any rank
    micro = min(largest, trainer.micro_batch_size or largest)
    num_micro = -(-largest // micro)
    first, size = cfg.data.start_image_size, cfg.data.image_size
    decay = trainer.ema_decay
    weights = "" if decay is None else f"; evaluates averaged weights (trainer.ema_decay={decay})"
    growth = "" if first is None else f" growing from {first} to {size} pixels"
    return (
        f"{cfg.run.name}: {parameters:,} parameters, {num_train:,} + {num_val:,} images of "
        f"{num_classes} classes{growth}; global batch {trainer.global_batch_size} = "
        f"{world.world_size} {world.device.type} rank(s) x {num_micro} x {micro}; "
        f"{recipe(cfg, warmup_steps)}{weights}; {progress}; {cfg.run_dir}"
    )


def recipe(cfg: Config, warmup_steps: int) -> str:
    """Return the epochs, the optimizer and the learning-rate schedule as text."""
    optimizer, schedule = (
        type(part).__name__.removesuffix("Config") for part in (cfg.optimizer, cfg.scheduler)
    )
    if isinstance(cfg.optimizer, TorchOptimizerConfig | PluginOptimizerConfig):
        optimizer = cfg.optimizer.name
    rate = learning_rate(cfg.optimizer, cfg.trainer.global_batch_size)
    warmup = f" after {warmup_steps} steps of warm-up" if warmup_steps else ""
    return f"{cfg.trainer.epochs} epochs of {optimizer}, {rate}, {schedule}{warmup}"


def learning_rate(cfg: OptimizerConfig, global_batch_size: int) -> str:
    """Return the learning rate as text, with the scaling rule if there is one."""
    lr, base = f"lr {cfg.lr_at(global_batch_size):g}", cfg.base_batch_size
    match cfg.scaling:
        case Scaling.linear:
            return f"{lr} = {cfg.lr:g} x {global_batch_size} / {base}"
        case Scaling.sqrt:
            return f"{lr} = {cfg.lr:g} x sqrt({global_batch_size} / {base})"
    return lr
