"""Which checkpoint of a run to take: the newest that verifies, or the best."""

import logging
from pathlib import Path

from alexnet_ddp.checkpoint import format as files
from alexnet_ddp.checkpoint.format import Rejected
from alexnet_ddp.runtime.errors import ConfigError, NoCheckpoint

log = logging.getLogger(__name__)


def find_newest(directory: Path, up_to: int | None = None) -> Path | None:
    """The newest checkpoint that verifies; None where none was ever committed. Names every one that it rejects.

    up_to: the last step to look at. Raises NoCheckpoint where all are rejected: a run never silently starts afresh.
    """
    candidates = [d for d in files.listed(directory) if up_to is None or files.step_of(d) <= up_to]
    for candidate in reversed(candidates):
        try:
            files.verify(candidate)
            return candidate
        except Rejected as reason:
            log.warning("checkpoint %s is rejected: %s", candidate.name, reason)
    if candidates:
        remedy = "restore one, or choose another run.name to start afresh"
        raise NoCheckpoint(
            f"none of the {len(candidates)} checkpoints in {directory} is usable; {remedy}"
        )
    return None


def find_best(directory: Path) -> Path:
    """The checkpoint of the best evaluation; the newest where no evaluation was made. Raises NoCheckpoint."""
    newest = find_newest(directory)
    if newest is None:
        raise NoCheckpoint(f"there is no checkpoint in {directory}; train the run first")
    step = files.read_state(newest)["best"].get("step")
    best = next((d for d in files.listed(directory) if files.step_of(d) == step), newest)
    try:
        files.verify(best)
    except Rejected as reason:
        log.warning(
            "checkpoint %s, the best one, is rejected: %s; taking %s",
            best.name,
            reason,
            newest.name,
        )
        return newest
    return best


def weights_of_run(weights: str, root: str) -> tuple[str, list[str] | None]:
    """The file of a run's best weights, and the ids of its classes if they are known.

    weights: runs/NAME, run:NAME (below `root`) or a checkpoint's directory; anything else comes back as it is.
    Raises ConfigError if there is no such run, NoCheckpoint if it has no weights.
    """
    directory = (
        Path(root) / weights.removeprefix("run:") if weights.startswith("run:") else Path(weights)
    )
    if files.is_name(directory.name) and directory.is_dir():
        try:
            files.verify(directory)
        except Rejected as reason:
            raise ConfigError(
                f"model.weights ({weights}) is refused: {reason}; give another checkpoint"
            ) from reason
        checkpoint = directory
    elif (directory / "checkpoints").is_dir():
        checkpoint = find_best(directory / "checkpoints")
    elif weights.startswith("run:"):
        known = ", ".join(sorted(d.parent.name for d in Path(root).glob("*/checkpoints"))) or "none"
        raise ConfigError(
            f"model.weights ({weights}): {root} has no such trained run; there are: {known}"
        )
    else:
        return weights, None
    stem = files.stem_of_weights(checkpoint)
    kind = "averaged weights" if stem == "ema" else "weights"
    log.info("model.weights=%s takes the %s of %s", weights, kind, checkpoint)
    known = files.classes_of(checkpoint, files.read_state(checkpoint))
    return str(checkpoint / f"{stem}.safetensors"), known and known["ids"]
