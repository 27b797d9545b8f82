"""Knobs of a run: its name, its length, its batches, its checkpoints, its loggers."""

import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from alexnet_ddp.config.checks import MISSING, positive, require, shown, within

_MAX_NAME = 200  # bytes; a file name may have 255, and drafts of a file add up to 40 to its name
_MAX_BUCKET_MB = 1_000_000  # torch counts bytes in 64 bits
AUTO = "auto"  # where a number may stand, and the program finds it


class Device(StrEnum):
    auto = "auto"  # cuda where there is one
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnNan(StrEnum):
    """What becomes of a step whose loss or gradient is not finite. None of it is ever applied."""

    stop = "stop"  # end with 70; the state before the step is saved
    skip = "skip"  # go on without it
    rollback = "rollback"  # go on behind it, from the weights of the newest checkpoint


class Wandb(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True)
class RunConfig:
    """A run is its name: the same name is the same directory, and goes on where it was."""

    name: str = MISSING  # by default DATA-MODEL, see name.py
    root: str = "runs"  # the run's directory is root/name

    def __post_init__(self) -> None:
        bad = not self.name or self.name in (".", "..") or "/" in self.name
        require(
            not bad,
            f"run.name ({shown(self.name)!r}) must name one directory below run.root ({self.root})",
        )
        rule = "must not begin or end with a space: it could not be told from another name"
        require(self.name == self.name.strip(), f"run.name ({self.name!r}) {rule}")
        size = len(os.fsencode(self.name))
        rule = f"is {size} bytes long; a run has a directory of that name, give at most {_MAX_NAME}"
        require(size <= _MAX_NAME, f"run.name ({shown(self.name)}) {rule}")


class WireDtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Hook(StrEnum):
    """What becomes of the gradients on their way between the ranks."""

    none = "none"
    fp16 = "fp16"  # rounded to 16 bits before they are added: half of the bytes
    bf16 = "bf16"
    powersgd = "powersgd"  # a product of two thin matrices in place of each matrix: few bytes, other mathematics
    post_local_sgd = (
        "post_local_sgd"  # ranks learn alone, or by nodes, and become their mean every few steps
    )


@dataclass(kw_only=True)
class ParallelConfig:
    """How replicas stay equal."""


@dataclass(kw_only=True)
class AutoParallelConfig(ParallelConfig):
    """What alexnet_ddp.plan predicts to be fastest on these ranks: ddp, or hybrid with a group size. It says why."""


@dataclass(kw_only=True)
class DDPConfig(ParallelConfig):
    """Gradients are summed over the ranks while the backward pass runs."""

    bucket_mb: float | None = None  # of gradients that are sent together, MiB; null: torch's 25
    hook: Hook = Hook.none
    powersgd_rank: int | None = None  # columns of the thin matrices; null: 4
    powersgd_start_step: int | None = None  # before it whole gradients are sent; null: 100
    local_sgd_period: int | None = None  # steps from one mean of all ranks to the next; null: 8
    local_sgd_start_step: int | None = None  # before it all ranks learn together; null: 100
    local_sgd_group: int | None = (
        None  # ranks that go on together; null: those of a node, each alone on one node
    )
    static_graph: bool = False  # all steps use the same parameters: DDP may then search less

    def __post_init__(self) -> None:
        of_powersgd = ("powersgd_rank", "powersgd_start_step")
        of_local_sgd = ("local_sgd_period", "local_sgd_start_step", "local_sgd_group")
        for hook, names in ((Hook.powersgd, of_powersgd), (Hook.post_local_sgd, of_local_sgd)):
            for name in names:
                idle = getattr(self, name) is not None and self.hook is not hook
                rule = f"would be ignored with parallel.hook={self.hook.value}; leave it null"
                require(not idle, f"parallel.{name} {rule}")
        within("parallel", self, 0, _MAX_BUCKET_MB, "bucket_mb")
        positive(
            "parallel", self, "bucket_mb", "powersgd_rank", "local_sgd_period", "local_sgd_group"
        )
        start = self.local_sgd_start_step
        require(
            start is None or start >= 0,
            f"parallel.local_sgd_start_step ({start}) must not be negative",
        )
        start = self.powersgd_start_step
        rule = "must be at least 2: DDP lays out its buckets anew behind the first step"
        require(start is None or start >= 2, f"parallel.powersgd_start_step ({start}) {rule}")


