"""The network of a file of weights that is used without a data set: its classes have to be known.

For predict, and for evaluate images=DIR.
"""

import json
from functools import partial
from pathlib import Path

from alexnet_ddp.checkpoint.format import weights_of_run
from alexnet_ddp.config import Config, ConfigError
from alexnet_ddp.model import (
    build_model,
    load_weights,
    published_weights,
    wanted_transform,
    without_weights,
)
from alexnet_ddp.model.published import imagenet_ids
from alexnet_ddp.model.weight_files import read_weights_file
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training.class_metrics import unique_names
from alexnet_ddp.training.trained import Trained


def read_weights(cfg: Config, classes: str | None, world: World) -> Trained:
    """Collective. The network cfg.model with the weights that cfg.model.weights names.

    classes: a file with the names of the classes, see the option. None: those of the file of
    weights, or ImageNet's for published weights, whose ids are WordNet's. All other ids are names,
    which are made unique. Raises ConfigError.
    """
    names = None if classes is None else distributed.from_main(partial(_read_names, classes), world)
    published = distributed.first_on_node(partial(published_weights, cfg.model, []), world)
    weights = str(cfg.model.weights)
    file, known = published or distributed.from_main(
        partial(weights_of_run, weights, cfg.run.root), world
    )

    def load() -> Trained:
        found = names or known or read_weights_file(Path(file)).classes
        if found is None:
            rule = f"model.weights ({file}) contains no class names"
            raise ConfigError(f"{rule}; give classes=FILE.txt, with one name per line")
        start = without_weights(cfg.model)
        model = build_model(start, len(found), cfg.data.image_size, cfg.seed)
        load_weights(model, Path(file), None, None, wanted_transform(cfg.model))
        is_imagenet = published is not None and found is known
        ids = imagenet_ids() if is_imagenet else unique_names(found)
        return Trained(model, start, ids, found, {"weights": file})

    return distributed.on_all(load, world)


def _read_names(file: str) -> list[str]:
    """The class names in a text file, one per line, or in a JSON list. Raises ConfigError."""
    rule = f"classes ({file}) must be a text file with one class name per line, or a JSON list"
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        names = json.loads(text) if file.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{rule} of names, and cannot be read ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{rule} of names; correct it, or give another file")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ConfigError(f"{rule} of names, and has none; give another file")
    return names
