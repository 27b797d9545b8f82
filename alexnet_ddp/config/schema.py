"""Tables of the schema: the options of each command, their types, and the choices of each group.

Imports no Hydra, so that --help and a misspelt key are answered at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from alexnet_ddp.config import (
    data,
    evaluate,
    export,
    parallel,
    plan,
    plugins,
    predict,
    prepare,
    recipe,
    report,
    run,
    runs,
    sweep,
)
from alexnet_ddp.config.option import Spec, spec_of

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel contains conf/ inside the package; in a checkout both are in one folder.
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())

# conf/COMMAND.yaml -> the class that it fills.
ROOTS: dict[str, type] = {
    "train": run.Config,
    "evaluate": evaluate.EvaluateConfig,
    "doctor": run.DoctorConfig,
    "replay": run.ReplayConfig,
    "lr_find": run.LrFindConfig,
    "sweep": sweep.SweepConfig,
    "predict": predict.PredictConfig,
    "export": export.ExportConfig,
    "report": report.ReportConfig,
    "plan": plan.PlanConfig,
    "prepare": prepare.PrepareConfig,
    "runs": runs.RunsConfig,
    "compare": runs.CompareConfig,
}
# GROUP=CHOICE -> the class of its options. conf/GROUP/CHOICE.yaml gives values; without that file
# the class's defaults count.
GROUPS: dict[str, dict[str, type]] = {
    "data": {
        "demo": data.DemoConfig,
        "folder": data.FolderConfig,
        "csv": data.CsvConfig,
        "imagenet": data.ImageNetConfig,
        "shards": data.ShardsConfig,
        "synthetic": data.SyntheticConfig,
        "plugin": plugins.PluginDataConfig,
    },
    "augment": {
        "basic": data.BasicAugmentConfig,
        "alexnet_2012": data.AlexNet2012AugmentConfig,
        "none": data.NoAugmentConfig,
        "plugin": plugins.PluginAugmentConfig,
    },
    "model": {
        **recipe.MODELS,
        "timm": plugins.TimmConfig,
        "plugin": plugins.PluginModelConfig,
    },
    "optimizer": recipe.OPTIMIZERS,
    "scheduler": {
        "constant": recipe.ConstantConfig,
        "step": recipe.StepDecayConfig,
        "cosine": recipe.CosineConfig,
        "poly": recipe.PolyConfig,
    },
    "parallel": {
        "ddp": parallel.DDPConfig,
        "hybrid": parallel.HybridConfig,
        "auto": parallel.AutoParallelConfig,
    },
    "engine": {
        "local": prepare.LocalEngineConfig,
        "spark": prepare.SparkEngineConfig,
        "auto": prepare.AutoEngineConfig,
    },
}
_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Option:
    """An option's possible types, and the choices of its group that have it (none: all have it)."""

    kinds: tuple[Any, ...]
    choices: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        return str in self.kinds

    @property
    def is_optional(self) -> bool:
        return type(None) in self.kinds

    @property
    def is_any(self) -> bool:
        return Any in self.kinds

    @property
    def item(self) -> Any:
        """The type of the items of a list; None for other options."""
        return next((get_args(kind)[0] for kind in self.kinds if get_origin(kind) is list), None)

    @property
    def is_scalar(self) -> bool:
        """A number, a boolean, a text or a name from a fixed set: never a list or a mapping."""
        return not self.is_any and self.item is None

    @property
    def names(self) -> list[str]:
        """The values of an option that takes names from a fixed set."""
        enums = [kind for kind in self.kinds if isinstance(kind, type) and issubclass(kind, Enum)]
        return [member.name for kind in dict.fromkeys(enums) for member in kind]

    @property
    def type_words(self) -> str:
        """The type for people, without null: "integer", "one of a, b", "list of numbers"."""
        if self.names:
            return f"one of {', '.join(self.names)}"
        if self.item is not None:
            return f"list of {_WORDS[self.item]}s"
        kinds = dict.fromkeys(self.kinds)
        return " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)


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
    """The groups of a command, and `experiment`, whose choices may set any option."""
    return (*groups(root), *(("experiment",) if issubclass(root, run.Config) else ()))


@cache
def sections(root: type) -> dict[str, type]:
    """The parts of a command's configuration that are no groups, such as `trainer`."""
    return {
        name: hint
        for name, hint in get_type_hints(root).items()
        if isinstance(hint, type) and is_dataclass(hint) and name not in groups(root)
    }


@cache
def options(root: type) -> dict[str, Option]:
    """Every option of a command by its full name, such as `data.root`."""
    found: dict[str, Option] = {}
    names = {one.name for one in fields(root)}
    for name, hint in get_type_hints(root).items():
        if name in groups(root):
            found |= _of_group(name, groups(root)[name])
        elif isinstance(hint, type) and is_dataclass(hint):
            found |= {f"{name}.{key}": one for key, one in options_of(hint).items()}
        elif name in names:
            found[name] = Option(_members(hint))
    return found


def specs(root: type) -> Iterator[tuple[str, Spec]]:
    """Every option's full name and what it is, once for each choice of a group that has it."""
    owners = [("", root), *((f"{name}.", owner) for name, owner in sections(root).items())]
    for name, choices in groups(root).items():
        owners += [(f"{name}.", owner) for owner in choices.values()]
    for prefix, owner in owners:
        for one in fields(owner):
            if "spec" in one.metadata:
                yield f"{prefix}{one.name}", spec_of(owner, one.name)


@cache
def options_of(owner: type) -> dict[str, Option]:
    """The options of one option class by their own names."""
    hints = get_type_hints(owner)
    return {one.name: Option(_members(hints[one.name])) for one in fields(owner)}


def choice_of(group: str, owner: type | None) -> str:
    """The choice of `group` whose options `owner` has."""
    return next(name for name, node in GROUPS[group].items() if node is owner)


def choices_of(cfg: run.Config) -> dict[str, str]:
    """The choice of each group of a training, such as {"model": "alexnet"}."""
    return {group: choice_of(group, type(getattr(cfg, group))) for group in groups(run.Config)}


def _of_group(group: str, choices: dict[str, type]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for choice, owner in choices.items():
        for key, one in options_of(owner).items():
            before = found.get(f"{group}.{key}", Option(()))
            kinds, having = (*before.kinds, *one.kinds), (*before.choices, choice)
            found[f"{group}.{key}"] = Option(kinds, having)
    return {
        path: Option(_kinds(one), () if len(one.choices) == len(choices) else one.choices)
        for path, one in found.items()
    }


def _kinds(option: Option) -> tuple[Any, ...]:
    """The types over all choices. null is a text, unless every choice may have no value."""
    nulls = option.kinds.count(type(None))
    if option.is_text and nulls < len(option.choices):
        return tuple(kind for kind in option.kinds if kind is not type(None))
    return option.kinds


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
