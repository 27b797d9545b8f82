"""Find a learning rate: train a few steps with a rising rate, and see where the loss falls.

    alexnet-ddp lr-find experiment=imagenet20 data.root=DIR
    torchrun --nproc_per_node=8 -m alexnet_ddp.lr_find experiment=alexnet data.root=DIR

Smith 2017, "Cyclical learning rates for training neural networks", section 3.3.
"""

if __name__ == "__main__":
    from alexnet_ddp.runtime import startup

    startup.begin("lr_find")  # before the other imports

    from alexnet_ddp import cli

    cli.run("lr_find", "alexnet_ddp.lr_find:main")

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from alexnet_ddp.config import ConfigError, LrFindConfig, Method
from alexnet_ddp.cost_model.sweep import matplotlib_pyplot
from alexnet_ddp.data.sources.scan import watched
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.files import require_folder_of, write_bytes
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.training.parts import TrainingParts
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.vote import StepVote

_SMOOTHING = 0.9  # of the moving average of the losses
_DIVERGED = 4.0  # the search ends when the average exceeds this multiple of its minimum
_MIN_STEPS = 8  # before a rate can be suggested


@dataclass(frozen=True)
class Point:
    """One step: its learning rate, its loss, and the moving average of the losses so far."""

    lr: float
    loss: float
    average: float


def main(cfg: LrFindConfig, overrides: list[str]) -> None:
    """Print a suggestion, and write the curve to `output` and the same name with .json.

    With finetune.method=gradual all layers are trained, as in most of the run. Nothing of the run
    is read or written. Raises ConfigError for a wrong option.
    """
    if cfg.finetune.method is Method.gradual:
        cfg = replace(cfg, finetune=replace(cfg.finetune, method=Method.full, head_epochs=None))
    with distributed.session(cfg.device, cfg.trainer.tf32) as world:
        distributed.from_main(lambda: _check_output(cfg.output), world)
        setup = RunSetup(cfg, world, up_to=0)
        parts = TrainingParts(setup)
        steps = search(setup, parts)
        points = list(watched(steps, cfg.num_steps, "steps") if world.is_main else steps)
        parts.close()
        found = suggestion(points)
        if world.is_main:
            _report(cfg, points, found)


def search(setup: RunSetup, parts: TrainingParts) -> Iterator[Point]:
    """Collective. Train with rates from min_lr to max_lr, geometrically; stop if it diverges.

    The loss is the mean over the global batch, so the points are the same for any number of ranks.
    """
    cfg, world, sampler = setup.cfg, setup.world, setup.sampler
    assert isinstance(cfg, LrFindConfig)
    micro = cfg.trainer.micro_batch_size
    work = sampler.micro_batches(range(cfg.num_steps), world.rank, world.world_size, micro)
    batches, average, lowest = parts.train_loader.batches(work), 0.0, math.inf
    for k in range(cfg.num_steps):
        lr = cfg.min_lr * (cfg.max_lr / cfg.min_lr) ** (k / (cfg.num_steps - 1))
        votes = parts.train_step(batches, k, lr, len(sampler.batch(k)), StepVote()).votes
        if votes.nonfinite_loss or votes.nonfinite_previous:
            return
        if votes.is_empty:
            continue
        average = _SMOOTHING * average + (1 - _SMOOTHING) * votes.loss
        corrected = average / (1 - _SMOOTHING ** (k + 1))
        lowest = min(lowest, corrected)
        yield Point(lr, votes.loss, corrected)
        if corrected > _DIVERGED * lowest:
            return


def suggestion(points: list[Point]) -> float | None:
    """The rate at which the averaged loss falls fastest over the logarithm of the rate.

    Only up to its minimum. None if there are too few points, or if the loss does not fall, or by
    less than the losses vary from step to step.
    """
    if len(points) < _MIN_STEPS:
        return None
    end = min(range(len(points)), key=lambda k: points[k].average)
    if points[0].average - points[end].average < _variation(points):
        return None
    slopes = [
        (points[k + 1].average - points[k - 1].average)
        / math.log(points[k + 1].lr / points[k - 1].lr)
        for k in range(1, end)
    ]
    if not slopes or min(slopes) >= 0:
        return None
    return points[1 + slopes.index(min(slopes))].lr


def _variation(points: list[Point]) -> float:
    """How much the losses of neighbouring steps usually differ, per loss: without their trend.

    The median leaves out the divergence; of normal noise it is two thirds of the deviation.
    """
    squares = [(b.loss - a.loss) ** 2 for a, b in pairwise(points)]
    return math.sqrt(median(squares) / 2)


def _report(cfg: LrFindConfig, points: list[Point], found: float | None) -> None:
    steps = f"{len(points)} of {cfg.num_steps} steps of {cfg.trainer.global_batch_size} images"
    rates = f"rates {points[0].lr:.3g} to {points[-1].lr:.3g}" if points else "no finite loss"
    if found is None:
        remedy = "try more steps (num_steps), or other rates (min_lr, max_lr)"
        say(
            f"{steps}, {rates}: the average loss does not fall, or by less than the losses vary "
            f"from step to step, so there is no suggestion; {remedy}"
        )
    else:
        best = min(points, key=lambda point: point.average)
        fell = f"the average loss falls from {points[0].average:.3g} to {best.average:.3g}"
        say(f"{steps}, {rates}: {fell} at {best.lr:.3g}")
        size = cfg.trainer.global_batch_size
        say(
            f"suggestion: optimizer.lr={_option_value(cfg, found):.2g}, where it falls fastest "
            f"(a rate of {found:.2g} at {size:,} images)"
        )
    file = Path(cfg.output)
    _draw(points, found, cfg, file)
    option = None if found is None else _option_value(cfg, found)
    record = {"suggestion": found, "optimizer.lr": option, "points": [asdict(p) for p in points]}
    write_bytes(file.with_suffix(".json"), json.dumps(record, indent=1).encode())
    say(f"{printable(file)}, {printable(file.with_suffix('.json'))}")


def _option_value(cfg: LrFindConfig, lr: float) -> float:
    """optimizer.lr that gives the rate `lr` at this global batch: see optimizer.base_batch_size."""
    return lr * cfg.optimizer.lr / cfg.optimizer.lr_at(cfg.trainer.global_batch_size)


def _draw(points: list[Point], found: float | None, cfg: LrFindConfig, file: Path) -> None:
    pyplot = matplotlib_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4))
    rates = [point.lr for point in points]
    axis.plot(rates, [point.loss for point in points], color="#b8c4ce", linewidth=1, label="loss")
    averages = [point.average for point in points]
    axis.plot(rates, averages, color="#1f5f8b", linewidth=2, label="moving average")
    if found is not None:
        axis.axvline(found, color="#c4582b", linestyle=":")
        at = (found, axis.get_ylim()[1])
        axis.annotate(f" {found:.2g}", at, va="top", color="#c4582b")
    if averages:  # the divergence at the end would hide the rest
        axis.set_ylim(0.9 * min(averages), 1.3 * max(averages[0], min(averages)))
    axis.set(xscale="log", xlabel="learning rate of a step", ylabel="training loss")
    axis.set_title(f"{cfg.run.name}, global batch {cfg.trainer.global_batch_size}", fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def _check_output(output: str) -> None:
    """Raise ConfigError unless a picture can be written to `output`."""
    if not output.endswith(".png"):
        raise ConfigError(f"output ({output}) must end in .png")
    require_folder_of("output", output)
    matplotlib_pyplot("output", otherwise="")
