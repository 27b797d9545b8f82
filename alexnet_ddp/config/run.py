"""Options of train, doctor, replay and lr-find that belong to no data, network or optimizer."""

import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from alexnet_ddp.config.data import (
    AugmentConfig,
    DataConfig,
    NoAugmentConfig,
    check_class_weights,
)
from alexnet_ddp.config.finetune import FinetuneConfig, Method
from alexnet_ddp.config.logger import LoggerConfig
from alexnet_ddp.config.option import MAX_SEED, MISSING, Options, key_of, option, shown
from alexnet_ddp.config.parallel import (
    DDPConfig,
    Hook,
    HybridConfig,
    ParallelConfig,
    WireDtype,
)
from alexnet_ddp.config.recipe import (
    Head,
    LARSConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
)
from alexnet_ddp.runtime.errors import ConfigError

# A file name may have 255 bytes, and temporary names add up to 40.
_MAX_NAME_BYTES = 200
_MAX_PROFILED = 1000  # steps: their events are kept in memory


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class BestBy(StrEnum):
    """By which result of an evaluation the best checkpoint is chosen."""

    top1 = "top1"
    loss = "loss"


class OnNan(StrEnum):
    """What happens after a step whose loss or gradient is not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


def check_directory_name(option: str, value: str, root: str) -> None:
    """Raise ConfigError unless `value`, of an option, can be the name of a directory in `root`."""
    name = f"{option} ({shown(value)!r})"
    if value in ("", ".", "..") or "/" in value:
        raise ConfigError(f"{name} must name one directory below run.root ({root})")
    if value != value.strip():
        rule = "must not begin or end with a space: it would look like another name"
        raise ConfigError(f"{name} {rule}; leave the space out")
    size = len(os.fsencode(value))
    if size > _MAX_NAME_BYTES:
        rule = "a run has a directory of that name"
        remedy = f"give at most {_MAX_NAME_BYTES}"
        raise ConfigError(f"{option} ({shown(value)}) is {size} bytes long; {rule}, {remedy}")


@dataclass(kw_only=True)
class RunConfig(Options, section="run"):
    """The directory of a run. The same name is the same directory, and resumes."""

    name: str = option(
        MISSING,
        "Name of the run. train resumes the run with this name, if there is one.",
        null="DATA-MODEL, such as photos-resnet18; in a sweep of wandb, SWEEP-ID",
        selects=True,
    )
    root: str = option(
        "runs", "Folder of all runs: the run's directory is run.root/run.name.", selects=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_directory_name("run.name", self.name, self.root)


def refuse_two_networks(run: RunConfig, other: str, overrides: list[str]) -> None:
    """Raise ConfigError if `overrides` give run.name beside the option `other`, also a network."""
    if "run.name" in map(key_of, overrides):
        rule = f"run.name ({run.name}) and {other} are two networks"
        raise ConfigError(f"{rule}; give one of them")


@dataclass(kw_only=True)
class TrainerConfig(Options, section="trainer"):
    """The length of the run, its batches, and what is checked and logged."""

    epochs: int = option(
        MISSING, "Passes over the training images.", unit="epochs", minimum=1, may_change=True
    )
    max_steps: int | None = option(
        None,
        "End the run after this many optimizer steps, even if trainer.epochs are not complete. "
        "The learning rate follows trainer.epochs all the same, so a larger number continues the "
        "run.",
        unit="steps",
        null="no limit",
        minimum=1,
        may_change=True,
    )
    global_batch_size: int = option(
        MISSING, "Images per optimizer step, summed over all ranks.", unit="images", minimum=1
    )
    micro_batch_size: int | None = option(
        None,
        "Images per forward pass of a rank; gradients are accumulated over the passes of a step.",
        unit="images",
        null="the rank's whole share of the batch",
        minimum=1,
        may_change=True,
    )
    eval_batch_size: int = option(
        64,
        "Images per forward pass in evaluation, independent of the number of ranks.",
        unit="images",
        minimum=1,
        may_change=True,
    )
    drop_last: bool = option(
        False, "Leave out the incomplete last batch of an epoch, as torchvision's references do."
    )
    precision: Precision = option(
        Precision.fp32, "Type of the forward and backward pass. bf16 and fp16: autocast, on GPUs."
    )
    tf32: bool = option(True, "On GPUs, compute fp32 products with TF32.", may_change=True)
    compile: bool = option(False, "Compile the network with torch.compile.", may_change=True)
    label_smoothing: float = option(
        0.0, "Label smoothing of the cross entropy.", minimum=0, below=1
    )
    class_weights: Any = option(
        None,
        "Weight of each class in the training loss. The loss is divided by the sum of the weights "
        "over the global batch. balanced: inversely proportional to the class's number of "
        "training images; numbers: one per class in the order of labels. val/loss is not weighted.",
        kind="balanced, or a list of numbers",
        null="all classes count alike",
    )
    clip_grad_norm: float | None = option(
        None, "Clip the gradient to this norm.", null="no clipping", above=0
    )
    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average of the weights, which is evaluated in their place.",
        null="no average",
        above=0,
        below=1,
    )
    on_nan: OnNan = option(
        OnNan.stop,
        "What happens if a loss or gradient is not finite; such a step is never applied. stop: "
        "save and exit with code 70; skip: continue without the step; rollback: continue after "
        "it, with the weights of the newest checkpoint.",
        may_change=True,
    )
    spike_factor: float | None = option(
        20.0,
        "Warn if the loss exceeds this multiple of the recent median.",
        null="no warning",
        above=1,
        may_change=True,
    )
    check_every_steps: int | None = option(
        1000,
        "Interval of the check that all replicas are equal; it also runs before the first step.",
        unit="steps",
        null="no check",
        minimum=1,
        may_change=True,
    )
    metrics: list[str] = option(
        [],
        "Metrics of plugins; each evaluation reports them as val/NAME. See docs/extending.md.",
        may_change=True,
    )
    callbacks: list[str] = option(
        [],
        "Callbacks of plugins, in the order in which they are called. See docs/extending.md.",
        may_change=True,
    )
    log_every_steps: int = option(
        10, "Interval of logged metrics.", unit="steps", minimum=1, may_change=True
    )
    eval_every_epochs: int = option(
        1, "Interval of evaluations.", unit="epochs", minimum=1, may_change=True
    )
    eval_every_steps: int | None = option(
        None,
        "Interval of evaluations, in place of trainer.eval_every_epochs.",
        unit="steps",
        null="trainer.eval_every_epochs",
        minimum=1,
        may_change=True,
    )
    patience: int | None = option(
        None,
        "End the run after this many evaluations in a row that are not the best so far.",
        unit="evaluations",
        null="no early end",
        minimum=1,
        may_change=True,
    )
    max_hours: float | None = option(
        None,
        "End the run, with an evaluation and a checkpoint, after this time in training. All "
        "starts of the run count.",
        unit="hours",
        null="no limit",
        above=0,
        may_change=True,
    )
    hang_timeout_s: float | None = option(
        30.0,
        "End the run if a rank makes no progress for this time, or for 10 slow steps if that is "
        "longer.",
        unit="seconds",
        null="no limit",
        above=0,
        may_change=True,
    )

    profile_steps: str | None = option(
        None,
        "Profile these steps, FIRST:END as in a slice: 100:110 are the ten steps after step 100. "
        "Writes profile/ into the run's directory.",
        null="no profile",
        may_change=True,
    )
    profile_ranks: list[int] = option(
        [0], "With trainer.profile_steps, the ranks to profile.", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_profile()
        if self.eval_every_steps is not None and self.eval_every_epochs != 1:
            both = f"trainer.eval_every_epochs ({self.eval_every_epochs})"
            rule = f"would be ignored with trainer.eval_every_steps ({self.eval_every_steps})"
            raise ConfigError(f"{both} {rule}; give one of them")
        if self.class_weights is not None:
            path = "trainer.class_weights"
            self.class_weights = check_class_weights(path, self.class_weights, ("balanced",))
            if isinstance(self.class_weights, list) and 0 in self.class_weights:
                rule = "must be greater than 0; leave images of a class out with data.sampling"
                raise ConfigError(f"{path} ({shown(self.class_weights)}) {rule}")

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first profiled step (0-based) and the one after the last; None for no profile."""
        if self.profile_steps is None:
            return None
        first, end = self.profile_steps.split(":")
        return int(first), int(end)

    def _check_profile(self) -> None:
        if self.profile_steps is None:
            if self.profile_ranks != [0]:
                rule = f"({self.profile_ranks}) would be ignored without trainer.profile_steps"
                raise ConfigError(f"trainer.profile_ranks {rule}; give profile_steps too")
            return
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.profile_steps)
        if found is None or not 0 < int(found[2]) - int(found[1]) <= _MAX_PROFILED:
            rule = f"must be FIRST:END with 1 to {_MAX_PROFILED} steps, such as 100:110"
            raise ConfigError(f"trainer.profile_steps ({shown(self.profile_steps)}) {rule}")
        if not self.profile_ranks or min(self.profile_ranks) < 0:
            rule = f"({self.profile_ranks}) must be ranks, which count from 0"
            raise ConfigError(f"trainer.profile_ranks {rule}; leave it out for rank 0")


