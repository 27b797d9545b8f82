"""evaluate with all its files: the same numbers for any number of ranks."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ddp import cli
from alexnet_ddp.config import Device
from alexnet_ddp.config.evaluate import EvaluateConfig
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.evaluate import Found, _evaluate, _finish, _metric_lines
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.errors import ConfigError, Diverged
from alexnet_ddp.training.calibration import Outputs, Scores
from alexnet_ddp.training.class_metrics import class_metrics
from alexnet_ddp.training.evaluation import Evaluation
from tests.ranks import run_ranks

NUM_IMAGES, CLASSES = 1003, [f"class{k}" for k in range(5)]


# Each rank imports this module, and needs neither scikit-learn, pyarrow nor Hydra: half of its CPU time.
def options(file: Path, *more: str):
    from alexnet_ddp.config.compose import compose

    small = ["data=synthetic", "data.image_size=32", f"data.num_val={NUM_IMAGES}", "model=alexnet"]
    classes = f"data.num_classes={len(CLASSES)}"
    return compose("evaluate", [*small, classes, f"predictions={file}", *more])


def predictions(file: Path) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Labels [n], probabilities [n, classes] of the images that could be read, and all rows."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(file).to_pylist()
    else:
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
    known = [row for row in rows if not row["error"]]
    shares = np.zeros((len(known), len(CLASSES)))
    for i, row in enumerate(known):
        for k in range(1, len(CLASSES) + 1):
            shares[i, CLASSES.index(row[f"class_{k}"])] = float(row[f"probability_{k}"])
    return np.array([CLASSES.index(row["label"]) for row in known]), shares, rows


def check(labels: np.ndarray, shares: np.ndarray, written: dict) -> None:
    """Compare evaluation.json with scikit-learn on the same predictions."""
    from sklearn import metrics

    found, means = shares.argmax(1), written["metrics"]
    matrix = [[written["confusions"][a].get(b, 0) for b in CLASSES] for a in CLASSES]
    assert matrix == metrics.confusion_matrix(labels, found).tolist()
    assert np.trace(matrix) == written["val/correct1"]
    for average in ("macro", "micro", "weighted"):
        expected = metrics.f1_score(labels, found, average=average)
        assert means["f1"][average] == pytest.approx(expected, abs=1e-12)
    auroc = metrics.roc_auc_score(labels, shares, multi_class="ovr")
    assert means["auroc_macro"] == pytest.approx(auroc, abs=1e-12)
    precision = metrics.average_precision_score(np.eye(len(CLASSES))[labels], shares)
    assert means["average_precision_macro"] == pytest.approx(precision, abs=1e-12)
    kappa = metrics.cohen_kappa_score(labels, found)
    assert means["cohen_kappa"] == pytest.approx(kappa, abs=1e-12)


def means_of(written: dict) -> float:
    return written["metrics"]["f1"]["macro"]


def evaluate_in_ranks(folder: str, cfg: EvaluateConfig) -> None:
    """What main() does with a network that is not of a run: a linear one, whose errors vary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32**2, len(CLASSES)))
    with distributed.session(Device.cpu) as world:
        data = open_data(cfg.data)
        found = _evaluate(model, {}, data.val, cfg, Outputs(), world)
        distributed.from_main(lambda: _finish(found, data, cfg, Path(folder)), world)


@pytest.mark.slow
def test_metrics_are_those_of_one_process_for_any_number_of_ranks(tmp_path):
    one = None
    for ranks in (1, 2, 3, 5):
        file = tmp_path / f"p{ranks}.{'parquet' if ranks == 3 else 'csv'}"
        run_ranks(evaluate_in_ranks, ranks, str(tmp_path), options(file, "metrics=true"))
        written = json.loads((tmp_path / "evaluation.json").read_text())
        labels, shares, rows = predictions(file)
        assert [row["image"] for row in rows] == [f"synthetic image {i}" for i in range(NUM_IMAGES)]
        assert len(labels) == written["val/num_images"] == NUM_IMAGES
        assert len(set(shares.argmax(1).tolist())) == len(CLASSES)
        for k in (1, 5):
            low, high = written[f"val/top{k}_interval_95"]
            assert 0 < low < high <= 100
            assert low < written[f"val/top{k}"] <= high
        check(labels, shares, written)
        loss = np.mean([float(row["loss"]) for row in rows])
        assert loss == pytest.approx(written["val/loss"], rel=1e-5)
        with (tmp_path / "evaluation_classes.csv").open() as lines:
            of_classes = list(csv.DictReader(lines))
        assert [row["class"] for row in of_classes] == CLASSES
        f1 = np.mean([float(row["f1"]) for row in of_classes])
        assert f1 == pytest.approx(written["metrics"]["f1"]["macro"], abs=1e-12)
        one = one or (shares, written)
        intervals, expected = (x["metrics"]["intervals_95"] for x in (written, one[1]))
        assert intervals["f1_macro"] == expected["f1_macro"]
        assert intervals["auroc_macro"] == pytest.approx(expected["auroc_macro"], abs=1e-9)
        assert intervals["f1_macro"][0] < means_of(written) < intervals["f1_macro"][1]
        # The batches are the same, only the threads of a product may differ.
        np.testing.assert_allclose(shares, one[0], rtol=0, atol=1e-6)
        assert written["confusions"] == one[1]["confusions"]


