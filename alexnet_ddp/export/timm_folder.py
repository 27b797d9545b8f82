"""A folder that timm.create_model("local-dir:DIR", pretrained=True) loads, as from the Hugging Face
Hub: config.json and model.safetensors.
"""

from pathlib import Path
from typing import Any

from torch import nn

from alexnet_ddp.config import ConfigError, ModelConfig, TorchvisionConfig
from alexnet_ddp.config.plugins import TimmConfig
from alexnet_ddp.model.timm_models import build_timm
from alexnet_ddp.runtime.files import write_json

_KEPT = ("first_conv", "classifier", "fixed_input_size")  # facts of the architecture
_REMEDY = "use format=onnx, torch_export or safetensors"


def write_config(
    folder: Path, cfg: ModelConfig, model: nn.Module, names: list[str], how: dict[str, Any]
) -> None:
    """Write config.json. how: the content of preprocessing.json.

    Raises ConfigError if timm has no network with the name and the parameters of `model`.
    """
    if not isinstance(cfg, TimmConfig | TorchvisionConfig):
        rule = "takes networks of timm, and those of torchvision that timm has under the same name"
        raise ConfigError(f"format=huggingface {rule}; {_REMEDY}")
    args = cfg.args if isinstance(cfg, TimmConfig) else {}
    try:
        theirs = build_timm(TimmConfig(name=cfg.name, args=args), len(names))
    except ConfigError as error:
        raise ConfigError(f"format=huggingface: {error}; or {_REMEDY}") from error
    shapes = [{n: t.shape for n, t in one.state_dict().items()} for one in (model, theirs)]
    if shapes[0] != shapes[1]:
        rule = f"timm's {cfg.name} has other parameters than the network of the run"
        raise ConfigError(f"format=huggingface: {rule}; {_REMEDY}")
    known: Any = theirs.pretrained_cfg
    size = how["size"]
    inputs = {
        "input_size": [3, size, size],
        "crop_pct": _crop_share(size, how["resize"]),
        "crop_mode": "center",
        **{key: how[key] for key in ("interpolation", "mean", "std")},
    }
    config = {
        "architecture": cfg.name.partition(".")[0],
        "num_classes": len(names),
        "label_names": names,
        "model_args": args,
        "pretrained_cfg": {**{key: known.get(key) for key in _KEPT}, **inputs},
    }
    write_json(folder / "config.json", config)


def _crop_share(size: int, resize: int) -> float:
    """size / resize, from which timm computes int(size / share): that must be `resize` again."""
    share = size / resize
    return share if int(size / share) == resize else size / (resize + 0.25)