@dataclass(kw_only=True)
class CheckpointConfig(Options, section="checkpoint", may_change=True):
    """Checkpoints, besides those after each epoch, at the end and at a stop signal."""

    save_every_steps: int | None = option(
        None, "Interval of further checkpoints.", unit="steps", null="none", minimum=1
    )
    save_every_minutes: float | None = option(
        5.0, "Interval of further checkpoints.", unit="minutes", null="none", above=0
    )
    keep_last: int = option(
        2, "Number of newest checkpoints to keep; the best one is kept as well.", minimum=1
    )
    best: BestBy = option(
        BestBy.top1,
        "The best evaluation is the one with the highest val/top1 (top1), of equal ones with the "
        "lowest val/loss, or the one with the lowest val/loss (loss). Its checkpoint is kept, and "
        "evaluate, predict and export use it.",
    )
    keep_every_epochs: int | None = option(
        None,
        "Also keep the checkpoints after every this many epochs.",
        unit="epochs",
        null="none",
        minimum=1,
    )
    copy_to: str | None = option(
        None,
        "URL of a folder: checkpoints are copied to URL/NAME, and are fetched from there if "
        "run.root has none.",
        null="no copies",
    )


@dataclass(kw_only=True)
class ResumeConfig(Options, section="resume", may_change=True):
    """How a run is resumed."""

    allow_changes: bool = option(
        False, "Resume although the model, the data or the batch differs from the checkpoint's."
    )


