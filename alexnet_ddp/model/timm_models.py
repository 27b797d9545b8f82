"""Classifiers of timm by name, and the inputs that they were made for.

timm is the extra `timm` of this package.
"""

from typing import Any

from torch import nn

from alexnet_ddp.config.data import Interpolation
from alexnet_ddp.config.plugins import TimmConfig
from alexnet_ddp.runtime.errors import ConfigError


def build_timm(cfg: TimmConfig, num_classes: int) -> nn.Module:
    """The network `cfg.name`, initialised at random.

    Raises ConfigError for an unknown name or argument.
    """
    timm = _timm()
    _require_known(cfg.name)
    try:
        return timm.create_model(cfg.name, num_classes=num_classes, **cfg.args)
    except TypeError as error:
        raise ConfigError(
            f"model.args ({cfg.args}) do not suit {cfg.name}: {error}; leave them out"
        ) from error


def input_options(name: str, image_size: int) -> dict[str, Any]:
    """Options of data, by name, that the network's own configuration (pretrained_cfg) gives.

    They are mean, std and eval_interpolation, and eval_resize, for which the central crop of
    image_size pixels covers the network's crop_pct of the image. Raises ConfigError for an unknown
    name.
    """
    _require_known(name)
    try:
        cfg = _timm().get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ConfigError(f"model.name ({name}): {error} Leave the tag out") from error
    if cfg is None:
        return {}
    cubic = cfg.interpolation == "bicubic"
    return {
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "eval_interpolation": Interpolation.bicubic if cubic else Interpolation.bilinear,
        "eval_resize": max(image_size, int(image_size / cfg.crop_pct)),
    }


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError("model=timm needs timm; pip install 'alexnet-ddp[timm]'") from error
    return timm


def _require_known(name: str) -> None:
    timm = _timm()
    if name.partition(".")[0] in timm.list_models():
        return
    near = timm.list_models(f"*{name[:5]}*")[:8]
    hint = f"near: {', '.join(near)}" if near else "timm.list_models() lists them"
    raise ConfigError(f"model.name ({name}) is no network of timm; {hint}")
