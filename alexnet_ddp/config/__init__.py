"""Every knob of a run: its type, its unit, its default, its check. The only schema; it imports no torch, and no Hydra.

Hydra composes conf/*.yaml on top of these classes (door.py), so a misspelt key or a wrong type stops a run before the
first image is read. YAML gives values, these classes give them meaning; a knob that would be ignored is refused.
"""

from dataclasses import dataclass, field
from pathlib import Path

from alexnet_ddp.config.checks import MAX_SEED, MISSING, positive, require, within
from alexnet_ddp.config.data import (
    AlexNet2012AugmentConfig,
    AugmentConfig,
    BasicAugmentConfig,
    DataConfig,
    DemoConfig,
    FolderConfig,
    ImageNetConfig,
    NoAugmentConfig,
    OnBadImage,
    Policy,
    RandomAugmentConfig,
    ShardsConfig,
    Shuffle,
    SyntheticConfig,
)
from alexnet_ddp.config.plan import LinksConfig, PlanConfig, PlanDataConfig
from alexnet_ddp.config.prepare import (
    Action,
    AutoEngineConfig,
    Encoding,
    EngineConfig,
    LocalEngineConfig,
    PrepareConfig,
    SparkEngineConfig,
    Split,
)
from alexnet_ddp.config.recipe import (
    AdamWConfig,
    AlexNet2012Config,
    AlexNetBNConfig,
    AlexNetConfig,
    AlexNetFamilyConfig,
    AlexNetSmallConfig,
    ConstantConfig,
    CosineConfig,
    Head,
    LARSConfig,
    LARSVariant,
    ModelConfig,
    OptimizerConfig,
    PolyConfig,
    Scaling,
    SchedulerConfig,
    SGDConfig,
    StepDecayConfig,
    TorchvisionConfig,
)
from alexnet_ddp.config.run import (
    AUTO,
    AutoParallelConfig,
    CheckpointConfig,
    DDPConfig,
    Device,
    Hook,
    HybridConfig,
    LoggerConfig,
    OnNan,
    ParallelConfig,
    Precision,
    ResumeConfig,
    RunConfig,
    TrainerConfig,
    Wandb,
    WireDtype,
)
from alexnet_ddp.runtime.errors import ConfigError

__all__ = [
    "AUTO",
    "Action",
    "AdamWConfig",
    "AlexNet2012AugmentConfig",
    "AlexNet2012Config",
    "AlexNetBNConfig",
    "AlexNetConfig",
    "AlexNetFamilyConfig",
    "AlexNetSmallConfig",
    "AugmentConfig",
    "AutoEngineConfig",
    "AutoParallelConfig",
    "BasicAugmentConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "ConstantConfig",
    "CosineConfig",
    "DDPConfig",
    "DataConfig",
    "DemoConfig",
    "Device",
    "DoctorConfig",
    "Encoding",
    "EngineConfig",
    "FolderConfig",
    "Head",
    "Hook",
    "HybridConfig",
    "ImageNetConfig",
    "LARSConfig",
    "LARSVariant",
    "LinksConfig",
    "LocalEngineConfig",
    "LoggerConfig",
    "ModelConfig",
    "NoAugmentConfig",
    "OnBadImage",
    "OnNan",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "PlanDataConfig",
    "Policy",
    "PolyConfig",
    "Precision",
    "PredictConfig",
    "PrepareConfig",
    "RandomAugmentConfig",
    "ReplayConfig",
    "ResumeConfig",
    "RunConfig",
    "SGDConfig",
    "Scaling",
    "SchedulerConfig",
    "ShardsConfig",
    "Shuffle",
    "SparkEngineConfig",
    "Split",
    "StepDecayConfig",
    "SyntheticConfig",
    "TorchvisionConfig",
    "TrainerConfig",
    "Wandb",
    "WireDtype",
]


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig
    seed: int = 0
    device: Device = Device.auto
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    resume: ResumeConfig
    logger: LoggerConfig
    # Modules to import first, from the command line only: they register what a run chooses by name.
    plugins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        new_head = self.model.head is Head.new and self.model.weights is None
        require(
            not new_head, "model.head=new would be ignored without model.weights; leave it auto"
        )
        within("", self, 0, MAX_SEED, "seed")
        grow, epochs = self.data.grow_epochs, self.trainer.epochs
        rule = f"must be less than trainer.epochs ({epochs}), to end at data.image_size"
        require(grow is None or grow < epochs, f"data.grow_epochs ({grow}) {rule}")
        on_cpu = self.device is Device.cpu and self.trainer.precision is not Precision.fp32
        rule = "needs a CUDA device, but device=cpu; use trainer.precision=fp32"
        require(not on_cpu, f"trainer.precision={self.trainer.precision.value} {rule}")
        powersgd = isinstance(self.parallel, DDPConfig) and self.parallel.hook is Hook.powersgd
        rule = "remembers the errors of earlier steps, and one that is not finite would stay; use trainer.on_nan=stop"
        require(not powersgd or self.trainer.on_nan is OnNan.stop, f"parallel.hook=powersgd {rule}")
        rule = "remembers errors of gradients whose scale changes, as fp16's does; use trainer.precision=bf16"
        require(
            not powersgd or self.trainer.precision is not Precision.fp16,
            f"parallel.hook=powersgd {rule}",
        )
        if isinstance(self.parallel, HybridConfig):
            narrow = (
                self.parallel.wire_dtype is WireDtype.bf16
                and self.trainer.precision is not Precision.fp32
            )
            rule = f"would be ignored: trainer.precision={self.trainer.precision.value} has no wider activations"
            require(not narrow, f"parallel.wire_dtype=bf16 {rule}; leave it fp32")
            rule = "cannot compile what waits for other ranks within a layer; use parallel=ddp, or leave it false"
            require(not self.trainer.compile, f"trainer.compile=true: parallel=hybrid {rule}")

    @property
    def run_dir(self) -> Path:
        """Every rank derives the same path."""
        return Path(self.run.root) / self.run.name


@dataclass(kw_only=True)
class DoctorConfig(Config):
    """A run, and how to examine the machines that it would be on."""

    json: str | None = None  # a file to write
    join_timeout_s: float = 30.0  # for all ranks to come, and for each message between them

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("", self, "join_timeout_s")
        within("", self, 0, 1_000_000, "join_timeout_s")


@dataclass(kw_only=True)
class ReplayConfig(Config):
    """A run, and the record of the step to compute again."""

    file: str | None = None  # a replay.json; null: the run's own


@dataclass(kw_only=True)
class PredictConfig:
    """A finished or running run, and the images to show it."""

    run: RunConfig
    device: Device = Device.auto
    images: str = MISSING  # a file, a directory or a glob
    output: str | None = None  # a .jsonl file to write
    top_k: int = 5
    plugins: list[str] = field(default_factory=list)  # as for train: modules to import first

    def __post_init__(self) -> None:
        positive("", self, "top_k")
