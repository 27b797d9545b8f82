"""An exact evaluation: each image counts once, and the world size does not change the result."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_ddp.config import TrainerConfig
from alexnet_ddp.data.loader import Batch
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.runtime.distributed import World, any_rank, raise_together, sum_over_ranks
from alexnet_ddp.runtime.errors import DataError, RunError
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.training.metrics import Meter, UserMetrics, correct_counts, evaluation_row
from alexnet_ddp.training.precision import autocast

_BATCHES_BETWEEN_STOP_CHECKS = 8


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. `row` and `per_class` are sums over all ranks, equal on all."""

    row: dict[str, float | int]
    per_class: Tensor  # int64 [num_classes, 3] on the CPU: images, correct at 1, correct at 5
    skipped: list[Skipped]  # images that this rank could not read


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    cfg: TrainerConfig,
    num_classes: int,
    world: World,
    stop: StopSignal,
    *,
    observe: Callable[[Batch, Tensor], None] | None = None,
    num_views: int = 1,
) -> Evaluation | None:
    """Collective. Evaluate `model` on the images of `batches`. Return None if a stop was requested.

    The model stays in evaluation mode.

    batches: the same number of batches on all ranks; a batch may be empty. observe: called with
    each batch that is not empty, and its logits, float32 [n, classes]. num_views: of each image in
    `batches`; their probabilities are averaged. Raises RunError on all ranks if a rank has one, and
    DataError if no image could be read.
    """
    model.eval()
    meter, error, skipped = Meter(world.device), None, []
    extra = UserMetrics(cfg.metrics, world.device)
    per_class = torch.zeros(num_classes, 3, dtype=torch.int64, device=world.device)
    remaining, batch = iter(batches), None
    for k in count():
        if k % _BATCHES_BETWEEN_STOP_CHECKS == 0 and _must_end(stop, None, world):
            return None
        # Nothing in this block is collective: the error of one rank is shared after the loop.
        try:
            batch = next(remaining, None)
            if batch is not None:
                skipped += batch.bad
            if batch is not None and len(batch.labels):
                with autocast(cfg.precision, world):
                    logits = average_views(model(batch.inputs()).float(), num_views)
                loss_sum = F.cross_entropy(logits, batch.labels, reduction="sum")
                meter.add(loss_sum, logits, batch.labels)
                extra.add(logits, batch.labels)
                if observe is not None:
                    observe(batch, logits)
                per_class.index_add_(0, batch.labels, correct_counts(logits, batch.labels))
        except RunError as e:  # of the data, or of a plugin's metric
            error = e
        if batch is None or error is not None:
            break
    if _must_end(stop, error, world):
        return None
    sums = meter.read()
    if sums["images"] == 0:
        example = f", such as {skipped[0].reason}" if skipped else ""
        raise DataError(f"none of the validation images could be read{example}")
    row = evaluation_row(sums) | extra.row(int(sums["images"]))
    return Evaluation(row, sum_over_ranks(per_class).cpu(), skipped)


def average_views(logits: Tensor, num_views: int) -> Tensor:
    """The logits of the mean probabilities over the views of each image.

    logits: float32 [n * views, classes], the views of an image in a row. Returns float32
    [n, classes], with one view unchanged.
    """
    if num_views == 1:
        return logits
    per_view = logits.log_softmax(1).view(-1, num_views, logits.shape[1])
    return per_view.logsumexp(1) - math.log(num_views)


def _must_end(stop: StopSignal, error: RunError | None, world: World) -> bool:
    """Collective. True if a rank was asked to stop. Raises on all ranks if a rank has an error."""
    must_end = any_rank(stop.received or error is not None, world)
    if must_end:
        raise_together(error, world)
    return must_end
