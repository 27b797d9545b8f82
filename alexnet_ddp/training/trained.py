"""The network of a checkpoint, as evaluate, predict and export use it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alexnet_ddp.checkpoint.format import (
    classes_of,
    mean_tensors,
    read_state,
    step_of,
    weights_group,
)
from alexnet_ddp.config import Config, ConfigError, ModelConfig
from alexnet_ddp.data.sources.classes import class_difference
from alexnet_ddp.model import (
    ClassChange,
    build_model,
    follow_classes,
    head_parameters,
    load_checkpoint,
    without_weights,
)
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.run_record import read_classes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A network with the weights of a checkpoint: the averages if there are any."""

    model: nn.Module  # on the CPU, in training mode
    config: ModelConfig  # builds this network, without weights
    ids: list[str]  # folder names of the classes, in the order of the logits
    names: list[str]  # their readable names
    origin: dict[str, Any]  # for records: checkpoint, step, and whether the weights are averages
    varying: frozenset[str] = frozenset()  # tensors that differ between averaged checkpoints


def read_trained(
    cfg: Config, checkpoint: Path | list[Path], data_classes: list[str] | None = None
) -> Trained:
    """Read a checkpoint of the run that `cfg` configures, or the mean of several. All are verified.

    data_classes: folder names in the order of some data's labels; the logits get this order.
    Raises DataError if they are not the classes of the checkpoint, in any order.
    """
    directories = checkpoint if isinstance(checkpoint, list) else [checkpoint]
    directory = directories[-1]
    state = read_state(directory)
    # The checkpoint's classes: a later start of the run may have had others.
    known = classes_of(directory, state) or read_classes(cfg.run_dir)
    expected, found = known["ids"], data_classes or known["ids"]
    _require_same_classes(cfg.run.name, expected, found)
    start = without_weights(cfg.model, state.get("transform_input", False))
    model = build_model(start, len(expected), cfg.data.image_size, cfg.seed)
    group = weights_group(directory)
    tensors, varying = _read(directories, group)
    if expected != found:
        change, own = ClassChange(expected, found), model.state_dict()
        tensors = follow_classes(
            tensors, change, {name: own[name] for name in head_parameters(model)}
        )
        log.info(
            "the data has %s than the training: rows of the head follow their class names", change
        )
    load_checkpoint(model, tensors, str(directory))
    shown = ", ".join(one.name for one in directories)
    origin: dict[str, Any] = {
        "checkpoint": f"mean of {shown}" if varying else shown,
        "step": step_of(directory),
    }
    if group == "ema":
        origin["weights"] = "averaged"
    names = dict(zip(expected, known["names"]))
    return Trained(model, start, found, [names[one] for one in found], origin, varying)


def _read(directories: list[Path], group: str) -> tuple[dict[str, Tensor], frozenset[str]]:
    """See mean_tensors. Raises ConfigError if the checkpoints have other classes or averages."""
    *others, last = directories
    classes = classes_of(last, read_state(last))
    for one in others:
        if weights_group(one) != group or classes_of(one, read_state(one)) != classes:
            rule = (
                f"{one.name} has other classes than {last.name}, or only one has trainer.ema_decay"
            )
            raise ConfigError(f"average: {rule}; leave it out")
    return mean_tensors(directories, group)


def _require_same_classes(run: str, expected: list[str], found: list[str]) -> None:
    remedy = "use a directory with the classes of the training"
    differ = class_difference(f"run {run}", expected, "data.root", found, remedy)
    if differ:
        raise DataError(
            f"data.root has other classes than the training data of run {run}: {differ}"
        )
