"""Calibration by one temperature: probabilities that agree with the accuracy.

The logits of a network are divided by the number that minimises the loss of the validation images
(C. Guo et al., On Calibration of Modern Neural Networks, 2017). The order of the classes does not
change. calibration.json in the run's directory holds the temperature and names the checkpoint.
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ddp.checkpoint.format import MANIFEST, step_of
from alexnet_ddp.data.loader import Batch
from alexnet_ddp.runtime.distributed import World, all_gather
from alexnet_ddp.runtime.errors import ConfigError, DataError, Diverged
from alexnet_ddp.runtime.files import write_json

log = logging.getLogger(__name__)

FILE = "calibration.json"
NUM_BINS = 15
_LARGEST = 100.0  # temperatures are searched from 1 / _LARGEST to _LARGEST
CHUNK_IMAGES = 4096  # images whose float64 probabilities are in memory at once
_MAX_STEPS = 200


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the validation images before and after the logits are divided by it."""

    temperature: float
    num_images: int
    loss_before: float  # mean cross-entropy
    loss_after: float
    ece_before: float  # expected calibration error, in [0, 1]
    ece_after: float


@dataclass(frozen=True)
class Scores:
    """The outputs of an evaluation for each image that could be read, in the order of the images.

    On the CPU.
    """

    logits: Tensor  # float32 [N, classes]
    labels: Tensor  # int64 [N]
    indices: Tensor  # int64 [N]: of the images


class Outputs:
    """Collects the logits of an evaluation."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []  # int64 [n, 2]: index, label; the logits

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Keep the logits of a batch, float [n, classes], in host memory. Waits for the device."""
        images = torch.stack([batch.indices.long(), batch.labels.long()], dim=1)
        self._rows.append((images.cpu(), logits.float().cpu()))

    def gather(self, world: World) -> Scores | None:
        """Collective. The outputs of all ranks on rank 0; other ranks get None."""
        height = max((len(images) for images, _ in self._rows), default=0)
        width = self._rows[0][1].shape[1] if self._rows else 0
        sizes = torch.tensor([len(self._rows), height, width], device=world.device)
        rounds, height, width = all_gather(sizes, world).amax(0).tolist()
        received = []
        for k in range(rounds):
            # float64 holds each index, label and float32 exactly, so that one message is enough.
            mine = torch.full((height, 2 + width), -1.0, dtype=torch.float64)
            if k < len(self._rows):
                images, logits = self._rows[k]
                mine[: len(images), :2], mine[: len(images), 2:] = images, logits
            both = all_gather(mine.to(world.device), world).flatten(0, 1)
            if world.is_main:
                both = both[both[:, 0] >= 0].cpu()  # without the padding
                received.append((both[:, :2].long(), both[:, 2:].float()))
        if not world.is_main:
            return None
        images = torch.cat([images for images, _ in received])
        order = images[:, 0].argsort()
        indices, labels = images[order].unbind(1)
        return Scores(torch.cat([logits for _, logits in received])[order], labels, indices)


def require_finite(logits: Tensor, network: str, remedy: str) -> None:
    """Raise Diverged if an image has no probabilities: a NaN, inf, or -inf for all classes.

    -inf for some classes is allowed: only_present gives it. logits: float [n, classes]. network,
    remedy: for the message.
    """
    num_bad = int((~logits.amax(1).isfinite()).sum())  # amax keeps NaN
    if num_bad:
        fact = f"the outputs of {network} for {num_bad:,} of {len(logits):,} images are not finite"
        raise Diverged(f"{fact}, so that nothing is written; {remedy}")


