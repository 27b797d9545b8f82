"""Knobs of the network, the optimizer and the learning rate."""

from dataclasses import dataclass

from alexnet_ddp.config.checks import MISSING, positive, require, within


@dataclass(kw_only=True)
class ModelConfig:
    """The number of classes is the data's."""

    weights: str | None = None  # a .safetensors or torch file with torchvision's names to start from


@dataclass(kw_only=True)
class AlexNetFamilyConfig(ModelConfig):
    dropout: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"model.dropout ({self.dropout}) must lie in [0, 1)")


@dataclass(kw_only=True)
class AlexNetConfig(AlexNetFamilyConfig):
    """torchvision's network, parameter by parameter."""


@dataclass(kw_only=True)
class AlexNet2012Config(AlexNetFamilyConfig):
    """Krizhevsky 2012: two groups, local response normalisation, overlapping pools."""


@dataclass(kw_only=True)
class AlexNetBNConfig(AlexNetFamilyConfig):
    """You, Gitman, Ginsburg 2017: the widths of 2012 with BatchNorm before conv2 to conv5."""


@dataclass(kw_only=True)
class AlexNetSmallConfig(AlexNetFamilyConfig):
    """Four convolutions and one hidden layer, for images of 32 to 96 pixels."""


@dataclass(kw_only=True)
class TorchvisionConfig(ModelConfig):
    name: str = MISSING  # torchvision.models.list_models(module=torchvision.models)
    dropout: float | None = None  # null: the network's own

    def __post_init__(self) -> None:
        require(self.dropout is None or 0 <= self.dropout < 1, f"model.dropout ({self.dropout}) must lie in [0, 1)")


@dataclass(kw_only=True)
class OptimizerConfig:
    lr: float = MISSING  # at trainer.global_batch_size; never rescaled behind your back
    weight_decay: float = 0.0
    decay_biases: bool = True  # false: one-dimensional parameters (biases, norms) do not decay
    bias_lr_factor: float = 1.0  # learning rate of biases relative to lr (2012: 2)

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr", "bias_lr_factor")
        require(self.weight_decay >= 0, f"optimizer.weight_decay ({self.weight_decay}) must be at least 0")


@dataclass(kw_only=True)
class SGDConfig(OptimizerConfig):
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within("optimizer", self, 0, 1, "momentum")
        require(self.momentum > 0 or not self.nesterov, "optimizer.nesterov needs optimizer.momentum greater than 0")


@dataclass(kw_only=True)
class AdamWConfig(OptimizerConfig):
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("optimizer", self, "eps")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= value < 1, f"optimizer.{name} ({value}) must lie in [0, 1)")


@dataclass(kw_only=True)
class SchedulerConfig:
    warmup_epochs: float = 0.0  # linear from 0, before everything else

    def __post_init__(self) -> None:
        require(self.warmup_epochs >= 0, f"scheduler.warmup_epochs ({self.warmup_epochs}) must be at least 0")


@dataclass(kw_only=True)
class ConstantConfig(SchedulerConfig):
    """lr stays what it is."""


@dataclass(kw_only=True)
class StepDecayConfig(SchedulerConfig):
    milestones_epochs: list[float] = MISSING  # lr *= gamma at each
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("scheduler", self, "gamma")
        rising = sorted(set(self.milestones_epochs)) == self.milestones_epochs
        require(rising, f"scheduler.milestones_epochs ({self.milestones_epochs}) must rise")


@dataclass(kw_only=True)
class CosineConfig(SchedulerConfig):
    min_lr_ratio: float = 0.0  # of optimizer.lr, reached at the end of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        within("scheduler", self, 0, 1, "min_lr_ratio")


@dataclass(kw_only=True)
class PolyConfig(SchedulerConfig):
    power: float = 2.0  # lr * (1 - share of the run) ** power

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("scheduler", self, "power")
