"""95 % confidence intervals of means over classes, and of AUROC.

Those of shares of images are in runtime/accuracy.py.
"""

import math
from dataclasses import dataclass

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.runtime.accuracy import NORMAL, Interval, Z

NUM_RESAMPLES = 2000


def bootstrap_intervals(
    labels: np.ndarray, found: np.ndarray, num_classes: int
) -> dict[str, Interval | None]:
    """Intervals of f1_macro, f1_weighted and balanced_accuracy.

    None if all resamples have the same value, as if all images are right, or all are wrong: this
    would be an interval without width, and the truth is not that certain.

    Images are drawn with replacement, NUM_RESAMPLES times as many as there are. The draws are a
    function of their number. The quantiles are corrected for bias (B. Efron, 1981), because macro
    F1 is lower in resamples of classes with few images.

    labels, found: int64 [n], the label and the first class of each image.
    """
    n, key = len(labels), rng.fold(0, rng.BOOTSTRAP)
    values = np.empty((NUM_RESAMPLES, 3))
    for k in range(NUM_RESAMPLES):
        drawn = (rng.uniforms(key, np.array([k]), n)[0] * n).astype(np.int64)
        values[k] = _class_means(labels[drawn], found[drawn], num_classes)
    names = ("f1_macro", "f1_weighted", "balanced_accuracy")
    found_means = _class_means(labels, found, num_classes)
    return {
        name: _corrected_quantiles(values[:, k], found_means[k]) for k, name in enumerate(names)
    }


def _corrected_quantiles(values: np.ndarray, found: float) -> Interval | None:
    """The ends of 95 % of `values`, of resamples, moved by the bias that they have from `found`.

    None if all values are equal.
    """
    if values.min() == values.max():
        return None
    # Equal values count half; at least half a resample lies on each side.
    share = (np.mean(values < found) + np.mean(values <= found)) / 2
    least = 0.5 / len(values)
    bias = NORMAL.inv_cdf(min(max(float(share), least), 1 - least))
    low, high = np.quantile(values, [NORMAL.cdf(2 * bias + z) for z in (-Z, Z)])
    return float(low), float(high)


def _class_means(
    labels: np.ndarray, found: np.ndarray, num_classes: int
) -> tuple[float, float, float]:
    """Macro F1, weighted F1 and balanced accuracy as scikit-learn defines them.

    A class counts in macro F1 if it has an image or a prediction, in the others if it has an image.
    """
    of_label = np.bincount(labels, minlength=num_classes)
    of_found = np.bincount(found, minlength=num_classes)
    right = np.bincount(labels[labels == found], minlength=num_classes)
    either = of_label + of_found
    f1 = 2 * right / np.maximum(either, 1)
    recall = right / np.maximum(of_label, 1)
    weighted = (f1 * of_label).sum() / len(labels)
    return f1.sum() / (either > 0).sum(), weighted, recall.sum() / (of_label > 0).sum()


@dataclass(frozen=True)
class Auroc:
    """The AUROC of a class against all others.

    influence: float64 [n], what each image adds to the error: the sum of the squares is the
    variance that E. R. DeLong et al. (1988) derive.
    """

    value: float
    influence: np.ndarray
    interval: Interval | None  # None if it is undefined: see auroc_interval


def class_auroc(scores: np.ndarray, is_class: np.ndarray) -> Auroc:
    """The AUROC of one class. Takes 10 ms for 50,000 images.

    scores: float64 [n]. is_class: bool [n], with images of both kinds.
    """
    own, others = scores[is_class], scores[~is_class]
    below = _shares_below(np.sort(others), own)
    above = 1 - _shares_below(np.sort(own), others)
    value = float(below.mean())
    influence = np.empty(len(scores))
    influence[is_class] = (below - value) / _scale(len(own))
    influence[~is_class] = (above - value) / _scale(len(others))
    has_spread = min(len(own), len(others)) > 1
    interval = auroc_interval(value, influence) if has_spread else None
    return Auroc(value, influence, interval)


def auroc_interval(value: float, influence: np.ndarray) -> Interval | None:
    """The interval of an AUROC, or of a mean of several, on the logit scale.

    influence: of each image; for a mean the mean of the classes' influences, so that errors that
    classes share are not counted as independent. None for 0 and 1, whose variance is estimated
    as 0.
    """
    deviation = math.sqrt(float(np.square(influence).sum()))
    if not 0 < value < 1 or deviation == 0:
        return None
    half = Z * deviation / (value * (1 - value))
    centre = math.log(value / (1 - value))
    return _logistic(centre - half), _logistic(centre + half)


def _shares_below(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The share of `ordered` that is less than each value; equal ones count half."""
    ends = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return ends / (2 * len(ordered))


def _scale(n: int) -> float:
    """What makes squares add up to the unbiased variance of a mean of n values; 1 for n = 1."""
    return math.sqrt(max(1, n * (n - 1)))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
