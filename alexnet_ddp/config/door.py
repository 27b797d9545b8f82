"""The door between Hydra and the rest: YAML and a command line come in, plain checked dataclasses go out."""

from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexnet_ddp.config import Config, PlanConfig, PredictConfig, PrepareConfig
from alexnet_ddp.config.advice import in_other_choices
from alexnet_ddp.config.checks import check_finite, check_value, require
from alexnet_ddp.config.name import derived_name
from alexnet_ddp.config.schema import store
from alexnet_ddp.runtime.errors import ConfigError


def use_schema(node: type[Config]) -> None:
    """In this process conf/train.yaml fills `node`, a Config with more knobs: for a root that examines a run."""
    store(name="schema", node=node)


def to_config(cfg: DictConfig) -> Config | PlanConfig | PredictConfig | PrepareConfig:
    """The one door between Hydra and the rest: DictConfig in, plain checked dataclasses out. Raises ConfigError."""
    has_default_name = "run" in cfg and "data" in cfg and OmegaConf.is_missing(cfg.run, "name")
    missing = sorted(OmegaConf.missing_keys(cfg) - ({"run.name"} if has_default_name else set()))
    if missing:
        raise ConfigError(
            f"{missing[0]} is required and has no value; give it on the command line: {missing[0]}=..."
        )
    if has_default_name:
        cfg.run.name = derived_name(cfg)
    _refuse_unknown(cfg, "", OmegaConf.get_type(cfg))
    for path, value in _leaves(OmegaConf.to_container(cfg, resolve=True), ""):
        check_value(path, value)
    config = OmegaConf.to_object(cfg)
    for path, value in _leaves(asdict(config), ""):
        check_finite(path, value)
    return config


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value of a nested configuration with its key; the items of a list have the key of the list."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value


def _refuse_unknown(cfg: DictConfig, prefix: str, root: type) -> None:
    """`+key=value` adds a key that nothing would read."""
    owner = OmegaConf.get_type(cfg)
    known = {f.name for f in fields(owner)}
    for key in cfg:
        path = f"{prefix}{key}"
        require(key in known, in_other_choices(path, owner.__name__, root))
        if isinstance(cfg[key], DictConfig) and is_dataclass(OmegaConf.get_type(cfg[key])):
            _refuse_unknown(cfg[key], f"{path}.", root)


def to_yaml(cfg: Config) -> str:
    """The whole configuration, resolved, for people and for the record."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def to_plain(cfg: Config) -> dict:
    """The whole configuration as JSON's types."""
    return OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
