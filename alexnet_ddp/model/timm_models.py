"""Classifiers of timm by name, their published weights, and the inputs that they were made for.

timm is the extra `timm` of this package.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from alexnet_ddp.config.data import Interpolation
from alexnet_ddp.config.plugins import TimmConfig
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import user_cache, write_bytes

log = logging.getLogger(__name__)

DEFAULT = "DEFAULT"  # the name of the weights that timm itself would take


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


def input_options(cfg: TimmConfig, image_size: int) -> dict[str, Any]:
    """Options of data, by name, that the configuration of the weights or the network gives.

    They are mean, std and eval_interpolation, and eval_resize, for which the central crop of
    image_size pixels covers the network's crop_pct of the image. Raises ConfigError for an unknown
    name of the network or the weights.
    """
    _require_known(cfg.name)
    if cfg.published is None:
        found = _pretrained_cfg(cfg.name)
    else:
        found = _pretrained_cfg(_tagged_name(cfg))
    if found is None:
        return {}
    cubic = found.interpolation == "bicubic"
    return {
        "mean": list(found.mean),
        "std": list(found.std),
        "eval_interpolation": Interpolation.bicubic if cubic else Interpolation.bilinear,
        "eval_resize": max(image_size, int(image_size / found.crop_pct)),
    }


def published_file(cfg: TimmConfig) -> tuple[str, int]:
    """A file of the weights cfg.published as timm loads them into the network of `cfg`.

    timm downloads the weights into its cache and converts them, by itself. The result is a
    safetensors file in this user's cache folder, which later calls return.

    Returns its path and the number of classes, 0 if the weights have no classifier. Raises
    ConfigError for unknown weights, or if they cannot be downloaded.
    """
    _require_known(cfg.name)
    name = _tagged_name(cfg)
    known = _pretrained_cfg(name)
    folder = user_cache("timm")
    if folder is None:
        rule = "needs a folder for the weights, and the user has no home directory"
        raise ConfigError(f"model.weights ({cfg.published}) {rule}; set XDG_CACHE_HOME")
    facts = [_timm().__version__, name, known.to_dict(), cfg.args]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    path = folder / f"{name}-{key[:16]}.safetensors"
    if not path.exists():
        tensors = _pretrained(name, known, cfg)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({of: t.clone().contiguous() for of, t in tensors.items()}))
    log.info("model.weights=%s takes timm's %s, in %s", cfg.published, name, path)
    return str(path), known.num_classes


def _pretrained(name: str, known: Any, cfg: TimmConfig) -> dict[str, Tensor]:
    """The tensors of the network `name`, with its published weights. Raises ConfigError."""
    # timm builds no classifier for weights without one, and find_head() needs one.
    classes = {} if known.num_classes else {"num_classes": 1}
    what = f"model.weights ({cfg.published})"
    log.info("%s: timm loads %s, and downloads it if it is not in its cache", what, name)
    try:
        with torch.random.fork_rng(devices=[]):
            model = _timm().create_model(name, pretrained=True, **classes, **cfg.args)
    except TypeError as error:
        remedy = "leave them out"
        raise ConfigError(
            f"model.args ({cfg.args}) do not suit {cfg.name}: {error}; {remedy}"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        rule = f"timm's weights {name} cannot be downloaded and loaded ({reason})"
        if known.hf_hub_id:
            place = f"https://huggingface.co/{known.hf_hub_id}"
            remedy = f"download model.safetensors from {place} on another machine, and give that"
            raise ConfigError(f"{what}: {rule}; {remedy} file as model.weights") from error
        folder = Path(torch.hub.get_dir()).absolute() / "checkpoints"
        remedy = f"download {known.url} on another machine and put it into {folder}"
        raise ConfigError(f"{what}: {rule}; {remedy}") from error
    return model.state_dict()


def _tagged_name(cfg: TimmConfig) -> str:
    """NAME.TAG of the weights cfg.published, in timm. Raises ConfigError if there are none."""
    name, _, tag = cfg.name.partition(".")
    tags = [one.partition(".")[2] for one in _timm().list_models(f"{name}.*", pretrained=True)]
    text = cfg.published
    if text not in (*tags, DEFAULT):
        listed = ", ".join([*tags, DEFAULT] if tags else ["none"])
        raise ConfigError(f"model.weights ({text}): timm has for {name}: {listed}")
    if tag and text not in (tag, DEFAULT):
        rule = "name different weights; leave the tag out of model.name"
        raise ConfigError(f"model.name ({cfg.name}) and model.weights ({text}) {rule}")
    if text == DEFAULT:
        found = _pretrained_cfg(cfg.name)
        text = found.tag if found is not None else ""
    if text not in tags:
        raise ConfigError(f"model.weights ({cfg.published}): timm has for {cfg.name}: none")
    return f"{name}.{text}"


def _pretrained_cfg(name: str) -> Any:
    """timm's configuration of the network, or of its weights if `name` has a tag; or None."""
    try:
        return _timm().get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ConfigError(f"model.name ({name}): {error} Leave the tag out") from error


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
