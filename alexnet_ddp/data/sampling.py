"""data.sampling: how many images of each class an epoch contains.

Other samplers draw with replacement from a generator; their class counts vary, and ranks draw
different epochs. Here the counts are exact, and an epoch is a function of (seed, epoch) only.
"""

from dataclasses import dataclass

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.runtime.errors import ConfigError

_MAX_DRAW = 2**31  # random numbers take an int32


@dataclass(frozen=True, eq=False)
class ClassSampling:
    """The draws of an epoch: as many as there are training images, of each class a fixed number.

    The images of a class take turns, also across epochs: none is drawn for the (k + 1)-th time
    before all of its class were drawn k times. A draw is image + num_images * k for the k-th
    repeat (k = 0, 1, ...) of an image within the epoch, so that each repeat has its own
    augmentation and dropout masks.

    Raises ConfigError if an image would be repeated so often that draws exceed 32 bits.
    """

    labels: np.ndarray  # int32 [N], of all training images
    counts: np.ndarray  # int64 [C]: draws of each class in an epoch; their sum is N

    def __post_init__(self) -> None:
        repeats = self.repeats()
        if len(self.labels) * (int(repeats.max()) + 2) > _MAX_DRAW:
            c = int(repeats.argmax())
            rule = (
                f"would draw each image of class {c} (its label) {repeats[c]:,.0f} times an epoch"
            )
            raise ConfigError(f"data.sampling {rule}; give it a smaller weight, or add images")

    def repeats(self) -> np.ndarray:
        """float64 [C]: how often an image of each class is drawn in an epoch, on average."""
        sizes = np.bincount(self.labels, minlength=len(self.counts))
        return self.counts / np.maximum(1, sizes)

    def draws(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [N]: the draws of `epoch` (counted from 0), class by class."""
        by_class = np.argsort(self.labels, kind="stable")
        ends = np.cumsum(np.bincount(self.labels, minlength=len(self.counts)))
        pieces = []
        for c in np.flatnonzero(self.counts).tolist():
            members = by_class[ends[c - 1] if c else 0 : ends[c]]
            # The class's draws of all epochs are one sequence: permutation 0 of its images,
            # permutation 1, ... This epoch is the part from `start` to `stop`.
            start, m = epoch * int(self.counts[c]), len(members)
            stop = start + int(self.counts[c])
            turns = np.arange(start // m, (stop - 1) // m + 1)
            order = rng.uniforms(rng.fold(seed, rng.SAMPLING, c), turns, m).argsort(1, "stable")
            repeats = len(self.labels) * np.arange(len(turns))[:, None]
            first = start - int(turns[0]) * m
            pieces.append((members[order] + repeats).ravel()[first : first + stop - start])
        return np.concatenate(pieces)


def build_sampling(
    chosen: str | list[float], labels: np.ndarray, classes: list[str]
) -> ClassSampling:
    """The sampling that data.sampling asks for. labels: int32 [N], of the training images.

    Raises ConfigError if the numbers do not fit the classes.
    """
    sizes = np.bincount(labels, minlength=len(classes))
    match chosen:
        case "balanced":
            weights = (sizes > 0).astype(np.float64)
        case "sqrt":
            weights = np.sqrt(sizes)
        case list():
            weights = np.array(chosen, np.float64)
    if len(weights) != len(classes):
        rule = f"has {len(weights)} numbers, the data has {len(classes)} classes"
        raise ConfigError(f"data.sampling {rule}; give one for each class, in the order of labels")
    empty = [name for name, n, weight in zip(classes, sizes, weights) if weight > 0 and n == 0]
    if empty:
        rule = f"asks for images of class {empty[0]}, which has no training images"
        raise ConfigError(f"data.sampling {rule}; give it the weight 0")
    return ClassSampling(labels, _whole(weights / weights.sum() * len(labels), len(labels)))


def _whole(shares: np.ndarray, total: int) -> np.ndarray:
    """`shares` as integers with the sum `total`: the largest fractions are rounded up."""
    counts = np.floor(shares).astype(np.int64)
    by_fraction = np.argsort(counts - shares, kind="stable")
    counts[by_fraction[: total - int(counts.sum())]] += 1
    return counts


def describe(sampling: ClassSampling, classes: list[str]) -> str:
    """One line for people: the counts, and the class whose images are drawn most often."""
    least, most, repeats = sampling.counts.min(), sampling.counts.max(), sampling.repeats()
    counts = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    c = int(repeats.argmax())
    often = f"an image of {classes[c]} is drawn {repeats[c]:.1f} times, the most often"
    return f"an epoch has {counts} images of a class; {often}"
