"""Which function builds the network of which options, and the networks of other packages.

To add a network: a class of options in config/recipe.py with @model_choice, and a builder with
@builds in alexnet.py or in a module that model/__init__.py imports.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torchvision
from torch import nn
from torchvision.models import vision_transformer

from alexnet_ddp.config import ConfigError, ModelConfig, TorchvisionConfig
from alexnet_ddp.config.plugins import PluginModelConfig, TimmConfig
from alexnet_ddp.plugins import MODELS, call_plugin

_Cfg = TypeVar("_Cfg", bound=ModelConfig)
Builder = Callable[[_Cfg, int, int], nn.Module]
_BUILDERS: dict[type[ModelConfig], Builder[Any]] = {}


def builds(cfg: type[_Cfg]) -> Callable[[Builder[_Cfg]], Builder[_Cfg]]:
    """Make a function the builder of networks with the options `cfg`.

    It takes the options, the number of classes and the height = width of the images in pixels, and
    returns the network on the CPU with its initial weights. It draws them from torch's generator.
    """

    def add(build: Builder[_Cfg]) -> Builder[_Cfg]:
        _BUILDERS[cfg] = build
        return build

    return add


def build_network(cfg: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network of `cfg`, as its builder returns it. Raises ConfigError for wrong options."""
    return _BUILDERS[type(cfg)](cfg, num_classes, image_size)


@builds(TimmConfig)
def _timm(cfg: TimmConfig, num_classes: int, image_size: int) -> nn.Module:
    from alexnet_ddp.model.timm_models import build_timm  # slow to import

    return build_timm(cfg, num_classes)


@builds(PluginModelConfig)
def _plugin(cfg: PluginModelConfig, num_classes: int, image_size: int) -> nn.Module:
    model = call_plugin(f"model.name ({cfg.name})", MODELS.get(cfg.name), num_classes, **cfg.args)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ConfigError(
            f"model.name ({cfg.name}): the plugin returned {kind}; return a torch.nn.Module"
        )
    return model


@builds(TorchvisionConfig)
def _torchvision(cfg: TorchvisionConfig, num_classes: int, image_size: int) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if cfg.name not in known:
        near = [n for n in known if n[:4] == cfg.name[:4]] or known
        raise ConfigError(
            f"model.name ({cfg.name}) is no classifier of torchvision; near: {', '.join(near[:8])}"
        )
    options: dict = {"num_classes": num_classes}
    if torchvision.models.get_model_builder(cfg.name).__module__ == vision_transformer.__name__:
        options["image_size"] = image_size
    if cfg.dropout is not None:
        options["dropout"] = cfg.dropout
    if cfg.name in ("googlenet", "inception_v3"):
        options |= {
            "aux_logits": False,
            "init_weights": True,
            "transform_input": bool(cfg.transform_input),
        }
    elif cfg.transform_input is not None:
        rule = f"is not an option of {cfg.name}"
        raise ConfigError(
            f"model.transform_input ({str(cfg.transform_input).lower()}) {rule}; leave it null"
        )
    try:
        return torchvision.models.get_model(cfg.name, **options)
    except AssertionError as error:  # of a ViT
        rule = f"does not suit this network: {str(error).rstrip('!')}"
        remedy = "use a multiple of the patch size, which is in the name"
        raise ConfigError(f"data.image_size ({image_size}) {rule}; {remedy}") from error
    except TypeError as error:
        raise ConfigError(f"model.dropout is not an option of {cfg.name}; leave it null") from error
