"""Metrics of single classes and their means, from the outputs of an exact evaluation.

scikit-learn, which is optional, computes them on rank 0. The metrics of a class compare it with all
other classes together (one-vs-rest); the score of an image is the probability of the class.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, SupportsInt

import numpy as np
import torch
from torch import Tensor

from alexnet_ddp.runtime.accuracy import Interval, wilson_interval
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.tables import COUNT, NUMBER, TEXT
from alexnet_ddp.training.calibration import (
    CHUNK_IMAGES,
    NUM_BINS,
    Scores,
    expected_calibration_error,
)
from alexnet_ddp.training.intervals import (
    NUM_RESAMPLES,
    auroc_interval,
    bootstrap_intervals,
    class_auroc,
)

CLASS_COLUMNS: dict[str, str | int] = {
    "class": TEXT,
    "name": TEXT,
    "num_images": COUNT,
    "correct1": COUNT,
    "correct5": COUNT,
    "accuracy": NUMBER,
    "accuracy_low": NUMBER,  # ends of the 95 % interval, as are the others
    "accuracy_high": NUMBER,
    "precision": NUMBER,
    "precision_low": NUMBER,
    "precision_high": NUMBER,
    "recall": NUMBER,
    "f1": NUMBER,
    "f1_low": NUMBER,
    "f1_high": NUMBER,
    "auroc": NUMBER,
    "auroc_low": NUMBER,
    "auroc_high": NUMBER,
    "average_precision": NUMBER,
}
_AVERAGES = ("macro", "micro", "weighted")


@dataclass(frozen=True)
class ClassMetrics:
    """Precision and recall are in [0, 1], also F1, AUROC and average precision.

    As in scikit-learn, the precision of a class that is never predicted is 0, and the recall of a
    class without images. AUROC and average precision of such a class are NaN.
    """

    precision: np.ndarray  # float64 [classes], as the others without a shape
    recall: np.ndarray
    f1: np.ndarray
    auroc: np.ndarray
    auroc_interval: np.ndarray  # float64 [classes, 2]: low and high; NaN if it is undefined
    average_precision: np.ndarray
    confusion: np.ndarray  # int64 [classes, classes]: images by label (row) and prediction (column)
    summary: dict[str, Any]  # the means over classes, and the metrics of all images


def require_sklearn() -> None:
    """Raise ConfigError if scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise ConfigError("metrics=true needs scikit-learn; pip install 'alexnet-ddp[metrics]'")


def class_metrics(scores: Scores) -> ClassMetrics:
    """The metrics of the images. For 50,000 images of 1,000 classes it takes a minute.

    The means of AUROC and average precision are over the classes that have images and are not the
    only class; those of precision, recall and F1 over the classes that have images or are
    predicted, as in scikit-learn.
    """
    from sklearn import metrics

    num_classes = scores.logits.shape[1]
    labels, found = scores.labels.numpy(), first_classes(scores.logits).numpy()
    with warnings.catch_warnings():
        # A class without images, or one that is never predicted: see ClassMetrics.
        warnings.simplefilter("ignore", UserWarning)
        each = metrics.precision_recall_fscore_support(
            labels, found, labels=range(num_classes), zero_division=0.0
        )
        means = {
            average: metrics.precision_recall_fscore_support(
                labels, found, average=average, zero_division=0.0
            )
            for average in _AVERAGES
        }
        balanced = metrics.balanced_accuracy_score(labels, found)
        confusion = metrics.confusion_matrix(labels, found, labels=range(num_classes))
        kappa = metrics.cohen_kappa_score(labels, found)
    ranking = _ranking_metrics(scores)
    summary: dict[str, Any] = {
        name: {average: float(means[average][k]) for average in _AVERAGES}
        for k, name in enumerate(("precision", "recall", "f1"))
    }
    summary |= {
        "balanced_accuracy": float(balanced),
        "auroc_macro": _mean(ranking.auroc),
        "average_precision_macro": _mean(ranking.average_precision),
        "cohen_kappa": _finite(float(kappa)),
        "expected_calibration_error": expected_calibration_error(scores.logits, scores.labels, 1.0),
        "calibration_bins": NUM_BINS,
        "intervals_95": {
            **bootstrap_intervals(labels, found, num_classes),
            "auroc_macro": ranking.auroc_macro_interval,
        },
        "num_resamples": NUM_RESAMPLES,
    }
    return ClassMetrics(
        each[0],
        each[1],
        each[2],
        ranking.auroc,
        ranking.auroc_interval,
        ranking.average_precision,
        confusion,
        summary,
    )


