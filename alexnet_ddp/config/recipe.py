"""Knobs of the network, the optimizer and the learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from alexnet_ddp.config.checks import MISSING, positive, require, within


class Head(StrEnum):
    """Which rows of the classifier layer start from their initialisation when model.weights is given."""

    auto = "auto"  # those of classes that the file does not have; all, if only the number of classes is known to differ
    new = "new"  # all


@dataclass(kw_only=True)
class ModelConfig:
    """The number of classes is the data's."""

    weights: str | None = (
        None  # what to start from: a .safetensors or torch file, or a run: runs/NAME, run:NAME
    )
    head: Head = Head.auto


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

    norm_after_pool5: bool = False  # one more before fc6: Jia 2018, for a batch of 64K


@dataclass(kw_only=True)
class AlexNetSmallConfig(AlexNetFamilyConfig):
    """Four convolutions and one hidden layer, for images of 32 to 96 pixels."""


@dataclass(kw_only=True)
class TorchvisionConfig(ModelConfig):
    name: str = MISSING  # torchvision.models.list_models(module=torchvision.models)
    dropout: float | None = None  # null: the network's own
    # Of googlenet and inception_v3: scale inputs as for torchvision's own weights; null: as model.weights needs it
    transform_input: bool | None = None

    def __post_init__(self) -> None:
        require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"model.dropout ({self.dropout}) must lie in [0, 1)",
        )


class Scaling(StrEnum):
    """How the learning rate follows the global batch, where it was found at another one."""

    none = "none"
    linear = "linear"  # lr * batch / base: Krizhevsky 2014, Goyal 2017
    sqrt = "sqrt"  # lr * sqrt(batch / base): the noise of the gradient stays the same


class LARSVariant(StrEnum):
    """Which parameters get a rate of their own, and decay."""

    all_parameters = "all_parameters"  # biases and norms too: the authors' code
    weights_only = "weights_only"  # those with two dimensions or more: later practice


@dataclass(kw_only=True)
class OptimizerConfig:
    """lr holds at trainer.global_batch_size, and is never rescaled behind your back: where a recipe's rate was found at
    another batch, base_batch_size and scaling say so beside it. Then all that makes the rate stands in one place, is
    part of what the run is (each of these fields, and the batch), and the first line of the run prints the outcome.
    """

    lr: float = MISSING  # at base_batch_size, where that is given
    base_batch_size: int | None = None
    scaling: Scaling = (
        Scaling.none
    )  # how lr follows from base_batch_size to trainer.global_batch_size
    weight_decay: float = 0.0
    decay_biases: bool = True  # false: one-dimensional parameters (biases, norms) do not decay
    bias_lr_factor: float = 1.0  # learning rate of biases relative to lr (2012: 2)

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr", "bias_lr_factor", "base_batch_size")
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay ({self.weight_decay}) must be at least 0",
        )
        base, scaling = self.base_batch_size, self.scaling
        rule = "belong together: how the rate is scaled, and from which batch; give both or none"
        both = f"optimizer.scaling ({scaling.value}) and optimizer.base_batch_size ({base}) {rule}"
        require((base is None) == (scaling is Scaling.none), both)

    def lr_at(self, global_batch_size: int) -> float:
        """The rate of a step of so many images."""
        ratio = global_batch_size / (self.base_batch_size or global_batch_size)
        return self.lr * (math.sqrt(ratio) if self.scaling is Scaling.sqrt else ratio)


# optimizer=NAME -> its class. Without conf/optimizer/NAME.yaml the class's defaults count.
OPTIMIZERS: dict[str, type[OptimizerConfig]] = {}
_Class = TypeVar("_Class", bound=type[OptimizerConfig])


def optimizer_choice(name: str) -> Callable[[_Class], _Class]:
    """Make a class the choice optimizer=NAME. training/optim.py builds what it describes."""

    def add(owner: _Class) -> _Class:
        OPTIMIZERS[name] = owner
        return owner

    return add


@optimizer_choice("sgd")
@dataclass(kw_only=True)
class SGDConfig(OptimizerConfig):
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within("optimizer", self, 0, 1, "momentum")
        require(
            self.momentum > 0 or not self.nesterov,
            "optimizer.nesterov needs optimizer.momentum greater than 0",
        )


@optimizer_choice("adamw")
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


@optimizer_choice("adam")
@dataclass(kw_only=True)
class AdamConfig(AdamWConfig):
    """Kingma, Ba 2015, with the paper's values. Unlike AdamW's, the decay is in the gradient."""

    lr: float = 1e-3


@optimizer_choice("lars")
@dataclass(kw_only=True)
class LARSConfig(OptimizerConfig):
    """You, Gitman, Ginsburg 2017: each tensor's step is a share of its norm, so that batches may be large."""

    momentum: float = 0.9
    eta: float = 0.001  # the trust coefficient
    variant: LARSVariant = LARSVariant.all_parameters

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("optimizer", self, "eta")
        require(0 < self.momentum < 1, f"optimizer.momentum ({self.momentum}) must lie in (0, 1)")
        decays = self.decay_biases and self.variant is LARSVariant.weights_only
        rule = "leaves biases and norms out of the decay as well; set optimizer.decay_biases=false"
        require(not decays, f"optimizer.variant=weights_only {rule}")


@dataclass(kw_only=True)
class SchedulerConfig:
    """The rate first rises linearly from 0: for so many epochs, or for so many steps."""

    warmup_epochs: float | None = 0.0  # null: 5 % of the run, unless warmup_steps is given
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        epochs, steps = self.warmup_epochs, self.warmup_steps
        require(
            epochs is None or epochs >= 0, f"scheduler.warmup_epochs ({epochs}) must be at least 0"
        )
        require(steps >= 0, f"scheduler.warmup_steps ({steps}) must be at least 0")
        rule = "exclude each other; set one of them to 0"
        require(
            not (epochs and steps),
            f"scheduler.warmup_epochs ({epochs}) and scheduler.warmup_steps ({steps}) {rule}",
        )


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
