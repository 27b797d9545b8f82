"""Metrics as sums and counts. Means are computed when a row is written, and never averaged."""

import time

import torch
from torch import Tensor

from alexnet_ddp.data.loader import Batch
from alexnet_ddp.plugins import METRICS
from alexnet_ddp.runtime.distributed import sum_over_ranks
from alexnet_ddp.runtime.errors import ConfigError

_SUMS = ("loss", "correct1", "correct5", "images", "weight")
_TAKEN = frozenset(("loss", "top1", "top5", "num_images", "correct1", "correct5", "num_bad_images"))


class Meter:
    """Sums over images, on the device until read(). float64: counts are exact to 2**53.

    `local`: float64 [5], the sums of this rank since the last read().
    """

    def __init__(self, device: torch.device) -> None:
        self.local = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._total = torch.zeros(len(_SUMS), dtype=torch.float64)

    def add(
        self, loss_sum: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None
    ) -> None:
        """Add n images. No host wait.

        loss_sum: scalar, summed over the images; logits: [n, classes]; labels: int64 [n].
        weight: scalar, the sum of the images' weights in the loss; None if each counts 1.
        """
        images, correct1, correct5 = correct_counts(logits.detach(), labels).sum(0)
        loss, weight = loss_sum.detach().double(), images if weight is None else weight.double()
        self.local += torch.stack([loss, correct1, correct5, images, weight])

    def read(self) -> dict[str, float]:
        """Collective. Return the sums over all ranks since reset(). Waits for the device."""
        self._total += sum_over_ranks(self.local).cpu()
        self.local.zero_()
        return dict(zip(_SUMS, self._total.tolist()))

    def load(self, sums: dict[str, float]) -> None:
        """Restore what read() returned."""
        older = {"weight": sums["images"]}  # of a checkpoint that has no sum of weights
        total = [(older | sums)[name] for name in _SUMS]
        self._total = torch.tensor(total, dtype=torch.float64)

    def reset(self) -> None:
        """Start a new row."""
        self._total.zero_()


class UserMetrics:
    """Means of registered metrics over the images of an evaluation. row() waits for the device."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        """Raises ConfigError for a name that no plugin has registered, or that is taken."""
        for name in _TAKEN.intersection(names):
            rule = f"val/{name} is reported by every evaluation"
            raise ConfigError(f"trainer.metrics ({name}): {rule}; register it under another name")
        self._metrics = {name: METRICS.get(name) for name in names}
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits: float [n, classes]; labels: int64 [n]. Raises ConfigError for a wrong result."""
        for k, (name, metric) in enumerate(self._metrics.items()):
            values = metric(logits, labels)
            if not isinstance(values, Tensor) or values.shape != labels.shape:
                found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                rule = f"must return one number per image, a tensor of {tuple(labels.shape)}"
                raise ConfigError(f"trainer.metrics ({name}) {rule}, it returned {found}")
            self._sums[k] += values.double().sum()

    def row(self, num_images: int) -> dict[str, float]:
        """Collective if there are metrics. val/NAME: the mean over num_images, of all ranks."""
        if not self._metrics:
            return {}
        sums = sum_over_ranks(self._sums).tolist()
        return {f"val/{name}": total / num_images for name, total in zip(self._metrics, sums)}


class Confusion:
    """Counts the images of an evaluation by label and predicted class, on the device until read."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self._counts = torch.zeros(num_classes**2, dtype=torch.int64, device=device)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add the images of a batch. logits: [n, classes]. No host wait."""
        # Of equal logits, topk of 5 chooses the class that top-1 counts.
        predicted = logits.topk(min(5, self._num_classes), dim=1).indices[:, 0]
        pairs = batch.labels * self._num_classes + predicted
        self._counts.index_add_(0, pairs, torch.ones_like(pairs))

    def read(self) -> Tensor:
        """Collective. Return int64 [label, predicted class] on the CPU, of all ranks. Once."""
        return sum_over_ranks(self._counts).cpu().view(self._num_classes, -1)


def correct_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Return int64 [n, 3]: 1, correct in the top 1, correct in the top 5."""
    is_label = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([torch.ones_like(labels), is_label[:, 0], is_label.any(1)], dim=1)


def train_row(sums: dict[str, float]) -> dict[str, float]:
    """Return loss (weighted mean) and top1 (percent); empty if no step was applied."""
    if sums["images"] == 0:
        return {}
    return {
        "train/loss": sums["loss"] / sums["weight"],
        "train/top1": 100 * sums["correct1"] / sums["images"],
    }


def evaluation_row(sums: dict[str, float]) -> dict[str, float | int]:
    """Return means and percentages, and the exact counts."""
    n = int(sums["images"])
    correct1, correct5 = int(sums["correct1"]), int(sums["correct5"])
    return {
        "val/loss": sums["loss"] / n,
        "val/top1": 100 * correct1 / n,
        "val/top5": 100 * correct5 / n,
        "val/num_images": n,
        "val/correct1": correct1,
        "val/correct5": correct5,
    }


class Throughput:
    """Images per second and seconds per step since the last row."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._images = self._bad = self._steps = 0
        self._waited_s = 0.0

    def add(self, planned: int, seen: int) -> None:
        """Add a step of `planned` images, of which `seen` could be read."""
        self._images += seen
        self._bad += planned - seen
        self._steps += 1

    @property
    def steps(self) -> int:
        return self._steps

    def pause(self, seconds: float) -> None:
        """Leave out `seconds` that were not training: an evaluation, a checkpoint."""
        self._began += seconds

    def row(self, waited_s: float) -> dict[str, float]:
        """Return images/s over all ranks, seconds per step, and this rank's wait for data.

        waited_s: seconds that this rank has waited for data since the start of the process.
        """
        now = time.monotonic()
        row = {
            "train/images_per_sec": self._images / max(1e-9, now - self._began),
            "time/step_s": (now - self._began) / max(1, self._steps),
            "time/data_s": (waited_s - self._waited_s) / max(1, self._steps),
        }
        if self._bad:
            row["data/num_bad_images"] = self._bad
        self._began, self._waited_s = now, waited_s
        self._images = self._bad = self._steps = 0
        return row
