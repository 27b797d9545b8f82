"""Options of the network, the optimizer and the learning rate."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

from alexnet_ddp.config.option import MISSING, Options, option, with_default
from alexnet_ddp.runtime.errors import ConfigError

# Names in torchvision (and timm) of networks without BatchNorm. Their published learning rate
# for 256 images is 0.01, while the other classifiers of torchvision's references have 0.1.
LOW_LR_NETWORKS = frozenset({"alexnet", "vgg11", "vgg13", "vgg16", "vgg19"})


class Head(StrEnum):
    """Which rows of the classifier layer keep their initialisation if model.weights is given."""

    auto = "auto"
    new = "new"


@dataclass(kw_only=True)
class ModelConfig(Options, section="model"):
    """The network. The number of classes is the data's."""

    needs_low_lr: ClassVar[bool] = False  # see LOW_LR_NETWORKS
    has_own_weights: ClassVar[bool] = False  # it may load weights itself
    # Of a member of torchvision's enums. Files have a suffix.
    published_form: ClassVar[re.Pattern[str]] = re.compile(r"[A-Z][A-Z0-9_]*")

    weights: str | None = option(
        None,
        "Weights to start from: a .safetensors or torch file, a run (runs/NAME or run:NAME), or "
        "the name of published weights for this network: DEFAULT, a name of torchvision's such as "
        "IMAGENET1K_V1, or with model=timm a tag such as c3_in1k.",
        null="random initialisation",
        may_change=True,
    )
    head: Head = option(
        Head.auto,
        "With model.weights, which rows of the classifier layer keep their initialisation. auto: "
        "those of classes that the file does not have (all of them, if the file has no class "
        "names and another number of classes); new: all.",
        may_change=True,
    )

    @property
    def published(self) -> str | None:
        """model.weights if it has the form of a name of published weights; None for files, runs."""
        text = self.weights
        if text is None or self.published_form.fullmatch(text) is None or os.path.lexists(text):
            return None
        return text


# model=NAME and optimizer=NAME -> the class of their options; see also config/plugins.py.
MODELS: dict[str, type[ModelConfig]] = {}
OPTIMIZERS: dict[str, type["OptimizerConfig"]] = {}
_Class = TypeVar("_Class", bound=type)


def model_choice(name: str) -> Callable[[_Class], _Class]:
    """Make a class the choice model=NAME. A function in model/ with @builds builds the network."""
    return _add(name, MODELS)


def optimizer_choice(name: str) -> Callable[[_Class], _Class]:
    """Make a class the choice optimizer=NAME. training/optim.py builds what it describes."""
    return _add(name, OPTIMIZERS)


def _add(name: str, choices: dict[str, Any]) -> Callable[[_Class], _Class]:
    def add(owner: _Class) -> _Class:
        choices[name] = owner
        return owner

    return add


@dataclass(kw_only=True)
class AlexNetFamilyConfig(ModelConfig):
    """An AlexNet of this package."""

    dropout: float = option(
        0.5, "Probability of dropping an activation before a linear layer.", minimum=0, below=1
    )


@model_choice("alexnet")
@dataclass(kw_only=True)
class AlexNetConfig(AlexNetFamilyConfig):
    """torchvision's AlexNet, with the same parameters."""

    needs_low_lr: ClassVar[bool] = True


@model_choice("alexnet_2012")
@dataclass(kw_only=True)
class AlexNet2012Config(AlexNetFamilyConfig):
    """Krizhevsky 2012: two groups, local response normalisation, overlapping pooling."""

    needs_low_lr: ClassVar[bool] = True


@model_choice("alexnet_bn")
@dataclass(kw_only=True)
class AlexNetBNConfig(AlexNetFamilyConfig):
    """You, Gitman, Ginsburg 2017: the widths of 2012, with BatchNorm before conv2 to conv5."""

    norm_after_pool5: bool = option(
        False, "One more BatchNorm before fc6: Jia 2018, for a batch of 64K."
    )


@model_choice("alexnet_small")
@dataclass(kw_only=True)
class AlexNetSmallConfig(AlexNetFamilyConfig):
    """Four convolutions and one hidden layer, for images of 32 to 96 pixels."""


@model_choice("torchvision")
@dataclass(kw_only=True)
class TorchvisionConfig(ModelConfig):
    """Any classifier of torchvision."""

    name: str = option(
        MISSING, "Name in torchvision.models, such as resnet18: see torchvision.models.list_models."
    )
    dropout: float | None = option(
        None, "Dropout probability of the network.", null="the network's own", minimum=0, below=1
    )
    transform_input: bool | None = option(
        None,
        "googlenet and inception_v3: scale the inputs as torchvision's own weights expect.",
        null="only if model.weights needs it",
    )


class Scaling(StrEnum):
    """How the learning rate follows the global batch size."""

    none = "none"
    linear = "linear"
    sqrt = "sqrt"


class LARSVariant(StrEnum):
    """Which parameters LARS adapts and decays."""

    all_parameters = "all_parameters"
    weights_only = "weights_only"


