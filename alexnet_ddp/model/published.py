"""Published weights by name: model.weights=DEFAULT, IMAGENET1K_V1, a tag of timm, and so on."""

import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torchvision.models import WeightsEnum
from torchvision.transforms import InterpolationMode

from alexnet_ddp.config import AlexNetConfig, ModelConfig, TorchvisionConfig
from alexnet_ddp.config.data import Interpolation
from alexnet_ddp.config.plugins import TimmConfig
from alexnet_ddp.runtime.errors import ConfigError

log = logging.getLogger(__name__)

_WORDNET_ID = re.compile(r"n\d{8}")
_IMAGENET = 1000  # classes


def published_weights(cfg: ModelConfig, classes: list[str]) -> tuple[str, list[str] | None] | None:
    """Resolve model.weights, if it is the name of published weights, to a file. Download that once.

    The file is in the cache of torch.hub, or of this package for a network of timm. classes: class
    folder names of the data.

    Returns the path, and the class names in the order of the head's rows, if they are known; None
    for other values of model.weights. Raises ConfigError for an unknown name, or if the file cannot
    be downloaded.
    """
    if cfg.published is None:
        return None
    if isinstance(cfg, TimmConfig):
        from alexnet_ddp.model.timm_models import published_file  # slow to import

        file, num_classes = published_file(cfg)
        return file, _rows(classes) if num_classes == _IMAGENET else None
    weights = _find(cfg)
    path = _cached(weights.url, f"model.weights ({cfg.published})")
    log.info("model.weights=%s takes torchvision's %s, in %s", cfg.published, weights, path)
    return str(path), _rows(classes)


def _rows(classes: list[str]) -> list[str]:
    """Names of ImageNet's 1,000 classes, in the order of the rows of published weights.

    They are the folder names of the data, `classes`, if these are the WordNet ids of ImageNet.
    """
    if len(classes) == _IMAGENET and all(map(_WORDNET_ID.fullmatch, classes)):
        return sorted(classes)
    return list(torchvision.models.AlexNet_Weights.DEFAULT.meta["categories"])


def imagenet_ids() -> list[str]:
    """WordNet ids of ImageNet's 1,000 classes, in the order of the rows of published weights."""
    return (Path(__file__).parent / "imagenet_ids.txt").read_text().split()


def input_options_of(cfg: ModelConfig, image_size: int) -> dict[str, Any]:
    """Options of data, by name, that the published weights cfg.published were evaluated with.

    They are mean, std and eval_interpolation, and eval_resize, of which the central crop of
    image_size pixels covers the same share as with these weights. Raises ConfigError for an unknown
    name.
    """
    how = _find(cfg).transforms()
    cubic = how.interpolation is InterpolationMode.BICUBIC
    return {
        "mean": list(how.mean),
        "std": list(how.std),
        "eval_interpolation": Interpolation.bicubic if cubic else Interpolation.bilinear,
        "eval_resize": round(image_size * how.resize_size[0] / how.crop_size[0]),
    }


def _find(cfg: ModelConfig) -> WeightsEnum:
    """The member of torchvision's enums that model.weights names. Raises ConfigError."""
    text, name = cfg.published, _torchvision_name(cfg)
    if name is None:
        rule = "is a name of torchvision's weights, and this network is not torchvision's"
        raise ConfigError(f"model.weights ({text}) {rule}; give a file, or a run such as run:NAME")
    known = torchvision.models.get_model_weights(name).__members__
    if text not in known:
        listed = ", ".join(known) or "none"
        raise ConfigError(f"model.weights ({text}): torchvision has for {name}: {listed}")
    return known[text]


def _torchvision_name(cfg: ModelConfig) -> str | None:
    if isinstance(cfg, TorchvisionConfig):
        known = torchvision.models.list_models(module=torchvision.models)
        return cfg.name if cfg.name in known else None
    return "alexnet" if isinstance(cfg, AlexNetConfig) else None


def _cached(url: str, what: str) -> Path:
    """The file of `url` in the cache of torch.hub, downloaded if it is not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    if path.exists():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    log.info("%s: downloading %s", what, url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(path), digest[1] if digest else None, progress=False
        )
    except (OSError, RuntimeError) as error:  # the second: not the content that the name states
        reason = " ".join(str(error).split())
        remedy = (
            f"download it on another machine and put it into {folder.absolute()}, "
            "or give a file or a run: model.weights=FILE, model.weights=run:NAME"
        )
        raise ConfigError(f"{what}: {url} cannot be downloaded ({reason}); {remedy}") from error
    return path
