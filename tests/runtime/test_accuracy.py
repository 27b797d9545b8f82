"""Accuracies in percent with their 95 % intervals."""

import pytest

from alexnet_ddp.runtime import accuracy as ours

ROW = {"val/top1": 50.0, "val/top5": 100.0, "val/auc": 50.0, "val/loss": 1.0}
COUNTS = {"val/correct1": 50, "val/correct5": 100, "val/num_images": 100}


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    # E. B. Wilson's formula, as statsmodels 0.14 proportion_confint(method="wilson") computes it
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (7, 9, 0.4526, 0.9368)],
)  # fmt: skip
def test_wilson_intervals(correct, images, low, high):
    assert ours.wilson_interval(correct, images) == pytest.approx((low, high), abs=1e-4)
    assert ours.percent_interval(correct, images) == pytest.approx(
        (100 * low, 100 * high), abs=1e-2
    )


def test_a_wilson_interval_contains_its_share_and_ends_exactly_at_0_and_1():
    for images in range(1, 200):
        for correct in range(images + 1):
            low, high = ours.wilson_interval(correct, images)
            assert 0 <= low <= correct / images <= high <= 1
        assert ours.wilson_interval(0, images)[0] == 0
        assert ours.percent_interval(images, images)[1] == 100


def test_a_share_of_images_has_an_interval_in_texts_and_in_the_columns_of_tables():
    interval = ours.metric_interval(ROW | COUNTS, "val/top1")
    assert interval == ours.percent_interval(50, 100)
    assert ours.interval_text(interval) == "40.4–59.6"
    assert ours.interval_text(interval, 2) == "40.38–59.62"
    assert ours.interval_cells("val/top1", interval) == {
        "top1_low": interval[0],
        "top1_high": interval[1],
    }
    assert ours.interval_columns("val/top5") == ["top5_low", "top5_high"]
    expected = "95 % interval of top-1: 40.4–59.6 %, of top-5: 96.3–100.0 %"
    assert ours.intervals_text(ROW | COUNTS) == expected


@pytest.mark.parametrize("metric", ["val/loss", "val/auc", "train/top1"])
def test_other_metrics_have_no_interval(metric):
    assert ours.metric_interval(ROW | COUNTS, metric) is None
    assert ours.interval_columns(metric) == []


@pytest.mark.parametrize("row", [{}, ROW, ROW | COUNTS | {"val/num_images": 0}])
def test_a_row_without_counts_has_no_interval(row):
    assert ours.metric_interval(row, "val/top1") is None
    assert ours.interval_text(None) == ours.intervals_text(row) == ""
    assert ours.interval_cells("val/top1", None) == {}
