"""Accuracies: shares of images in percent, with their 95 % confidence intervals. Needs no numpy.

The validation images count as a sample. An interval covers the chance of drawing other images of
the same kind, not other seeds or trainings.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)  # the normal distribution has 95 % within +- this many deviations

Interval = tuple[float, float]

_CORRECT = {"val/top1": "val/correct1", "val/top5": "val/correct5"}  # of val/num_images


def wilson_interval(num_correct: int, num_images: int) -> Interval:
    """The 95 % confidence interval of a share, in [0, 1] (E. B. Wilson, 1927).

    It is within [0, 1] and not empty for shares of 0 and 1 too, other than +- 1.96 deviations.
    """
    share, z2 = num_correct / num_images, Z**2
    centre = share + z2 / (2 * num_images)
    half = Z * math.sqrt(share * (1 - share) / num_images + z2 / (4 * num_images**2))
    scale = 1 + z2 / num_images
    low = 0.0 if num_correct == 0 else (centre - half) / scale
    high = 1.0 if num_correct == num_images else (centre + half) / scale
    return low, high  # the ends at 0 and 1 are exact, which the formula misses by rounding


def percent_interval(num_correct: int, num_images: int) -> Interval:
    """wilson_interval in percent."""
    low, high = wilson_interval(num_correct, num_images)
    return 100 * low, 100 * high


def counts_of(row: Mapping[str, Any], metric: str) -> tuple[int, int] | None:
    """The correct images and all images of a metric in a row of metrics.jsonl.

    None if the metric is not a share of images, or if the row has no counts. Raises ValueError if
    they are damaged.
    """
    name = _CORRECT.get(metric, "")
    if name not in row or not row.get("val/num_images"):
        return None
    return checked_counts(row[name], row["val/num_images"])


def checked_counts(num_correct: float, num_images: float) -> tuple[int, int]:
    """Return both as integers. Raises ValueError unless 0 <= num_correct <= num_images."""
    if not 0 <= float(num_correct) <= float(num_images) < math.inf:
        raise ValueError(f"{num_correct} correct of {num_images} images")
    return int(num_correct), int(num_images)


def metric_interval(row: Mapping[str, Any], metric: str) -> Interval | None:
    """The interval in percent of a metric in a row of metrics.jsonl; None without counts_of()."""
    counts = counts_of(row, metric)
    return None if counts is None else percent_interval(*counts)


def interval_columns(metric: str) -> list[str]:
    """The columns of a table for the ends of an interval, such as top1_low and top1_high.

    Empty if the metric is not a share of images.
    """
    name = metric.removeprefix("val/")
    return [f"{name}_low", f"{name}_high"] if metric in _CORRECT else []


def interval_cells(metric: str, interval: Interval | None) -> dict[str, float]:
    """The ends of the interval of a metric by column; empty if there is none."""
    return dict(zip(interval_columns(metric), interval or ()))


def interval_text(ends: Sequence[float] | None, num_decimals: int = 1) -> str:
    """Return `94.1–97.3`; "" if there is no interval."""
    return "–".join(f"{end:.{num_decimals}f}" for end in ends or ())


def intervals_text(row: Mapping[str, Any], num_decimals: int = 1) -> str:
    """Return `95 % interval of top-1: 94.1–97.3 %, of top-5: 99.2–100.0 %`.

    row: of metrics.jsonl. Returns "" if it has no counts.
    """
    texts = [interval_text(metric_interval(row, f"val/top{k}"), num_decimals) for k in (1, 5)]
    return "95 % interval of top-1: {} %, of top-5: {} %".format(*texts) if all(texts) else ""