def fit(logits: Tensor, labels: Tensor) -> Calibration:
    """Find the temperature that minimises the mean cross-entropy, in float64.

    The loss is a convex function of 1 / temperature, so that Newton's method within a bracket finds
    its only minimum. The result depends on nothing but the arguments.

    logits: float [n, classes]; labels: int64 [n]; on the CPU. Raises DataError if there is no
    minimum: the images are all classified correctly, or no better than by chance.
    """
    low, high = 1 / _LARGEST, _LARGEST
    # Comparisons with NaN are false, so that NaN is refused too.
    if not _slopes(logits, labels, low)[0] < 0:
        why = f"the logits of {len(labels):,} validation images do not fit their labels"
        raise DataError(f"calibrate=true: {why} better than chance; train the run first")
    if not _slopes(logits, labels, high)[0] > 0:
        why = f"the network is right, and sure, about all {len(labels):,} validation images"
        raise DataError(f"calibrate=true: {why}; use more images, which training has not seen")
    inverse = 1.0
    for _ in range(_MAX_STEPS):
        slope, curvature = _slopes(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        new = inverse - slope / curvature if curvature > 0 else low
        if not low < new < high:
            new = math.sqrt(low * high)
        change, inverse = abs(new / inverse - 1), new
        if change < 1e-12:
            break
    temperature = 1 / inverse
    return Calibration(
        temperature,
        len(labels),
        _loss(logits, labels, 1.0),
        _loss(logits, labels, temperature),
        expected_calibration_error(logits, labels, 1.0),
        expected_calibration_error(logits, labels, temperature),
    )


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """The mean difference between confidence and accuracy, in [0, 1].

    Images are divided by the probability of their first class into NUM_BINS bins of equal width.
    The differences between the mean probability and the accuracy of the bins are weighted by the
    number of images. logits: float [n, classes]; labels: int64 [n].
    """
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64)
    for some, right in zip(logits.split(CHUNK_IMAGES), labels.split(CHUNK_IMAGES)):
        confidence, found = (some.double() / temperature).softmax(1).topk(1)
        bins = (confidence[:, 0] * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        gaps.index_add_(0, bins, (found[:, 0] == right).double() - confidence[:, 0])
    return gaps.abs().sum().item() / len(labels)


def _slopes(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean loss by 1 / temperature."""
    first = second = 0.0
    for some, right in zip(logits.split(CHUNK_IMAGES), labels.split(CHUNK_IMAGES)):
        z = some.double()
        p = (z * inverse).softmax(1)
        mean = (p * z).sum(1)
        first += (mean - z.gather(1, right[:, None])[:, 0]).sum().item()
        second += (p * (z - mean[:, None]).square()).sum().item()
    return first / len(labels), second / len(labels)


def _loss(logits: Tensor, labels: Tensor, temperature: float) -> float:
    total = sum(
        F.cross_entropy(some.double() / temperature, right, reduction="sum").item()
        for some, right in zip(logits.split(CHUNK_IMAGES), labels.split(CHUNK_IMAGES))
    )
    return total / len(labels)


# --- the file of a run --------------------------------------------------------------------------


def write_calibration(run_dir: Path, checkpoint: Path, found: Calibration) -> None:
    """Write calibration.json. checkpoint: the directory whose network was evaluated."""
    about = {
        "checkpoint": checkpoint.name,
        "step": step_of(checkpoint),
        "digest": _digest(checkpoint),
    }
    write_json(run_dir / FILE, about | asdict(found) | {"num_bins": NUM_BINS})


def read_temperature(run_dir: Path, checkpoint: Path) -> float | None:
    """The temperature for the network of `checkpoint`, or None if it was not calibrated.

    A calibration of another checkpoint is not used, which a warning reports. Raises ConfigError for
    a damaged file.
    """
    file = run_dir / FILE
    remedy = f"start evaluate run.name={run_dir.name} calibrate=true again"
    try:
        known = json.loads(file.read_bytes())
        name, digest = str(known["checkpoint"]), known["digest"]
        temperature = float(known["temperature"])
        if not (0 < temperature < math.inf):
            raise ValueError(f"temperature {temperature}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"cannot be used ({type(error).__name__}: {error})"
        raise ConfigError(f"{file} {why}; remove it, or {remedy}") from error
    if digest != _digest(checkpoint):
        rule = f"{file} is of {name} and not of {checkpoint.name}, the best checkpoint now"
        log.warning("%s: it is not used; %s", rule, remedy)
        return None
    return temperature


def _digest(checkpoint: Path) -> str:
    """SHA-256 (hex) of the manifest, which holds the SHA-256 of every file of the checkpoint."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
