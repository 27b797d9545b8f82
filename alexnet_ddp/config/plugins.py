"""Options of networks, optimizers and data sources from outside the package: torch.optim, timm,
plugins.
"""

from dataclasses import dataclass
from typing import Any

from alexnet_ddp.config.checks import MISSING, require
from alexnet_ddp.config.data import BasicAugmentConfig, DataConfig
from alexnet_ddp.config.recipe import ModelConfig, OptimizerConfig, optimizer_choice

# Classes of torch.optim whose update of an element depends only on that element's gradient and
# state.
ELEMENTWISE = frozenset(
    {
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    }
)


@dataclass(kw_only=True)
class PluginModelConfig(ModelConfig):
    """A network that a plugin has registered: see docs/extending.md."""

    name: str = MISSING  # register_model(NAME)
    args: Any = None  # a mapping: further keyword arguments of the registered function

    def __post_init__(self) -> None:
        self.args = _checked_args("model", self.args, ("num_classes",))


@dataclass(kw_only=True)
class TimmConfig(ModelConfig):
    """A classifier of timm by name; mean, std, interpolation and crop of its configuration are the
    data's defaults.
    """

    name: str = MISSING  # timm.list_models()
    args: Any = None  # a mapping: further keyword arguments of timm.create_model

    def __post_init__(self) -> None:
        self.args = _checked_args(
            "model", self.args, ("num_classes", "pretrained", "checkpoint_path")
        )


@optimizer_choice("torch")
@dataclass(kw_only=True)
class TorchOptimizerConfig(OptimizerConfig):
    """Any class of torch.optim by name.

    Its weight decay is optimizer.weight_decay, whatever torch's default is.
    """

    name: str = MISSING  # of the class, such as NAdam
    lr: float = 1e-3
    args: Any = None  # a mapping: further keyword arguments of the class

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "calls the network several times a step, which a training step here does not allow"
        require(self.name != "LBFGS", f"optimizer.name=LBFGS {rule}; choose another class")
        rule = "takes sparse gradients, and the gradients here are dense"
        require(self.name != "SparseAdam", f"optimizer.name=SparseAdam {rule}; use Adam")
        self.args = _checked_args("optimizer", self.args, ("params", "lr", "weight_decay"))


@optimizer_choice("plugin")
@dataclass(kw_only=True)
class PluginOptimizerConfig(OptimizerConfig):
    """An optimizer that a plugin has registered: see docs/extending.md."""

    name: str = MISSING  # register_optimizer(NAME)
    args: Any = None  # a mapping: further keyword arguments of the registered function

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = _checked_args("optimizer", self.args, ("lr", "weight_decay"))


@dataclass(kw_only=True)
class PluginDataConfig(DataConfig):
    """A data source that a plugin has registered: see docs/extending.md."""

    name: str = MISSING  # register_source(NAME)
    root: str = "."  # passed to the registered function; it may change between starts
    args: Any = None  # a mapping: further keyword arguments of the registered function

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = _checked_args("data", self.args, ("root", "split"))


@dataclass(kw_only=True)
class PluginAugmentConfig(BasicAugmentConfig):
    """As augment=basic, then a function that a plugin has registered: see docs/extending.md."""

    name: str = MISSING  # register_augment(NAME)
    args: Any = None  # a mapping: further keyword arguments of the registered function

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = _checked_args("augment", self.args, ("image", "random"))


def _checked_args(section: str, args: Any, taken: tuple[str, ...]) -> dict[str, Any]:
    """`args`, or {} for None.

    Raises ConfigError if it is no mapping from names, or has a name of `taken`.
    """
    args = {} if args is None else args
    is_mapping = isinstance(args, dict) and all(str(name).isidentifier() for name in args)
    rule = "must be a mapping of keyword arguments"
    require(is_mapping, f"{section}.args ({args}) {rule}; write '{section}.args={{name: value}}'")
    both = [name for name in taken if name in args]
    if both:
        rule = "is given by the program itself; leave it out"
        if both[0] in ("lr", "weight_decay", "root"):
            rule = f"is an option of its own; write {section}.{both[0]}={args[both[0]]}"
        require(False, f"{section}.args: {both[0]} {rule}")
    return args
