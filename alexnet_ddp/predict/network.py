"""The network that predict uses: that of a run, of an exported folder, or of a file of weights."""

import json
import logging
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.api import TrainedRun, read_export, read_run
from alexnet_ddp.config import ConfigError, Head
from alexnet_ddp.config.predict import PredictConfig
from alexnet_ddp.model import (
    build_model,
    load_weights,
    published_weights,
    wanted_transform,
    without_weights,
)
from alexnet_ddp.model.weight_files import read_weights_file
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training import calibration

log = logging.getLogger(__name__)


def open_network(options: PredictConfig, overrides: list[str], world: World) -> TrainedRun:
    """Collective. The network that `options` choose, with its classes and preprocessing.

    overrides: of the command line; see check_choice. Warns if min_confidence is compared with
    probabilities that are not calibrated. Raises ConfigError, and NoCheckpoint if a run has no
    usable checkpoint.
    """
    if options.model.weights is not None:
        found = _open_weights(options, world)
        _warn_if_not_calibrated(options, found, "a file of weights", "give a calibrated run")
    elif options.export is not None:
        folder = Path(options.export)
        found = distributed.on_all(lambda: read_export(folder), world)
        remedy = "start evaluate calibrate=true for its run, and export the run again"
        _warn_if_not_calibrated(options, found, f"export {folder}", remedy)
    else:
        run_dir = Path(options.run.root) / options.run.name
        plugins = [one for one in overrides if one.lstrip("+").startswith("plugins=")]
        found = distributed.on_all(
            lambda: read_run(run_dir, cli.config_of_run(run_dir, plugins, opens_data=False)), world
        )
        # read_run has warned already of a calibration of another checkpoint.
        if not (run_dir / calibration.FILE).exists():
            remedy = f"start evaluate run.name={options.run.name} calibrate=true first"
            _warn_if_not_calibrated(options, found, f"run {options.run.name}", remedy)
    return found


def check_choice(options: PredictConfig, overrides: list[str]) -> None:
    """Raise ConfigError unless one network is chosen, and each option for a network is used."""
    keys = [one.partition("=")[0].lstrip("+") for one in overrides]
    weights, folder = options.model.weights, options.export
    if weights is not None and folder is not None:
        both = f"export ({folder}) and model.weights ({weights})"
        raise ConfigError(f"{both} are two networks; give one of them")
    chosen = "model.weights" if weights is not None else "export" if folder is not None else None
    if chosen is not None and "run.name" in keys:
        rule = f"run.name ({options.run.name}) and {chosen} are two networks"
        raise ConfigError(f"{rule}; give one of them")
    if weights is None:
        own = [key for key in keys if key in ("model", "classes") or key[:5] in ("model.", "data.")]
        if own:
            rule = "is of a file of weights; a run and an export have their own"
            raise ConfigError(f"{own[0]} {rule}; leave it out, or give model.weights=FILE")
    elif weights.startswith("run:") or os.path.isdir(weights):
        rule = "is not a file"
        remedy = "for a run give run.name=NAME, for an exported folder export=DIR"
        raise ConfigError(f"model.weights ({weights}) {rule}; {remedy}")
    elif options.model.head is Head.new:
        raise ConfigError("model.head=new would predict with an untrained head; leave it auto")


def _open_weights(options: PredictConfig, world: World) -> TrainedRun:
    """Collective. The network of model.weights. Raises ConfigError."""
    model = options.model
    names = None
    if options.classes is not None:
        names = distributed.from_main(partial(_read_classes, options.classes), world)
    file, known = distributed.first_on_node(
        partial(published_weights, model, names or []), world
    ) or (str(model.weights), None)

    def load() -> TrainedRun:
        classes = names or known or read_weights_file(Path(file)).classes
        if classes is None:
            rule = f"model.weights ({file}) contains no class names"
            raise ConfigError(f"{rule}; give classes=FILE.txt, with one name per line")
        cfg = cli.compose_for_python(["data=synthetic"])
        cfg = replace(cfg, model=model, data=replace(cfg.data, **asdict(options.data)))
        network = build_model(without_weights(model), len(classes), cfg.data.image_size, cfg.seed)
        load_weights(network, Path(file), None, None, wanted_transform(model))
        return TrainedRun(network.eval(), classes, cfg, Path(file))

    return distributed.on_all(load, world)


def _read_classes(file: str) -> list[str]:
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


def _warn_if_not_calibrated(
    options: PredictConfig, found: TrainedRun, what: str, remedy: str
) -> None:
    if options.min_confidence is not None and found.temperature is None:
        rule = f"{what} is not calibrated: its probabilities may be wrong"
        log.warning("min_confidence=%g: %s; %s", options.min_confidence, rule, remedy)
