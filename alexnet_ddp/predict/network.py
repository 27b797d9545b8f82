"""The network that predict uses: that of a run, of an exported folder, or of a file of weights."""

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.api import TrainedRun, read_export, read_run
from alexnet_ddp.config import ConfigError, Head
from alexnet_ddp.config.option import key_of
from alexnet_ddp.config.predict import PredictConfig
from alexnet_ddp.config.run import refuse_two_networks
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training import calibration
from alexnet_ddp.training.named_weights import read_weights

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
        plugins = [one for one in overrides if key_of(one) == "plugins"]
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
    keys = [key_of(one) for one in overrides]
    weights, folder = options.model.weights, options.export
    if weights is not None and folder is not None:
        both = f"export ({folder}) and model.weights ({weights})"
        raise ConfigError(f"{both} are two networks; give one of them")
    chosen = "model.weights" if weights is not None else "export" if folder is not None else None
    if chosen is not None:
        refuse_two_networks(options.run, chosen, overrides)
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
    cfg = cli.compose_for_python(["data=synthetic"])
    data = replace(cfg.data, **asdict(options.data))
    cfg = replace(cfg, model=options.model, data=data)
    found = read_weights(cfg, options.classes, world)
    return TrainedRun(found.model.eval(), found.names, cfg, Path(found.origin["weights"]))


def _warn_if_not_calibrated(
    options: PredictConfig, found: TrainedRun, what: str, remedy: str
) -> None:
    if options.min_confidence is not None and found.temperature is None:
        rule = f"{what} is not calibrated: its probabilities may be wrong"
        log.warning("min_confidence=%g: %s; %s", options.min_confidence, rule, remedy)
