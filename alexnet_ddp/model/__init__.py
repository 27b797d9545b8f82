"""Networks: the AlexNet family, and other torchvision classifiers by name.

Parameter names are those of torchvision, so weight files can be exchanged with it.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp.config import ConfigError, Head, ModelConfig, TorchvisionConfig
from alexnet_ddp.model import alexnet  # noqa: F401 (adds its builders)
from alexnet_ddp.model.adapters import Adapters
from alexnet_ddp.model.backbone import Backbone, freeze_batch_norm
from alexnet_ddp.model.blocks import lr_factors
from alexnet_ddp.model.builders import build_network
from alexnet_ddp.model.dropout import KeyedDropout, key_dropout, set_dropout_keys
from alexnet_ddp.model.head import (
    ClassChange,
    find_head,
    follow_classes,
    head_parameters,
    initial_head,
)
from alexnet_ddp.model.published import published_weights
from alexnet_ddp.model.shapes import run_on_meta
from alexnet_ddp.model.weights import load_checkpoint, load_weights

__all__ = [
    "Adapters",
    "Backbone",
    "ClassChange",
    "KeyedDropout",
    "build_model",
    "find_head",
    "follow_classes",
    "freeze_batch_norm",
    "head_parameters",
    "initial_head",
    "load_checkpoint",
    "load_weights",
    "lr_factors",
    "published_weights",
    "set_dropout_keys",
    "transforms_input",
    "wanted_transform",
    "without_weights",
]


def build_model(
    cfg: ModelConfig,
    num_classes: int,
    image_size: int,
    seed: int,
    classes: list[str] | None = None,
    weights_classes: list[str] | None = None,
) -> nn.Module:
    """Build the network of `cfg` on the CPU, initialised from `seed` or from the file cfg.weights.

    image_size: height = width in pixels: a ViT is built for them, others must accept them.
    classes: class folder names in the order of the labels; rows of the head are matched by name.
    weights_classes: the classes of the weights, if their file does not contain them.
    Raises ConfigError for an unknown name, images that are too small or weights that do not fit.
    """
    # The only use of a generator: the initial weights, the same on all ranks.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_network(cfg, num_classes, image_size)
        key_dropout(model)
        if cfg.weights is not None:
            load_weights(
                model, Path(cfg.weights), classes, cfg.head, wanted_transform(cfg), weights_classes
            )
    check_image_size(model, num_classes, image_size, "data.image_size")
    return model


def without_weights(cfg: ModelConfig, transform_input: bool = False) -> ModelConfig:
    """`cfg` without weights and head, for a network whose weights come from a checkpoint.

    transform_input: the value with which the network of the checkpoint was built.
    """
    if isinstance(cfg, TorchvisionConfig) and cfg.transform_input is None and transform_input:
        return replace(cfg, weights=None, head=Head.auto, transform_input=True)
    return replace(cfg, weights=None, head=Head.auto)


def wanted_transform(cfg: ModelConfig) -> bool | None:
    """The option model.transform_input; None if it is not set or the model has no such option."""
    return cfg.transform_input if isinstance(cfg, TorchvisionConfig) else None


def transforms_input(model: nn.Module) -> bool:
    """Whether the network rescales its inputs, as torchvision's GoogLeNet and Inception do."""
    return (
        isinstance(model, torchvision.models.GoogLeNet | torchvision.models.Inception3)
        and model.transform_input
    )


def check_image_size(model: nn.Module, num_classes: int, image_size: int, option: str) -> None:
    """Raises ConfigError, naming `option`, if the network does not accept images of this size.

    Runs one image through the network on the meta device, which computes shapes only.
    """
    try:
        meta = run_on_meta(model, image_size)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        remedy = "use larger images, or correct or change the network"
        raise ConfigError(
            f"{option} ({image_size}) does not suit this network: {reason}; {remedy}"
        ) from error
    if not isinstance(meta, Tensor) or meta.shape != (1, num_classes):
        found = list(meta.shape) if isinstance(meta, Tensor) else type(meta).__name__
        remedy = f"end the network with nn.Linear(..., {num_classes})"
        raise ConfigError(
            f"the network returns {found} for one image, and must return [1, {num_classes}], "
            f"the logits of the {num_classes} classes of the data; {remedy}"
        )
