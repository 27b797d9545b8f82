"""The functions of `import alexnet_ddp`: trained runs, networks and data for Python programs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from alexnet_ddp import cli
from alexnet_ddp import model as networks
from alexnet_ddp.checkpoint.format import find_best
from alexnet_ddp.config import Config
from alexnet_ddp.data.decode import centre_crop
from alexnet_ddp.data.effects import normalise
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.plugins import load_plugins
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.training.calibration import read_temperature
from alexnet_ddp.training.trained import read_trained

if TYPE_CHECKING:
    from PIL import Image


# Option of data -> key of an export's preprocessing.json.
_OF_PREPROCESSING = {
    "image_size": "size",
    "eval_resize": "resize",
    "eval_interpolation": "interpolation",
    "mean": "mean",
    "std": "std",
}


@dataclass(frozen=True)
class TrainedRun:
    """A trained network with what is needed to use it."""

    model: nn.Module  # on the CPU, in evaluation mode; images float [n, 3, size, size] -> logits
    classes: list[str]  # names in the order of the logits
    config: Config
    checkpoint: Path  # the directory of the weights; of an export, its folder
    # (logits / temperature).softmax(1) are calibrated; None without `evaluate calibrate=true`.
    temperature: float | None = None

    def transform(self, image: "Image.Image | np.ndarray") -> Tensor:
        """The network's input for an image: float [3, size, size], the same as in evaluate.

        It is resized and cropped at the centre as data.eval_resize and data.image_size say, and
        normalised. image: of PIL, or a uint8 array, grey [height, width] or RGB [height, width, 3].
        Raises TypeError for anything else, and BadImage, a ValueError, if the image cannot be
        decoded.
        """
        data, image = self.config.data, _as_image(image)
        slot = np.empty((1, data.image_size, data.image_size, 3), np.uint8)
        centre_crop(slot[0], image, data.resized_side, data.eval_interpolation)
        return normalise(torch.from_numpy(slot), None, data.normalisation)[0]


def _as_image(image: object) -> "Image.Image":
    """An image of PIL, or one of a uint8 array. Raises TypeError."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    found = type(image).__name__
    if isinstance(image, np.ndarray):
        is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype == np.uint8 and is_image and image.size:
            return Image.fromarray(image)
        found = f"{image.dtype} array {list(image.shape)}"
    kinds = "an image of PIL, or a uint8 array [height, width] or [height, width, 3]"
    raise TypeError(f"transform takes {kinds}, not {found}")


def load_run(directory: str | Path, plugins: Iterable[str] = ()) -> TrainedRun:
    """The trained run in `directory`, such as "runs/demo", with the weights of its best checkpoint.

    Those of the newest checkpoint if the run was never evaluated; the averages if it has
    trainer.ema_decay. plugins: modules to import first, for a run that was started with plugins.
    directory may also be a folder that `export format=safetensors` wrote.
    Raises ConfigError if there is no such run, and NoCheckpoint if it has no usable checkpoint.
    """
    modules, run_dir = list(plugins), Path(directory)
    load_plugins(modules)
    if (run_dir / "preprocessing.json").exists():  # a run has no such file
        return read_export(run_dir)
    options = [f"plugins=[{','.join(modules)}]"]
    return read_run(run_dir, cli.config_of_run(run_dir, options, opens_data=False))


def read_run(run_dir: Path, cfg: Config) -> TrainedRun:
    """The run in `run_dir`, whose configuration is `cfg`. Plugins are imported already."""
    best = find_best(run_dir / "checkpoints")
    trained = read_trained(cfg, best)
    temperature = read_temperature(run_dir, best)
    return TrainedRun(trained.model.eval(), trained.names, cfg, best, temperature)


def read_export(folder: Path) -> TrainedRun:
    """The model in a folder that `export format=safetensors` wrote. Plugins are imported already.

    Raises ConfigError if a file is missing, cannot be read or does not fit.
    """
    try:
        options = json.loads((folder / "model.json").read_bytes())["options"]
        how = json.loads((folder / "preprocessing.json").read_bytes())
        names = [str(name) for name in json.loads((folder / "classes.json").read_bytes())]
        tensors = load_file(folder / "model.safetensors")
        metrics = folder / "metrics.json"
        # export itself reads the model before it writes the metrics; older exports have no such key
        known = json.loads(metrics.read_bytes()) if metrics.exists() else {}
        temperature = known.get("temperature")
        data = [f"data.{option}={how[key]}" for option, key in _OF_PREPROCESSING.items()]
        given = [str(option) for option in (*options, *data)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        rule = f"is no export that load_run reads ({type(error).__name__}: {error})"
        raise ConfigError(f"{folder} {rule}; give one of format=safetensors") from error
    keys = ("model=", "model.", "data.")
    if any("${" in option or not option.startswith(keys) for option in given):
        raise ConfigError(f"{folder / 'model.json'} must hold plain options of the model only")
    cfg = cli.compose_for_python(["data=synthetic", *given])
    model = networks.build_model(cfg.model, len(names), cfg.data.image_size, cfg.seed)
    networks.load_checkpoint(model, tensors, str(folder))
    return TrainedRun(model.eval(), names, cfg, folder, temperature)


def build_model(*options: str, num_classes: int) -> nn.Module:
    """A network, initialised from the option seed, for options as on the command line:
    "model=alexnet_bn".

    It is on the CPU, in training mode. Raises ConfigError for a wrong option.
    """
    cfg = cli.compose_for_python(list(options))
    if cfg.model.weights is not None:
        raise ConfigError("build_model reads no model.weights; use load_run, or load them yourself")
    return networks.build_model(cfg.model, num_classes, cfg.data.image_size, cfg.seed)


def open_dataset(*options: str) -> ImageSets:
    """The images of data=..., for options as on the command line: "data=folder", "data.root=DIR".

    The result has `train` and `val`. Of each, len(), `classes`, `labels` (int32 [N]) and read(i),
    the encoded bytes of image i. Raises ConfigError for a wrong option, DataError for wrong data.
    """
    return open_data(cli.compose_for_python(list(options)).data, may_make=True)
