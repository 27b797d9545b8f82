"""Options of what is built outside the package: classes of torch.optim, timm, plugins."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from alexnet_ddp.config.data import BasicAugmentConfig, DataConfig
from alexnet_ddp.config.option import MISSING, option, with_default
from alexnet_ddp.config.recipe import ModelConfig, OptimizerConfig, optimizer_choice
from alexnet_ddp.runtime.errors import ConfigError

# Classes of torch.optim whose update of an element depends only on that element's gradient and
# state.
ELEMENTWISE = frozenset(
    {
        *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD"),
    }
)


@dataclass(kw_only=True)
class PluginModelConfig(ModelConfig):
    """A network that a plugin has registered: see docs/extending.md."""

    has_own_weights: ClassVar[bool] = True

    name: str = option(MISSING, "Name that was given to register_model.")
    args: Any = option(
        None, "Further keyword arguments of the registered function.", kind="mapping", null="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = _checked_args("model", self.args, ("num_classes",))


@dataclass(kw_only=True)
class TimmConfig(ModelConfig):
    """Any classifier of timm; its configuration gives the defaults of the data's normalisation."""

    published_form: ClassVar[re.Pattern[str]] = re.compile(r"\w+")  # tags have no suffix or folder

    name: str = option(MISSING, "Name in timm, such as resnet50: see timm.list_models.")
    args: Any = option(
        None, "Further keyword arguments of timm.create_model.", kind="mapping", null="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        taken = ("num_classes", "pretrained", "checkpoint_path")
        self.args = _checked_args("model", self.args, taken)


@optimizer_choice("torch")
@dataclass(kw_only=True)
class TorchOptimizerConfig(OptimizerConfig):
    """Any class of torch.optim. Its weight decay is optimizer.weight_decay, not torch's default."""

    name: str = option(MISSING, "Name of the class, such as NAdam.")
    lr: float = with_default(OptimizerConfig, "lr", 1e-3)
    args: Any = option(None, "Further keyword arguments of the class.", kind="mapping", null="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "LBFGS":
            rule = "calls the network several times a step, which a training step does not allow"
            raise ConfigError(f"optimizer.name=LBFGS {rule}; choose another class")
        if self.name == "SparseAdam":
            rule = "takes sparse gradients, and the gradients here are dense"
            raise ConfigError(f"optimizer.name=SparseAdam {rule}; use Adam")
        self.args = _checked_args("optimizer", self.args, ("params", "lr", "weight_decay"))


@optimizer_choice("plugin")
@dataclass(kw_only=True)
class PluginOptimizerConfig(OptimizerConfig):
    """An optimizer that a plugin has registered: see docs/extending.md."""

    name: str = option(MISSING, "Name that was given to register_optimizer.")
    args: Any = option(
        None, "Further keyword arguments of the registered function.", kind="mapping", null="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = _checked_args("optimizer", self.args, ("lr", "weight_decay"))


@dataclass(kw_only=True)
class PluginDataConfig(DataConfig):
    """A data source that a plugin has registered: see docs/extending.md."""

    is_identified: ClassVar[bool] = False

    name: str = option(MISSING, "Name that was given to register_source.")
    root: str = option(".", "Passed to the registered function.", may_change=True)
    args: Any = option(
        None, "Further keyword arguments of the registered function.", kind="mapping", null="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = _checked_args("data", self.args, ("root", "split"))


@dataclass(kw_only=True)
class PluginAugmentConfig(BasicAugmentConfig):
    """As augment=basic, then a function that a plugin has registered: see docs/extending.md."""

    name: str = option(MISSING, "Name that was given to register_augment.")
    args: Any = option(
        None, "Further keyword arguments of the registered function.", kind="mapping", null="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = _checked_args("augment", self.args, ("image", "random"))


def _checked_args(section: str, args: Any, taken: tuple[str, ...]) -> dict[str, Any]:
    """`args`, or {} for None.

    Raises ConfigError if it is no mapping from names, or has a name of `taken`.
    """
    args = {} if args is None else args
    if not isinstance(args, dict) or not all(str(name).isidentifier() for name in args):
        rule = "must be a mapping of keyword arguments"
        raise ConfigError(f"{section}.args ({args}) {rule}; write '{section}.args={{name: value}}'")
    both = [name for name in taken if name in args]
    if both:
        rule = "is given by the program itself; leave it out"
        if both[0] in ("lr", "weight_decay", "root"):
            rule = f"is an option of its own; write {section}.{both[0]}={args[both[0]]}"
        raise ConfigError(f"{section}.args: {both[0]} {rule}")
    return args
