"""Every knob of a run: its type, its unit, its default, its check. The only schema; it imports no torch.

Hydra composes conf/*.yaml on top of these classes, so a misspelt key or a wrong type stops a run before the first
image is read. YAML gives values, these classes give them meaning; a knob that would be ignored is refused.
"""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from alexnet_ddp.config.checks import positive, require
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
    ShardsConfig,
    Shuffle,
    SyntheticConfig,
)
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
    ModelConfig,
    OptimizerConfig,
    PolyConfig,
    SchedulerConfig,
    SGDConfig,
    StepDecayConfig,
    TorchvisionConfig,
)
from alexnet_ddp.config.run import (
    CheckpointConfig,
    DDPConfig,
    Device,
    LoggerConfig,
    ParallelConfig,
    Precision,
    ResumeConfig,
    RunConfig,
    TrainerConfig,
    Wandb,
)
from alexnet_ddp.errors import ConfigError

__all__ = [
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
    "Encoding",
    "EngineConfig",
    "FolderConfig",
    "ImageNetConfig",
    "LocalEngineConfig",
    "LoggerConfig",
    "ModelConfig",
    "NoAugmentConfig",
    "OnBadImage",
    "OptimizerConfig",
    "ParallelConfig",
    "PolyConfig",
    "Precision",
    "PredictConfig",
    "PrepareConfig",
    "ResumeConfig",
    "RunConfig",
    "SGDConfig",
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
    "to_config",
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

    def __post_init__(self) -> None:
        on_cpu = self.device is Device.cpu and self.trainer.precision is not Precision.fp32
        rule = "needs a CUDA device, but device=cpu; use trainer.precision=fp32"
        require(not on_cpu, f"trainer.precision={self.trainer.precision.value} {rule}")

    @property
    def run_dir(self) -> Path:
        """Every rank derives the same path."""
        return Path(self.run.root) / self.run.name


@dataclass(kw_only=True)
class PredictConfig:
    """A finished or running run, and the images to show it."""

    run: RunConfig
    device: Device = Device.auto
    images: str = MISSING  # a file, a directory or a glob
    output: str | None = None  # a .jsonl file to write
    top_k: int = 5

    def __post_init__(self) -> None:
        positive("predict", self, "top_k")


_store = ConfigStore.instance().store
_store(name="schema", node=Config)
_store(name="schema_predict", node=PredictConfig)
_store(name="schema_prepare", node=PrepareConfig)
for _group, _choices in {
    "data": {
        "demo": DemoConfig,
        "folder": FolderConfig,
        "imagenet": ImageNetConfig,
        "shards": ShardsConfig,
        "synthetic": SyntheticConfig,
    },
    "augment": {"basic": BasicAugmentConfig, "alexnet_2012": AlexNet2012AugmentConfig, "none": NoAugmentConfig},
    "model": {
        "alexnet": AlexNetConfig,
        "alexnet_2012": AlexNet2012Config,
        "alexnet_bn": AlexNetBNConfig,
        "alexnet_small": AlexNetSmallConfig,
        "torchvision": TorchvisionConfig,
    },
    "optimizer": {"sgd": SGDConfig, "adamw": AdamWConfig},
    "scheduler": {
        "constant": ConstantConfig,
        "step": StepDecayConfig,
        "cosine": CosineConfig,
        "poly": PolyConfig,
    },
    "parallel": {"ddp": DDPConfig},
    "engine": {"local": LocalEngineConfig, "spark": SparkEngineConfig, "auto": AutoEngineConfig},
}.items():
    for _name, _node in _choices.items():
        _store(group=f"{_group}/schema", name=_name, node=_node, package=_group)


def to_config(cfg: DictConfig) -> Config | PredictConfig | PrepareConfig:
    """The one door between Hydra and the rest: DictConfig in, plain checked dataclasses out. Raises ConfigError."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} is required and has no value; give it on the command line: {missing[0]}=...")
    _refuse_unknown(cfg, "")
    return OmegaConf.to_object(cfg)


def _refuse_unknown(cfg: DictConfig, prefix: str) -> None:
    """`+key=value` adds a key that nothing would read."""
    known = {f.name for f in fields(OmegaConf.get_type(cfg))}
    for key in cfg:
        require(key in known, f"{prefix}{key} is not a key; known here: {', '.join(sorted(known))}")
        if isinstance(cfg[key], DictConfig) and is_dataclass(OmegaConf.get_type(cfg[key])):
            _refuse_unknown(cfg[key], f"{prefix}{key}.")


def to_yaml(cfg: Config) -> str:
    """The whole configuration, resolved, for people and for the record."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def to_plain(cfg: Config) -> dict:
    """The whole configuration as JSON's types."""
    return OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
