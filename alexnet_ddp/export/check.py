"""Compares an exported model with the model of its run, on all validation images.

Rounding differs between programs, so the outputs cannot be bit-equal. For each image, the largest
difference of a log-probability must be at most

    1e-6 + 1e-3 * (largest - smallest logit of the run's model for this image).

The differences that the tests measure are less than a fifth of this. Within this tolerance, an
image can only get another class if the logits of the two classes are almost equal: such ties are
counted and allowed. Counts alone would let a wrong export pass if the validation set is small.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_ddp.data.effects import apply_effects
from alexnet_ddp.data.loader import Batch
from alexnet_ddp.export.formats import Runner
from alexnet_ddp.runtime.errors import DataError, WrongExport
from alexnet_ddp.training.metrics import correct_counts

RELATIVE_TOLERANCE = 1e-3
_ABSOLUTE_TOLERANCE = 1e-6
_LEAST_LOG = -80.0  # a smaller logarithm of a probability may be 0 in float32


@dataclass
class Comparison:
    """Sums over the images of a validation set."""

    num_images: int = 0
    num_bad_images: int = 0
    run: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))  # top 1, top 5
    exported: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    num_ties: int = 0  # images of which only one of the two models is correct, at 1 or at 5
    loss_sum: float = 0.0  # of the exported model
    worst: float = 0.0  # largest difference of a log-probability / its tolerance

    def add(self, logits: Tensor, found: Tensor, labels: Tensor, is_probability: bool) -> None:
        """Add n images. logits: of the run's model; found: the output of the exported model.

        All are on the CPU: float32 [n, num_classes] twice, int64 [n]. Raises WrongExport for an
        output of another shape.
        """
        if found.shape != logits.shape or found.dtype != torch.float32:
            shape, dtype = tuple(found.shape), str(found.dtype).removeprefix("torch.")
            rule = f"the exported model returns {dtype} {shape}, not float32 {tuple(logits.shape)}"
            raise WrongExport(f"{rule}; please report this, with the name of the network")
        expected = F.log_softmax(logits, 1).clamp(min=_LEAST_LOG)
        logs = (found.log() if is_probability else F.log_softmax(found, 1)).clamp(min=_LEAST_LOG)
        spread = logits.amax(1) - logits.amin(1)
        tolerance = _ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * spread
        ratio = (logs - expected).abs().amax(1) / tolerance
        self.worst = max(self.worst, float(ratio.nan_to_num(float("inf"), float("inf")).max()))
        ours, theirs = (correct_counts(one, labels)[:, 1:] for one in (logits, found))
        self.run += ours.sum(0)
        self.exported += theirs.sum(0)
        self.num_ties += int((ours != theirs).any(1).sum())
        self.loss_sum += float(F.nll_loss(logs.double(), labels, reduction="sum"))
        self.num_images += len(labels)

    def require_equal(self) -> None:
        """Raise WrongExport unless the outputs agree within the tolerance."""
        if self.worst <= 1:
            return
        ours, theirs = self.run.tolist(), self.exported.tolist()
        counts = (
            f"top-1 {theirs[0]:,} and top-5 {theirs[1]:,} of {self.num_images:,} images, "
            f"the run's model {ours[0]:,} and {ours[1]:,}"
        )
        rule = f"its outputs differ by {self.worst:,.3g} times the tolerance"
        raise WrongExport(
            f"the exported model is wrong: {rule}; it gets {counts}; nothing was written; "
            "please report this, with the name of the network"
        )


@torch.inference_mode()
def compare(
    model: nn.Module,
    exported: Runner,
    batches: Iterable[Batch],
    prepare: Callable[[Tensor], Tensor],
    is_probability: bool,
) -> Comparison:
    """Compare on the images of `batches`. model: the run's, in evaluation mode on their device.

    prepare: makes the exported model's input of uint8 images [n, size, size, 3] on the CPU.
    is_probability: the exported model returns probabilities, otherwise logits.
    Raises WrongExport if the models differ, and DataError if no image could be read.
    """
    total, example = Comparison(), ""
    for batch in batches:
        total.num_bad_images += len(batch.bad)
        example = example or next((f", such as {one.reason}" for one in batch.bad), "")
        if len(batch.labels):
            logits = model(apply_effects(batch.images, batch.effects)).float().cpu()
            found = exported(prepare(batch.images.cpu()))
            total.add(logits, found, batch.labels.cpu(), is_probability)
    if total.num_images == 0:
        raise DataError(f"none of the validation images could be read{example}")
    total.require_equal()
    return total