def first_classes(logits: Tensor) -> Tensor:
    """int64 [n]: the most probable class of each image, as top-1 counts it."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]


def class_rows(
    found: ClassMetrics, ids: list[str], names: list[str], counts: Tensor
) -> Iterator[dict[str, Any]]:
    """The rows of evaluation_classes.csv, in the order of the labels.

    ids, names: folder names and readable names. counts: Evaluation.per_class.
    """
    num_predicted = found.confusion.sum(0)
    for k, (num_images, correct1, correct5) in enumerate(counts.tolist()):
        num_right, num_labelled = found.confusion[k, k], found.confusion[k].sum()
        row = {
            "class": ids[k],
            "name": names[k],
            "num_images": num_images,
            "correct1": correct1,
            "correct5": correct5,
            "accuracy": correct1 / num_images if num_images else math.nan,
            **_share("accuracy", correct1, num_images),
            "precision": float(found.precision[k]),
            **_share("precision", num_right, num_predicted[k]),
            "recall": float(found.recall[k]) if num_images else math.nan,
            "f1": float(found.f1[k]),
            **_f1_interval(num_right, num_labelled + num_predicted[k] - num_right),
            "auroc": float(found.auroc[k]),
            "auroc_low": float(found.auroc_interval[k, 0]),
            "auroc_high": float(found.auroc_interval[k, 1]),
            "average_precision": float(found.average_precision[k]),
        }
        yield {
            name: value
            for name, value in row.items()
            if not (isinstance(value, float) and math.isnan(value))
        }


def image_rows(scores: Scores, names: list[str], top_k: int) -> Iterator[dict[str, Any]]:
    """class_1, probability_1, class_2, ... and the loss of each image that could be read."""
    for logits, labels in zip(scores.logits.split(CHUNK_IMAGES), scores.labels.split(CHUNK_IMAGES)):
        shares = logits.double().log_softmax(1)
        losses = -shares.gather(1, labels[:, None])[:, 0]
        top = shares.topk(min(top_k, len(names)), dim=1)
        rows = zip(top.indices.tolist(), top.values.exp().tolist(), losses.tolist())
        for classes, probabilities, loss in rows:
            row: dict[str, Any] = {}
            for k, (label, probability) in enumerate(zip(classes, probabilities), 1):
                row |= {f"class_{k}": names[label], f"probability_{k}": probability}
            yield row | {"loss": loss}


def confusions(found: ClassMetrics, names: list[str]) -> dict[str, dict[str, int]]:
    """Label -> prediction -> number of images, the most frequent prediction first.

    Only of pairs that have images: a matrix of 1,000 classes is mostly zeros.
    """
    result = {}
    for k, name in enumerate(names):
        row = found.confusion[k]
        order = np.argsort(-row, kind="stable")[: np.count_nonzero(row)]
        result[name] = {names[other]: int(row[other]) for other in order.tolist()}
    return result


def unique_names(names: list[str]) -> list[str]:
    """The names of the classes; those that several classes have, with the label too."""
    known = Counter(names)  # two WordNet ids are both "crane"
    return [f"{name} ({label})" if known[name] > 1 else name for label, name in enumerate(names)]


@dataclass(frozen=True)
class _Ranking:
    """AUROC and average precision of the classes, float64 [classes]; NaN if it is undefined."""

    auroc: np.ndarray
    auroc_interval: np.ndarray  # [classes, 2]
    average_precision: np.ndarray
    auroc_macro_interval: Interval | None


def _ranking_metrics(scores: Scores) -> _Ranking:
    from sklearn.metrics import average_precision_score

    n, num_classes = scores.logits.shape
    auroc, average_precision = np.full((2, num_classes), np.nan)
    interval, influence = np.full((num_classes, 2), np.nan), np.zeros(n)
    normaliser = torch.cat(
        [some.double().logsumexp(1) for some in scores.logits.split(CHUNK_IMAGES)]
    )
    for k in range(num_classes):
        is_class = (scores.labels == k).numpy()
        if is_class.any() and not is_class.all():
            # One column at a time: float64 probabilities of all classes would be 400 MB.
            probability = (scores.logits[:, k].double() - normaliser).exp().numpy()
            found = class_auroc(probability, is_class)
            auroc[k], influence = found.value, influence + found.influence
            if found.interval is not None:
                interval[k] = found.interval
            average_precision[k] = average_precision_score(is_class, probability)
    num_known, mean = np.count_nonzero(~np.isnan(auroc)), _mean(auroc)
    of_mean = None if mean is None else auroc_interval(mean, influence / num_known)
    return _Ranking(auroc, interval, average_precision, of_mean)


def _share(name: str, count: SupportsInt, num_images: SupportsInt) -> dict[str, float]:
    """The interval of count / num_images as NAME_low and NAME_high; empty without images."""
    n = int(num_images)
    ends = wilson_interval(int(count), n) if n else ()
    return {f"{name}_{end}": value for end, value in zip(("low", "high"), ends)}


def _f1_interval(num_right: SupportsInt, num_either: SupportsInt) -> dict[str, float]:
    """The interval of the F1 of a class as f1_low and f1_high; empty without such images.

    Of the images that have the class as label or as prediction, F1 is 2 s / (1 + s) for the share s
    that has it as both.

    num_right: images with it as both. num_either: images with it as at least one of them.
    """
    shares = _share("f1", num_right, num_either)
    return {name: 2 * share / (1 + share) for name, share in shares.items()}


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