@dataclass(kw_only=True)
class HybridConfig(ParallelConfig):
    """DDP, but large linear layers are split over a group of ranks: activations travel in place of their gradients."""

    bucket_mb: float | None = (
        2.0  # MiB: a convolution's gradient leaves while the next one's is computed
    )
    # Ranks that share one set of the split layers. null: a node's GPUs, or all CPU ranks; auto: what plan predicts best
    group_size: Any = None
    split: list[str] | None = (
        None  # names of the layers, such as [classifier.1, classifier.4]; null: by their size
    )
    wire_dtype: WireDtype = WireDtype.fp32  # of the activations on the way between the ranks

    def __post_init__(self) -> None:
        size = self.group_size
        is_number = isinstance(size, int) and not isinstance(size, bool) and size > 0
        rule = "must be a number of ranks greater than 0, auto, or null"
        require(size in (None, AUTO) or is_number, f"parallel.group_size ({size}) {rule}")
        within("parallel", self, 0, _MAX_BUCKET_MB, "bucket_mb")
        positive("parallel", self, "bucket_mb")


@dataclass(kw_only=True)
class TrainerConfig:
    epochs: int = MISSING
    max_steps: int | None = (
        None  # end after so many optimizer steps, however many epochs are asked for
    )
    global_batch_size: int = MISSING  # images per optimizer step, over all ranks
    micro_batch_size: int | None = (
        None  # images per forward pass, on one rank; null: its whole slice at once
    )
    eval_batch_size: int = (
        64  # images per forward pass of an evaluation, the same for every world size
    )
    drop_last: bool = (
        False  # true: leave out the incomplete last batch of an epoch, as the references do
    )
    precision: Precision = Precision.fp32  # bf16 and fp16: autocast, on GPUs
    tf32: bool = True  # on GPUs, fp32 products by TF32
    compile: bool = False  # torch.compile
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    ema_decay: float | None = (
        None  # evaluate, and predict with, a moving average of the weights; null: the weights
    )
    on_nan: OnNan = OnNan.stop
    spike_factor: float | None = (
        20.0  # warn of a loss above so many medians of the steps before it; null: never
    )
    check_every_steps: int | None = (
        1000  # compare the replicas so often, and before the first step; null: never
    )
    metrics: list[str] = field(default_factory=list)  # of plugins: val/NAME of each evaluation
    callbacks: list[str] = field(default_factory=list)  # of plugins, called in this order
    log_every_steps: int = 10
    eval_every_epochs: int = 1
    hang_timeout_s: float | None = (
        30.0  # without progress, or 10 slow steps if that is more; null: wait for ever
    )

    def __post_init__(self) -> None:
        sizes = (
            "global_batch_size",
            "micro_batch_size",
            "eval_batch_size",
            "clip_grad_norm",
            "hang_timeout_s",
        )
        positive(
            "trainer", self, "epochs", "max_steps", "log_every_steps", "eval_every_epochs", *sizes
        )
        positive("trainer", self, "check_every_steps")
        spike = self.spike_factor
        require(
            spike is None or spike > 1,
            f"trainer.spike_factor ({spike}) must be greater than 1, or null",
        )
        decay = self.ema_decay
        require(
            decay is None or 0 < decay < 1,
            f"trainer.ema_decay ({decay}) must lie in (0, 1), or be null",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"trainer.label_smoothing ({self.label_smoothing}) must lie in [0, 1)",
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    """Beside these: at the end of each epoch, at the end of the run, and on a stop signal."""

    save_every_steps: int | None = None
    save_every_minutes: float | None = 5.0
    keep_last: int = 2  # the best one is kept as well
    keep_every_epochs: int | None = None  # and those at the end of every so many epochs
    copy_to: str | None = (
        None  # URL of a folder: copies go to URL/NAME, and come from there where there is none here
    )

    def __post_init__(self) -> None:
        counts = ("keep_last", "keep_every_epochs")
        positive("checkpoint", self, "save_every_steps", "save_every_minutes", *counts)


@dataclass(kw_only=True)
class ResumeConfig:
    allow_changes: bool = (
        False  # go on although the model, the data or the batch is not what the checkpoint had
    )


@dataclass(kw_only=True)
class LoggerConfig:
    """metrics.jsonl and plain lines are always written; these come on top."""

    wandb: Wandb = Wandb.disabled
    wandb_project: str = "alexnet_ddp"
    tensorboard: bool = True
    progress: bool = True  # a progress bar where the output is a terminal