def test_an_image_that_could_not_be_read_has_a_row_and_stale_files_are_removed(tmp_path, capsys):
    cfg = options(tmp_path / "p.csv", "data.num_val=4", "top_k=2")
    data = open_data(cfg.data)
    names = ["crane", "crane", "c", "d", "e"]  # two WordNet ids are both "crane"
    logits = torch.eye(5)[[0, 2, 0]]
    scores = Scores(logits, torch.tensor([0, 2, 3]), torch.tensor([0, 2, 3]))
    counts = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 0, 0]])
    row = {"val/top1": 66.7, "val/top5": 100.0, "val/loss": 1.0, "val/num_images": 3}
    row |= {"val/correct1": 2, "val/correct5": 3}
    bad = [Skipped(1, 1, "damaged", "image 1 is damaged")]
    found = Found(Evaluation(row, counts, bad), {"step": 8}, bad, scores)
    (tmp_path / "evaluation_classes.csv").touch()
    _finish(found, replace(data, class_names=names), cfg, tmp_path)
    with (tmp_path / "p.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [one["label"] for one in rows] == ["crane (0)", "crane (1)", "c", "d"]
    assert [one["class_1"] for one in rows] == ["crane (0)", "", "c", "crane (0)"]
    assert [one["error"] for one in rows] == ["", "image 1 is damaged", "", ""]
    assert list(rows[0])[-2:] == ["loss", "error"]
    assert "class_3" not in rows[0]
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["bad_images"] == ["image 1 is damaged"]
    assert "metrics" not in written
    assert not (tmp_path / "evaluation_classes.csv").exists()
    said = capsys.readouterr().out
    assert "95 % interval of top-1: 20.77–93.85 %, of top-5: 43.85–100.00 %" in said
    assert re.search(r"d .* 1 .* 0.0 .* 0.0–79.3 .* 100.0 .* 20.7–100.0", said)


def test_without_intervals_the_printed_means_mention_none():
    scores = Scores(torch.eye(5), torch.arange(5), torch.arange(5))
    (line,) = _metric_lines(class_metrics(scores), CLASSES)
    assert line.startswith("balanced accuracy 1.0000  F1 (macro) 1.0000  AUROC (macro) 1.0000  ")
    assert "interval" not in line


def test_outputs_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    cfg = options(tmp_path / "p.csv", "data.num_val=4")
    logits = torch.zeros(4, 5)
    logits[0, 1], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 1:] = -torch.inf  # only_present does that
    scores = Scores(logits, torch.zeros(4).long(), torch.arange(4))
    row = {"val/top1": 0.0, "val/top5": 0.0, "val/loss": np.nan, "val/num_images": 4}
    evaluation = Evaluation(row | {"val/correct1": 0, "val/correct5": 0}, torch.zeros(5, 3), [])
    found = Found(evaluation, {"checkpoint": "step-00000001"}, [], scores)
    with pytest.raises(Diverged) as error:
        _finish(found, open_data(cfg.data), cfg, tmp_path)
    assert str(error.value) == (
        "the outputs of step-00000001 for 3 of 4 images are not finite, so that nothing is "
        "written; choose another checkpoint with at_step=STEP"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("predictions=p.txt", "predictions (p.txt) must end in .csv or .parquet, which choose the format"),
        ("top_k=3", "top_k (3) is the number of classes in the file of predictions, which is not written; "
         "give predictions=FILE.csv too"),
        ("calibrate=true model.weights=x.pth", "calibrate=true is stored with a run, and model.weights is a file; "
         "give run.name in place of model.weights"),
        ("crops=3", "crops (3) must be 1, 5 or 10"),
        ("crops=10 flip=true", "flip (true) would be ignored with crops=10, which mirrors; use one"),
        ("flip=true calibrate=true", "calibrate=true fits the probabilities of one crop, which predict "
         "uses; leave crops and flip out"),
        ("at_step=newest", "at_step (newest) must be best, last or a number of steps"),
        ("at_step=last model.weights=x.pth", "at_step (last) is a checkpoint of a run, and model.weights is "
         "a file; give run.name instead of it"),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(override, line):
    from alexnet_ddp.config.compose import compose

    with pytest.raises(ConfigError) as error:
        compose("evaluate", override.split())
    assert str(error.value) == line


def test_options_of_data_are_checked_with_those_of_the_run():
    given = ["run.name=x", "data.eval_resize=48", "data.mean=auto", "data.rot=/", "crops=5"]
    assert cli.without_data_options(given) == ["run.name=x", "data.rot=/", "crops=5"]
    for own in ("data=folder", "model.weights=w.pth"):
        assert cli.without_data_options([own, *given]) == [own, *given]
