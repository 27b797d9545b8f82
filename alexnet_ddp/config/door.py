"""The door between Hydra and the rest: YAML and a command line come in, plain checked dataclasses go out."""

from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from alexnet_ddp.config import (
    AdamWConfig,
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
    FolderConfig,
    HybridConfig,
    ImageNetConfig,
    LARSConfig,
    LocalEngineConfig,
    NoAugmentConfig,
    PlanConfig,
    PolyConfig,
    PredictConfig,
    PrepareConfig,
    SGDConfig,
    ShardsConfig,
    SparkEngineConfig,
    StepDecayConfig,
    SyntheticConfig,
    TorchvisionConfig,
)
from alexnet_ddp.config.checks import require
from alexnet_ddp.config.name import derived_name
from alexnet_ddp.errors import ConfigError

_store = ConfigStore.instance().store
_store(name="schema", node=Config)
_store(name="schema_predict", node=PredictConfig)
_store(name="schema_plan", node=PlanConfig)
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
    "optimizer": {"sgd": SGDConfig, "adamw": AdamWConfig, "lars": LARSConfig},
    "scheduler": {
        "constant": ConstantConfig,
        "step": StepDecayConfig,
        "cosine": CosineConfig,
        "poly": PolyConfig,
    },
    "parallel": {"ddp": DDPConfig, "hybrid": HybridConfig, "auto": AutoParallelConfig},
    "engine": {"local": LocalEngineConfig, "spark": SparkEngineConfig, "auto": AutoEngineConfig},
}.items():
    for _name, _node in _choices.items():
        _store(group=f"{_group}/schema", name=_name, node=_node, package=_group)


def use_schema(node: type[Config]) -> None:
    """In this process conf/train.yaml fills `node`, a Config with more knobs: for a root that examines a run."""
    _store(name="schema", node=node)


def to_config(cfg: DictConfig) -> Config | PlanConfig | PredictConfig | PrepareConfig:
    """The one door between Hydra and the rest: DictConfig in, plain checked dataclasses out. Raises ConfigError."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} is required and has no value; give it on the command line: {missing[0]}=...")
    if "run" in cfg and "data" in cfg and cfg.run.name is None:
        cfg.run.name = derived_name(cfg)
    _refuse_unknown(cfg, "")
    return OmegaConf.to_object(cfg)


def _refuse_unknown(cfg: DictConfig, prefix: str) -> None:
    """`+key=value` adds a key that nothing would read."""
    owner = OmegaConf.get_type(cfg)
    known = {f.name for f in fields(owner)}
    for key in cfg:
        require(key in known, unknown_key(f"{prefix}{key}", owner))
        if isinstance(cfg[key], DictConfig) and is_dataclass(OmegaConf.get_type(cfg[key])):
            _refuse_unknown(cfg[key], f"{prefix}{key}.")


def unknown_key(path: str, owner: type) -> str:
    """The line for a key that the dataclass `owner` does not have."""
    known = sorted(f.name for f in fields(owner))
    near = get_close_matches(path.rpartition(".")[2], known, 1)
    return f"{path} is not a key; " + (f"nearest: {near[0]}" if near else f"known here: {', '.join(known)}")


def to_yaml(cfg: Config) -> str:
    """The whole configuration, resolved, for people and for the record."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def to_plain(cfg: Config) -> dict:
    """The whole configuration as JSON's types."""
    return OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
