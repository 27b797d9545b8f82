"""The schema as tables: the options of each command, their types, and the groups that choose between classes."""

from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore

from alexnet_ddp.config import (
    AlexNet2012AugmentConfig,
    AlexNet2012Config,
    AlexNetBNConfig,
    AlexNetConfig,
    AlexNetSmallConfig,
    AutoEngineConfig,
    AutoParallelConfig,
    BasicAugmentConfig,
    Config,
    ConstantConfig,
    CosineConfig,
    DDPConfig,
    DemoConfig,
    DoctorConfig,
    FolderConfig,
    HybridConfig,
    ImageNetConfig,
    LocalEngineConfig,
    NoAugmentConfig,
    PlanConfig,
    PolyConfig,
    PredictConfig,
    PrepareConfig,
    ReplayConfig,
    ShardsConfig,
    SparkEngineConfig,
    StepDecayConfig,
    SyntheticConfig,
    TorchvisionConfig,
)
from alexnet_ddp.config.plugins import (
    PluginAugmentConfig,
    PluginDataConfig,
    PluginModelConfig,
    TimmConfig,
)
from alexnet_ddp.config.recipe import OPTIMIZERS

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel conf/ is in the package, in a checkout next to it.
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())

# conf/NAME.yaml -> the class that it fills.
ROOTS: dict[str, type] = {
    "train": Config,
    "evaluate": Config,
    "doctor": DoctorConfig,
    "replay": ReplayConfig,
    "predict": PredictConfig,
    "plan": PlanConfig,
    "prepare": PrepareConfig,
}
# GROUP=CHOICE -> the class of its options. conf/GROUP/CHOICE.yaml gives values; without it the
# class's defaults count.
GROUPS: dict[str, dict[str, type]] = {
    "data": {
        "demo": DemoConfig,
        "folder": FolderConfig,
        "imagenet": ImageNetConfig,
        "shards": ShardsConfig,
        "synthetic": SyntheticConfig,
        "plugin": PluginDataConfig,
    },
    "augment": {
        "basic": BasicAugmentConfig,
        "alexnet_2012": AlexNet2012AugmentConfig,
        "none": NoAugmentConfig,
        "plugin": PluginAugmentConfig,
    },
    "model": {
        "alexnet": AlexNetConfig,
        "alexnet_2012": AlexNet2012Config,
        "alexnet_bn": AlexNetBNConfig,
        "alexnet_small": AlexNetSmallConfig,
        "torchvision": TorchvisionConfig,
        "timm": TimmConfig,
        "plugin": PluginModelConfig,
    },
    "optimizer": OPTIMIZERS,
    "scheduler": {
        "constant": ConstantConfig,
        "step": StepDecayConfig,
        "cosine": CosineConfig,
        "poly": PolyConfig,
    },
    "parallel": {"ddp": DDPConfig, "hybrid": HybridConfig, "auto": AutoParallelConfig},
    "engine": {"local": LocalEngineConfig, "spark": SparkEngineConfig, "auto": AutoEngineConfig},
}

store = ConfigStore.instance().store
store(name="schema", node=Config)
store(name="schema_predict", node=PredictConfig)
store(name="schema_plan", node=PlanConfig)
store(name="schema_prepare", node=PrepareConfig)
for _group, _choices in GROUPS.items():
    for _name, _node in _choices.items():
        store(group=f"{_group}/schema", name=_name, node=_node, package=_group)
        if not (CONF_DIR / _group / f"{_name}.yaml").exists():
            store(group=_group, name=_name, node=_node, package=_group)


@dataclass(frozen=True)
class Option:
    """The types that an option may have, and the choices of its group that have it (none: every choice)."""

    kinds: tuple[Any, ...]
    choices: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        return str in self.kinds

    @property
    def is_optional(self) -> bool:
        return type(None) in self.kinds

    @property
    def item(self) -> Any:
        """The type of the items, for a list."""
        return next((get_args(kind)[0] for kind in self.kinds if get_origin(kind) is list), None)

    @property
    def is_scalar(self) -> bool:
        """A number, a boolean, a text or a name from a fixed set: never a list or a mapping."""
        return Any not in self.kinds and self.item is None


@cache
def groups(root: type) -> dict[str, dict[str, type]]:
    """The groups of a command, with the classes of their choices."""
    hints = get_type_hints(root)
    return {
        name: choices
        for name, choices in GROUPS.items()
        if name in hints and all(issubclass(choice, hints[name]) for choice in choices.values())
    }


@cache
def group_names(root: type) -> tuple[str, ...]:
    """The groups of a command, and `experiment`, whose choices may fill every part."""
    return (*groups(root), *(("experiment",) if issubclass(root, Config) else ()))


@cache
def sections(root: type) -> dict[str, type]:
    """The parts of a command's configuration that are no groups, such as `trainer`."""
    return {
        name: hint
        for name, hint in get_type_hints(root).items()
        if is_dataclass(hint) and name not in groups(root)
    }


@cache
def options(root: type) -> dict[str, Option]:
    """Every option of a command by its full name, such as `data.root`."""
    found: dict[str, Option] = {}
    for name, hint in get_type_hints(root).items():
        if name in groups(root):
            found |= _of_group(name, groups(root)[name])
        elif is_dataclass(hint):
            found |= {f"{name}.{key}": Option(kinds) for key, kinds in _kinds(hint).items()}
        else:
            found[name] = Option(_members(hint))
    return found


def _of_group(group: str, choices: dict[str, type]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for choice, owner in choices.items():
        for key, kinds in _kinds(owner).items():
            before = found.get(f"{group}.{key}", Option(()))
            found[f"{group}.{key}"] = Option((*before.kinds, *kinds), (*before.choices, choice))
    return {
        path: Option(option.kinds, () if len(option.choices) == len(choices) else option.choices)
        for path, option in found.items()
    }


def _kinds(owner: type) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(owner)
    return {field.name: _members(hints[field.name]) for field in fields(owner)}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
