"""The options of every command: types, defaults, bounds, units and descriptions.

The modules, in the order in which a command uses them:

- option: how an option is declared; data, recipe, finetune, parallel, logger, run, evaluate,
  predict, export, prepare, plan, report, runs, sweep, plugins: the option classes
- schema: the tables of commands, groups and options; reference: --help and docs/configuration.md
- overrides, advice: a command line becomes Hydra's overrides; mistakes become one line
- space: which options of a sweep have several values
- compose: Hydra composes conf/ with the overrides; plain, checked dataclasses come out

No module imports torch, and only compose needs Hydra at import time.
"""

# ruff: noqa: F401 (the option classes of a training, for the rest of the package; other commands
# import their module, so that a training starts 30 ms earlier)

from alexnet_ddp.config.data import (
    AlexNet2012AugmentConfig,
    AugmentConfig,
    BasicAugmentConfig,
    CsvConfig,
    DataConfig,
    DemoConfig,
    FolderConfig,
    ImageNetConfig,
    LabelledConfig,
    NoAugmentConfig,
    OnBadImage,
    Policy,
    RandomAugmentConfig,
    ShardsConfig,
    Shuffle,
    SyntheticConfig,
)
from alexnet_ddp.config.finetune import FinetuneConfig, Method
from alexnet_ddp.config.logger import Artifacts, LoggerConfig, Wandb
from alexnet_ddp.config.parallel import (
    AUTO,
    AutoParallelConfig,
    DDPConfig,
    Hook,
    HybridConfig,
    ParallelConfig,
    WireDtype,
)
from alexnet_ddp.config.recipe import (
    AdamWConfig,
    AlexNet2012Config,
    AlexNetBNConfig,
    AlexNetConfig,
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
    BestBy,
    CheckpointConfig,
    Config,
    Device,
    DoctorConfig,
    LrFindConfig,
    OnNan,
    Precision,
    ReplayConfig,
    RunConfig,
    TrainerConfig,
)
from alexnet_ddp.runtime.errors import ConfigError
