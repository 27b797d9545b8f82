"""The confusion matrix and the worst classes, from the outputs for validation images."""

from dataclasses import dataclass

import numpy as np

from alexnet_ddp.runtime.accuracy import Interval, percent_interval
from alexnet_ddp.training.calibration import Scores
from alexnet_ddp.training.class_metrics import first_classes
from alexnet_ddp.training.intervals import bootstrap_intervals

_MAX_MATRIX = 24  # classes: more cannot be read
_MAX_WORST = 20
_MAX_PAIRS = 12
_MAX_SHOWN = 3  # wrong predictions of a class


@dataclass(frozen=True)
class ClassResult:
    """The images of a class. Shares are in percent."""

    name: str
    num_images: int
    top1: float
    low: float  # of the 95 % interval of top1
    high: float
    taken_for: list[tuple[str, int]]


@dataclass(frozen=True)
class Cell:
    """Images of a class with a prediction. share: of the class's images."""

    count: int
    share: float
    is_right: bool
    text: str


@dataclass(frozen=True)
class Confusion:
    """rows: by label; a cell for each prediction, in the same order. others: images predicted as a
    class that is not shown."""

    names: list[str]
    rows: list[list[Cell]]
    num_classes: int  # of the data


@dataclass(frozen=True)
class Classes:
    worst: list[ClassResult]
    num_left_out: int  # classes that are better than those
    confusion: Confusion
    pairs: list[tuple[str, str, int, int]]  # label, prediction, images, images of the label
    balanced: float  # mean of the classes' top-1, in percent
    balanced_interval: Interval | None  # 95 %, in percent; None if all images are right, or wrong


def class_results(scores: Scores, names: list[str]) -> Classes:
    """The results of the images in `scores`. names: unique, in the order of the labels."""
    matrix = confusion_matrix(scores, len(names))
    totals, right = matrix.sum(1), matrix.diagonal()
    known = np.flatnonzero(totals)
    shares = right[known] / totals[known]
    order = known[np.lexsort((known, shares))]
    found = first_classes(scores.logits).numpy()
    intervals = bootstrap_intervals(scores.labels.numpy(), found, len(names))
    ends = intervals["balanced_accuracy"]
    worst = [_result(matrix, int(k), names) for k in order[:_MAX_WORST]]
    wrong = matrix * (1 - np.eye(len(names), dtype=np.int64))
    places = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS].tolist()
    pairs = [divmod(place, len(names)) for place in places if wrong.flat[place]]
    return Classes(
        worst,
        max(0, len(known) - len(worst)),
        _confusion(matrix, wrong, names),
        [(names[i], names[j], int(wrong[i, j]), int(totals[i])) for i, j in pairs],
        100 * float(shares.mean()),
        None if ends is None else (100 * ends[0], 100 * ends[1]),
    )


def confusion_matrix(scores: Scores, num_classes: int) -> np.ndarray:
    """Images by label (row) and prediction (column), int64 [classes, classes]."""
    found = first_classes(scores.logits).numpy()
    flat = scores.labels.numpy() * num_classes + found
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def _result(matrix: np.ndarray, k: int, names: list[str]) -> ClassResult:
    row = matrix[k].copy()
    total, right = int(row.sum()), int(row[k])
    low, high = percent_interval(right, total)
    row[k] = 0
    order = np.argsort(-row, kind="stable")[:_MAX_SHOWN]
    taken_for = [(names[int(j)], int(row[j])) for j in order if row[j]]
    return ClassResult(names[k], total, 100 * right / total, low, high, taken_for)


def _confusion(matrix: np.ndarray, wrong: np.ndarray, names: list[str]) -> Confusion:
    """All classes, or those that are confused most often, in the order of the labels."""
    chosen = np.arange(len(names))
    if len(names) > _MAX_MATRIX:
        chosen = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:_MAX_MATRIX])
    totals = np.maximum(matrix.sum(1), 1)
    rows = [
        [
            Cell(
                int(matrix[i, j]),
                float(matrix[i, j] / totals[i]),
                bool(i == j),
                f"{matrix[i, j]:,} of {matrix[i].sum():,} {names[i]} predicted as {names[j]}",
            )
            for j in chosen
        ]
        for i in chosen
    ]
    return Confusion([names[i] for i in chosen], rows, len(names))
