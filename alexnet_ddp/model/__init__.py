"""The network: the AlexNet family, and other torchvision classifiers by name.

Parameter names are torchvision's, so its weight files load and ours load elsewhere.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp.config import (
    AlexNet2012Config,
    AlexNetBNConfig,
    AlexNetConfig,
    AlexNetSmallConfig,
    ConfigError,
    ModelConfig,
    TorchvisionConfig,
)
from alexnet_ddp.model.alexnet import alexnet_2012, alexnet_bn, alexnet_small
from alexnet_ddp.model.dropout import KeyedDropout, key_dropout, set_dropout_keys
from alexnet_ddp.model.weights import load_checkpoint, load_weights

__all__ = ["KeyedDropout", "build_model", "load_checkpoint", "load_weights", "set_dropout_keys"]


def build_model(cfg: ModelConfig, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """The network of `cfg`, initialised from `seed`, on the CPU; weights loaded where `cfg` names a file.

    Raises ConfigError for an unknown name, an image that is too small, weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # the only use of a generator: initial weights, the same on all ranks
        torch.manual_seed(seed)
        model = _network(cfg, num_classes)
        key_dropout(model)
        if cfg.weights is not None:
            load_weights(model, Path(cfg.weights))
    check_image_size(model, num_classes, image_size, "data.image_size")
    return model


def _network(cfg: ModelConfig, num_classes: int) -> nn.Module:
    match cfg:
        case AlexNetConfig():
            return torchvision.models.alexnet(num_classes=num_classes, dropout=cfg.dropout)
        case AlexNet2012Config():
            return alexnet_2012(num_classes, cfg.dropout)
        case AlexNetBNConfig():
            return alexnet_bn(num_classes, cfg.dropout, cfg.norm_after_pool5)
        case AlexNetSmallConfig():
            return alexnet_small(num_classes, cfg.dropout)
        case TorchvisionConfig():
            return _torchvision(cfg, num_classes)
    raise TypeError(f"no model for {type(cfg).__name__}")


def _torchvision(cfg: TorchvisionConfig, num_classes: int) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if cfg.name not in known:
        near = [n for n in known if n[:4] == cfg.name[:4]] or known
        raise ConfigError(f"model.name ({cfg.name}) is no classifier of torchvision; near: {', '.join(near[:8])}")
    options: dict = {"num_classes": num_classes}
    if cfg.dropout is not None:
        options["dropout"] = cfg.dropout
    if cfg.name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(cfg.name, **options)
    except TypeError as error:
        raise ConfigError(f"model.dropout is not an option of {cfg.name}; leave it null") from error


def check_image_size(model: nn.Module, num_classes: int, image_size: int, knob: str) -> None:
    """Raises ConfigError, naming the knob, where the network cannot take such images.

    Runs one image through the shapes alone, on the meta device: nothing is computed.
    """
    try:
        with torch.no_grad():
            was_training = model.training
            meta = torch.func.functional_call(
                model.eval(),
                {n: torch.empty_like(t, device="meta") for n, t in model.state_dict().items()},
                torch.empty(1, 3, image_size, image_size, device="meta"),
            )
            model.train(was_training)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        remedy = "use larger images, or another model"
        raise ConfigError(f"{knob} ({image_size}) does not suit this network: {reason}; {remedy}") from error
    if not isinstance(meta, Tensor) or meta.shape != (1, num_classes):
        raise ConfigError("the network must return one tensor of logits [n, num_classes]")
