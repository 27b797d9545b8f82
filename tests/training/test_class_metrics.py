"""Metrics of classes: scikit-learn's, from scores in memory; what is undefined has no value."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.training import class_metrics as ours
from alexnet_ddp.training.calibration import Scores


def scores(n=400, classes=4, missing=()):
    """Outputs that are right more often than not; no image has a label of `missing`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    for label in missing:
        labels[labels == label] = 0
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 1
    return Scores(logits, labels, torch.arange(n))


def test_the_means_are_those_that_scikit_learn_computes_from_all_probabilities():
    given = scores()
    found = ours.class_metrics(given)
    labels, predicted = given.labels.numpy(), given.logits.argmax(1).numpy()
    shares = given.logits.double().softmax(1).numpy()
    one_hot = np.eye(4)[labels]
    expected = {
        "auroc_macro": metrics.roc_auc_score(labels, shares, multi_class="ovr"),
        "average_precision_macro": metrics.average_precision_score(one_hot, shares),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
        "cohen_kappa": metrics.cohen_kappa_score(labels, predicted),
    }
    for name, value in expected.items():
        assert found.summary[name] == pytest.approx(value, abs=1e-12), name
    for average in ("macro", "micro", "weighted"):
        value = metrics.f1_score(labels, predicted, average=average)
        assert found.summary["f1"][average] == pytest.approx(value, abs=1e-12)
    assert found.confusion.tolist() == metrics.confusion_matrix(labels, predicted).tolist()
    assert 0 < found.summary["expected_calibration_error"] < 0.5


def test_a_class_without_images_has_no_auroc_and_does_not_count_in_its_mean():
    given = scores(missing=[2])
    found = ours.class_metrics(given)
    assert [math.isnan(value) for value in found.auroc] == [False, False, True, False]
    shares = given.logits.double().softmax(1).numpy()
    each = [metrics.roc_auc_score(given.labels == k, shares[:, k]) for k in (0, 1, 3)]
    assert found.summary["auroc_macro"] == pytest.approx(np.mean(each), abs=1e-12)
    low, high = found.summary["intervals_95"]["auroc_macro"]
    assert low < np.mean(each) < high
    counts = torch.tensor([[1, 1, 1], [3, 0, 2], [0, 0, 0], [5, 5, 5]])
    names = ["a", "b", "c", "d"]
    rows = list(ours.class_rows(found, names, names, counts))
    assert rows[1]["accuracy"] == 0
    assert rows[1].keys() == ours.CLASS_COLUMNS.keys()
    missing = {"accuracy", "recall", "auroc", "average_precision"}
    missing |= {f"{name}_{end}" for name in ("accuracy", "auroc") for end in ("low", "high")}
    assert ours.CLASS_COLUMNS.keys() - rows[2].keys() == missing
    ends = [(row["accuracy_low"], row["accuracy_high"]) for row in rows if "accuracy" in row]
    assert ends == [ours.wilson_interval(*one) for one in ((1, 1), (0, 3), (5, 5))]
    assert all(row["precision_low"] <= row["precision"] <= row["precision_high"] for row in rows)
    for k, row in enumerate(rows):
        either = found.confusion[k].sum() + found.confusion[:, k].sum() - found.confusion[k, k]
        low, high = ours.wilson_interval(int(found.confusion[k, k]), int(either))
        assert (row["f1_low"], row["f1_high"]) == (2 * low / (1 + low), 2 * high / (1 + high))
        assert row["f1_low"] <= row["f1"] <= row["f1_high"]
    for row, auroc in zip((rows[0], rows[1], rows[3]), each):
        assert row["auroc_low"] < auroc < row["auroc_high"]

    only = ours.class_metrics(Scores(torch.ones(3, 1), torch.zeros(3).long(), torch.arange(3)))
    assert only.summary["auroc_macro"] is None
    assert only.summary["intervals_95"]["auroc_macro"] is None
    assert only.summary["f1"]["macro"] == 1


def test_the_interval_of_f1_contains_the_true_value_of_most_classes():
    """A network is right for 50 to 95 % of the images of a class, and mistakes are uniform."""
    rng, n, num_classes = np.random.default_rng(0), 2000, 200
    right = np.linspace(0.5, 0.95, num_classes)
    wrong = ((1 - right).sum() - (1 - right)) / (num_classes - 1)
    expected = 2 * right / (1 + right + wrong)
    labels = rng.integers(0, num_classes, n)
    others = (labels + rng.integers(1, num_classes, n)) % num_classes
    predicted = np.where(rng.random(n) < right[labels], labels, others)
    logits = torch.eye(num_classes)[predicted]
    found = ours.class_metrics(Scores(logits, torch.from_numpy(labels), torch.arange(n)))
    names = [str(k) for k in range(num_classes)]
    rows = ours.class_rows(found, names, names, torch.ones(num_classes, 3))
    inside = [row["f1_low"] <= f1 <= row["f1_high"] for row, f1 in zip(rows, expected)]
    assert 0.92 <= np.mean(inside) < 1


def test_confusions_name_pairs_that_have_images_and_begin_with_the_most_frequent():
    given = scores()
    found = ours.class_metrics(given)
    named = ours.confusions(found, ["a", "b", "c", "d"])
    rebuilt = [[named[row].get(column, 0) for column in "abcd"] for row in "abcd"]
    assert rebuilt == found.confusion.tolist()
    for row in named.values():
        assert list(row.values()) == sorted(row.values(), reverse=True)
    found.confusion[0] = [0, 3, 0, 0]
    assert ours.confusions(found, ["a", "b", "c", "d"])["a"] == {"b": 3}


def test_a_row_of_an_image_has_its_most_probable_classes_and_its_loss():
    given = scores(5)
    rows = list(ours.image_rows(given, ["a", "b", "c", "d"], 9))
    shares = given.logits.double().softmax(1)
    for row, share, label in zip(rows, shares, given.labels.tolist()):
        order = [row[f"class_{k}"] for k in range(1, 5)]
        assert order == ["abcd"[k] for k in share.argsort(descending=True).tolist()]
        total = sum(row[f"probability_{k}"] for k in range(1, 5))
        assert total == pytest.approx(1, abs=1e-12)
        assert row["loss"] == pytest.approx(-math.log(share[label]), abs=1e-12)
    assert len(rows) == 5


def test_a_missing_scikit_learn_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics=true needs .*'alexnet-ddp\[metrics\]'"):
        ours.require_sklearn()
