"""Confidence intervals: the bootstrap of means over classes, DeLong's of AUROC."""

import math

import numpy as np
import pytest
from sklearn import metrics

from alexnet_ddp.training import intervals as ours


def predictions(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions that are right six times in ten, int64 [n] each."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    found = np.where(rng.random(n) < 0.6, labels, rng.integers(classes, size=n))
    return labels, found


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_the_means_of_a_resample_are_those_of_scikit_learn():
    labels, found = predictions(60, 9)
    labels[labels == 3] = 4  # a class that is only predicted
    kept = (labels != 5) & (found != 5)  # one without images and predictions
    labels, found = labels[kept], found[kept]
    expected = (
        metrics.f1_score(labels, found, average="macro"),
        metrics.f1_score(labels, found, average="weighted"),
        metrics.balanced_accuracy_score(labels, found),
    )
    assert ours._class_means(labels, found, 9) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_intervals_are_those_of_a_multinomial_and_the_same_every_time():
    """A resample of the images is a multinomial sample of the cells of the confusion matrix."""
    labels, found = predictions(400, 5)
    intervals = ours.bootstrap_intervals(labels, found, 5)
    assert intervals == ours.bootstrap_intervals(labels, found, 5)
    matrix = metrics.confusion_matrix(labels, found)
    drawn = np.random.default_rng(1).multinomial(400, matrix.ravel() / 400, 4000)
    drawn = drawn.reshape(-1, 5, 5)
    right, of_label, of_found = drawn.diagonal(0, 1, 2), drawn.sum(2), drawn.sum(1)
    f1, recall = 2 * right / (of_label + of_found), right / of_label
    expected = {
        "f1_macro": f1.mean(1),
        "f1_weighted": (f1 * of_label).sum(1) / 400,
        "balanced_accuracy": recall.mean(1),
    }
    for name, values in expected.items():  # many images of each class: almost no bias
        ends = np.quantile(values, (0.025, 0.975))
        assert intervals[name] == pytest.approx(ends, abs=0.01), name
    low, high = intervals["f1_macro"]
    assert low < metrics.f1_score(labels, found, average="macro") < high


def test_the_bias_of_resamples_is_corrected():
    """Of classes with four images each: macro F1 of most resamples is below that of the images."""
    labels, found = predictions(160, 40)
    low, high = ours.bootstrap_intervals(labels, found, 40)["f1_macro"]
    mean = ours._class_means(labels, found, 40)[0]
    drawn = [np.random.default_rng(k).integers(160, size=160) for k in range(500)]
    values = np.array([ours._class_means(labels[one], found[one], 40)[0] for one in drawn])
    assert (values < mean).mean() > 0.6
    plain = np.quantile(values, (0.025, 0.975))
    assert low > plain[0] + 0.01
    assert high > plain[1] + 0.01


def scores(n: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, float64 [n], and whether an image is of the class."""
    rng = np.random.default_rng(seed)
    is_class = rng.random(n) < share
    return np.round(rng.normal(size=n) + is_class, 1), is_class


def test_auroc_is_scikit_learns_and_its_variance_is_that_of_delong():
    values, is_class = scores(120, 0.3)
    found = ours.class_auroc(values, is_class)
    assert found.value == pytest.approx(metrics.roc_auc_score(is_class, values), abs=1e-12)
    own, others = values[is_class][:, None], values[~is_class][None]
    wins = (own > others) + 0.5 * (own == others)
    variance = wins.mean(1).var(ddof=1) / wins.shape[0] + wins.mean(0).var(ddof=1) / wins.shape[1]
    assert np.square(found.influence).sum() == pytest.approx(variance, rel=1e-12)
    half = 1.959964 * math.sqrt(variance) / (found.value * (1 - found.value))
    centre = math.log(found.value / (1 - found.value))
    expected = [1 / (1 + math.exp(-x)) for x in (centre - half, centre + half)]
    assert found.interval == pytest.approx(expected, abs=1e-6)


def test_classes_that_share_their_errors_are_not_counted_as_independent():
    """With two classes both AUROCs are the same number, and so is the interval of their mean."""
    values, is_class = scores(300, 0.5)
    one, other = ours.class_auroc(values, is_class), ours.class_auroc(-values, ~is_class)
    mean = (one.influence + other.influence) / 2
    assert ours.auroc_interval(one.value, mean) == pytest.approx(one.interval, abs=1e-12)


def test_the_interval_of_a_macro_auroc_is_about_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300)
    logits = rng.normal(size=(300, 4)) + np.eye(4)[labels]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = [ours.class_auroc(shares[:, k], labels == k) for k in range(4)]
    mean = np.mean([one.value for one in found])
    low, high = ours.auroc_interval(mean, sum(one.influence for one in found) / 4)
    drawn = []
    for _ in range(400):
        rows = rng.integers(300, size=300)
        each = [ours.class_auroc(shares[rows, k], labels[rows] == k).value for k in range(4)]
        drawn.append(np.mean(each))
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.012)


def test_what_is_undefined_has_no_interval():
    values = np.array([0.1, 0.2, 0.8, 0.9])
    assert ours.class_auroc(values, values > 0.5).interval is None  # an AUROC of 1
    labels = np.arange(5)
    for found in (labels, (labels + 1) % 5):  # all right, all wrong: equal resamples
        assert set(ours.bootstrap_intervals(labels, found, 5).values()) == {None}
    single = ours.class_auroc(values, np.array([False, True, False, False]))
    assert (single.value, single.interval) == (pytest.approx(1 / 3), None)