@dataclass(kw_only=True)
class OptimizerConfig(Options, section="optimizer"):
    """The update rule and its learning rate.

    optimizer.lr is the rate at trainer.global_batch_size and is never rescaled silently. If a
    recipe's rate was found at another batch size, base_batch_size and scaling state it.
    """

    lr: float = option(
        MISSING, "Learning rate, at optimizer.base_batch_size if that is given.", above=0
    )
    base_batch_size: int | None = option(
        None,
        "The global batch size for which optimizer.lr was found; with optimizer.scaling.",
        unit="images",
        null="trainer.global_batch_size",
        minimum=1,
    )
    scaling: Scaling = option(
        Scaling.none,
        "How the rate at trainer.global_batch_size (batch) follows from optimizer.base_batch_size "
        "(base). linear: lr * batch / base (Krizhevsky 2014, Goyal 2017); sqrt: lr * sqrt(batch / "
        "base), which keeps the variance of the update.",
    )
    weight_decay: float = option(0.0, "Weight decay.", minimum=0)
    decay_biases: bool = option(
        True, "false: one-dimensional parameters (biases and norms) do not decay."
    )
    bias_lr_factor: float = option(
        1.0, "Learning rate of biases relative to optimizer.lr. Krizhevsky 2012: 2.", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        base, scaling = self.base_batch_size, self.scaling
        if (base is None) != (scaling is Scaling.none):
            both = f"optimizer.scaling ({scaling.value}) and optimizer.base_batch_size ({base})"
            rule = "belong together: how the rate is scaled, and from which batch"
            raise ConfigError(f"{both} {rule}; give both or none")

    def lr_at(self, global_batch_size: int) -> float:
        """The learning rate, before the schedule, for steps of `global_batch_size` images."""
        ratio = global_batch_size / (self.base_batch_size or global_batch_size)
        return self.lr * (math.sqrt(ratio) if self.scaling is Scaling.sqrt else ratio)


@optimizer_choice("sgd")
@dataclass(kw_only=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum, as in torch.optim.SGD."""

    momentum: float = option(0.9, "Momentum.", minimum=0, maximum=1)
    nesterov: bool = option(False, "Nesterov's momentum.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov needs optimizer.momentum greater than 0")


@optimizer_choice("adamw")
@dataclass(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay, as in torch.optim.AdamW."""

    beta1: float = option(0.9, "Decay rate of the mean of the gradients.", minimum=0, below=1)
    beta2: float = option(
        0.999, "Decay rate of the mean of the squared gradients.", minimum=0, below=1
    )
    eps: float = option(1e-8, "Added to the denominator.", above=0)


@optimizer_choice("adam")
@dataclass(kw_only=True)
class AdamConfig(AdamWConfig):
    """Kingma, Ba 2015, as in torch.optim.Adam: the weight decay is added to the gradient."""

    lr: float = with_default(OptimizerConfig, "lr", 1e-3)


@optimizer_choice("lars")
@dataclass(kw_only=True)
class LARSConfig(OptimizerConfig):
    """You, Gitman, Ginsburg 2017: the step of each tensor is proportional to its norm."""

    momentum: float = option(0.9, "Momentum.", above=0, below=1)
    eta: float = option(0.001, "Trust coefficient.", above=0)
    variant: LARSVariant = option(
        LARSVariant.all_parameters,
        "Which parameters get a rate of their own and decay. all_parameters: biases and norms too, "
        "as in the authors' code; weights_only: those of two dimensions or more.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_biases and self.variant is LARSVariant.weights_only:
            rule = "leaves biases and norms out of the decay; set optimizer.decay_biases=false"
            raise ConfigError(f"optimizer.variant=weights_only {rule}")


@dataclass(kw_only=True)
class SchedulerConfig(Options, section="scheduler"):
    """The learning rate over the run. It first rises linearly from 0, for a warm-up."""

    warmup_epochs: float | None = option(
        0.0,
        "Length of the warm-up.",
        unit="epochs",
        null="5 % of trainer.epochs, unless scheduler.warmup_steps is given",
        minimum=0,
    )
    warmup_steps: int = option(
        0, "Length of the warm-up, in place of scheduler.warmup_epochs.", unit="steps", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs, steps = self.warmup_epochs, self.warmup_steps
        if epochs and steps:
            both = f"scheduler.warmup_epochs ({epochs}) and scheduler.warmup_steps ({steps})"
            raise ConfigError(f"{both} exclude each other; set one of them to 0")


@dataclass(kw_only=True)
class ConstantConfig(SchedulerConfig):
    """optimizer.lr in every step after the warm-up."""


@dataclass(kw_only=True)
class StepDecayConfig(SchedulerConfig):
    """The rate is multiplied by scheduler.gamma at each milestone."""

    milestones_epochs: list[float] = option(
        MISSING, "Epochs at which the rate is multiplied by scheduler.gamma, rising.", unit="epochs"
    )
    gamma: float = option(0.1, "Factor of the rate at each milestone.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(set(self.milestones_epochs)) != self.milestones_epochs:
            raise ConfigError(f"scheduler.milestones_epochs ({self.milestones_epochs}) must rise")


@dataclass(kw_only=True)
class CosineConfig(SchedulerConfig):
    """Half a cosine from optimizer.lr to scheduler.min_lr_ratio * optimizer.lr."""

    min_lr_ratio: float = option(
        0.0, "The rate at the end of the run, relative to optimizer.lr.", minimum=0, maximum=1
    )


@dataclass(kw_only=True)
class PolyConfig(SchedulerConfig):
    """optimizer.lr * (1 - done) ** power, with done the completed share of the run."""

    power: float = option(2.0, "The exponent.", above=0)
