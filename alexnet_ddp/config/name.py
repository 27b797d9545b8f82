"""The default name of a run."""

import os
import re

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

_MOST = 90  # bytes of each half


def derived_name(cfg: DictConfig) -> str:
    """DATA-MODEL, such as photos-resnet18: the same command gets the same name, and so resumes."""
    data, model = (_choice_of(group, cfg[group]) for group in ("data", "model"))
    root = str(cfg.data.get("name") or cfg.data.get("root") or data)
    url, _, path = root.partition("?")[0].rpartition("://")
    place = (
        path.rpartition("@")[2].rstrip("/") if url else os.path.abspath(root)
    )  # no credentials of a URL
    words = place.rpartition("/")[2], str(cfg.model.get("name") or model)
    return "-".join(
        _shortened(re.sub(r"[^\w.]+", "-", word).strip("-.")) or "data" for word in words
    )


def _shortened(word: str) -> str:
    return word.encode()[:_MOST].decode(errors="ignore")


def _choice_of(group: str, cfg: DictConfig) -> str:
    """The choice of `group` whose schema `cfg` has."""
    schemas = ConfigStore.instance().repo[group]["schema"]
    owner = OmegaConf.get_type(cfg)
    return next(
        n.removesuffix(".yaml")
        for n, node in schemas.items()
        if OmegaConf.get_type(node.node) is owner
    )