@dataclass(kw_only=True)
class Config(Options):
    """A whole run: what train and evaluate read."""

    run: RunConfig
    seed: int = option(
        0,
        "Seed of every random number: initialisation, order, augmentation, dropout.",
        minimum=0,
        maximum=MAX_SEED,
    )
    device: Device = option(
        Device.auto, "The device to compute on. auto: cuda if there is a GPU.", may_change=True
    )
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig
    trainer: TrainerConfig
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    plugins: list[str] = option(
        [],
        "Modules to import first, which register what a run chooses by name; from the command line "
        "only. See docs/extending.md.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.head is Head.new and self.model.weights is None:
            rule = "would be ignored without model.weights; leave it auto"
            raise ConfigError(f"model.head=new {rule}")
        grow, epochs = self.data.grow_epochs, self.trainer.epochs
        if grow is not None and grow >= epochs:
            rule = f"must be less than trainer.epochs ({epochs}), to end at data.image_size"
            raise ConfigError(f"data.grow_epochs ({grow}) {rule}")
        if self.trainer.class_weights == "balanced" and self.data.sampling is not None:
            rule = "would correct twice what data.sampling corrects"
            raise ConfigError(f"trainer.class_weights=balanced {rule}; leave one of them out")
        precision = self.trainer.precision
        if self.device is Device.cpu and precision is not Precision.fp32:
            rule = "needs a CUDA device, but device=cpu; use trainer.precision=fp32"
            raise ConfigError(f"trainer.precision={precision.value} {rule}")
        if isinstance(self.parallel, DDPConfig) and self.parallel.hook is Hook.powersgd:
            self._check_powersgd()
        if isinstance(self.parallel, HybridConfig):
            self._check_hybrid(self.parallel)
        has_weights = self.model.weights is not None or self.model.has_own_weights
        if self.finetune.freeze_batch_norm and not has_weights:
            rule = "keeps the statistics of model.weights, and there are none"
            remedy = "give model.weights, or leave it false"
            raise ConfigError(f"finetune.freeze_batch_norm (true) {rule}; {remedy}")
        if self.finetune.freezes:
            self._check_frozen(f"finetune.method={self.finetune.method.value}")
        if self.finetune.cache_features:
            self._check_cached_features()

    def _check_frozen(self, method: str) -> None:
        if self.model.weights is None and not self.model.has_own_weights:
            rule = "trains the head of a network whose other weights are random"
            if self.finetune.adapts:
                rule = "adapts a network whose weights are random"
            raise ConfigError(f"{method} without model.weights {rule}; give model.weights")
        head_epochs, epochs = self.finetune.value_of("head_epochs"), self.trainer.epochs
        if self.finetune.method is Method.gradual and head_epochs >= epochs:
            rule = f"must be less than trainer.epochs ({epochs}), or the rest is never trained"
            remedy = "train longer, or use finetune.method=head"
            raise ConfigError(f"finetune.head_epochs ({head_epochs:g}) {rule}; {remedy}")
        if isinstance(self.parallel, HybridConfig):
            rule = "excludes the layers from training that parallel=hybrid splits"
            raise ConfigError(f"{method} {rule}; use parallel=ddp")
        hook = self.parallel.hook if isinstance(self.parallel, DDPConfig) else Hook.none
        if hook in (Hook.powersgd, Hook.post_local_sgd):
            rule = f"does not go with parallel.hook={hook.value}, which keeps state for parameters"
            remedy = "use parallel.hook=none, fp16 or bf16"
            raise ConfigError(f"{method} {rule} that are not trained; {remedy}")
        if self.finetune.method is Method.adalora and isinstance(self.optimizer, LARSConfig):
            rule = "computes importances from gradients, which optimizer=lars overwrites"
            raise ConfigError(f"{method} {rule}; use optimizer=adamw or sgd")

    def _check_cached_features(self) -> None:
        what, otherwise = "finetune.cache_features=true", "leave finetune.cache_features false"
        if not isinstance(self.augment, NoAugmentConfig):
            rule = "computes each image once, and this augmentation changes it in each epoch"
            raise ConfigError(f"{what} {rule}; use augment=none, or {otherwise}")
        if self.data.start_image_size is not None:
            rule = f"changes the images in each epoch; leave it out, or {otherwise}"
            start = f"data.start_image_size ({self.data.start_image_size})"
            raise ConfigError(f"{what}: {start} {rule}")
        if self.trainer.compile:
            rule = "would be ignored: only the head is trained, which is one layer"
            raise ConfigError(f"trainer.compile=true {rule}; leave it false, or {otherwise}")
        if not self.data.is_identified:
            rule = "cannot tell whether the images of data=plugin are the same as before"
            raise ConfigError(f"{what} {rule}; {otherwise}")

    def _check_powersgd(self) -> None:
        if self.trainer.on_nan is not OnNan.stop:
            rule = "accumulates the errors of earlier steps, and one that is not finite would stay"
            raise ConfigError(f"parallel.hook=powersgd {rule}; use trainer.on_nan=stop")
        if self.trainer.precision is Precision.fp16:
            rule = "accumulates errors of gradients whose scale changes with fp16"
            raise ConfigError(f"parallel.hook=powersgd {rule}; use trainer.precision=bf16")

    def _check_hybrid(self, parallel: HybridConfig) -> None:
        precision = self.trainer.precision
        if parallel.wire_dtype is WireDtype.bf16 and precision is not Precision.fp32:
            rule = f"would be ignored: trainer.precision={precision.value} has 16-bit activations"
            raise ConfigError(f"parallel.wire_dtype=bf16 {rule}; leave it fp32")
        if self.trainer.compile:
            rule = "cannot compile layers that wait for other ranks"
            remedy = "use parallel=ddp, or leave trainer.compile false"
            raise ConfigError(f"trainer.compile=true: parallel=hybrid {rule}; {remedy}")

    @property
    def run_dir(self) -> Path:
        """The directory of the run; the same on every rank."""
        return Path(self.run.root) / self.run.name


@dataclass(kw_only=True)
class DoctorConfig(Config):
    """A run, and how to check the machines for it."""

    json: str | None = option(None, "A .json file to write the results to.", null="none")
    join_timeout_s: float = option(
        30.0,
        "Time limit for all ranks to start, and for each message between them.",
        unit="seconds",
        above=0,
        maximum=1_000_000,
    )


@dataclass(kw_only=True)
class ReplayConfig(Config):
    """A run, and the record of the step to compute again."""

    file: str | None = option(None, "A replay.json.", null="the run's own")


@dataclass(kw_only=True)
class LrFindConfig(Config):
    """A training, and the learning rates to try with it."""

    min_lr: float = option(1e-6, "Learning rate of the first step.", above=0)
    max_lr: float = option(10.0, "Learning rate of the last step.", above=0)
    num_steps: int = option(100, "Number of steps.", unit="steps", minimum=8)
    output: str = option(
        "lr_find.png", "A .png file for the curve; the points are written as .json beside it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr >= self.max_lr:
            raise ConfigError(f"min_lr ({self.min_lr}) must be less than max_lr ({self.max_lr})")
