"""evaluate with all its files: the same numbers for any number of ranks."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from sklearn import metrics

from alexnet_ddp.config.compose import compose
from alexnet_ddp.runtime.errors import ConfigError
from tests.conftest import make_folder
from tests.test_train import SMALL, run

NUM_IMAGES, CLASSES = 1003, [f"class{k}" for k in range(5)]
BROKEN = 500  # position of an image that cannot be read


def predictions(file: Path) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Labels [n], probabilities [n, classes] of the images that could be read, and all rows."""
    if file.suffix == ".parquet":
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


@pytest.mark.slow
def test_metrics_are_those_of_one_process_for_any_number_of_ranks(tmp_path):
    folder = make_folder(tmp_path / "photos", 60, NUM_IMAGES, size=34)
    images = sorted(str(path) for path in (folder / "val").glob("*/*.jpg"))
    options = [*SMALL, f"data.root={folder}", "data.image_size=32", "data.eval_resize=32"]
    more = ["trainer.max_steps=6", "trainer.global_batch_size=30", "data.on_bad_image=skip"]
    trained = run("train", *options, *more, "run.name=x", cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout
    Path(images[BROKEN]).write_bytes(b"not an image")
    one = None
    for ranks in (1, 2, 3, 5):
        file = tmp_path / f"p{ranks}.{'parquet' if ranks == 3 else 'csv'}"
        asked = ["metrics=true", f"predictions={file}"]
        done = run("evaluate", "run.name=x", *asked, ranks=ranks, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert 1 < done.stdout.count(" are taken for class") <= 5
        written = json.loads((tmp_path / "runs/x/evaluation.json").read_text())
        labels, shares, rows = predictions(file)
        assert [row["image"] for row in rows] == images
        assert [i for i, row in enumerate(rows) if row["error"]] == [BROKEN]
        assert len(labels) == written["val/num_images"] == NUM_IMAGES - 1
        low, high = written["val/top1_interval_95"]
        assert 0 < low < written["val/top1"] < high < 100
        check(labels, shares, written)
        loss = np.mean([float(row["loss"]) for row in rows if not row["error"]])
        assert loss == pytest.approx(written["val/loss"], rel=1e-5)
        with (tmp_path / "runs/x/evaluation_classes.csv").open() as lines:
            of_classes = list(csv.DictReader(lines))
        assert [row["class"] for row in of_classes] == CLASSES
        f1 = np.mean([float(row["f1"]) for row in of_classes])
        assert f1 == pytest.approx(written["metrics"]["f1"]["macro"], abs=1e-12)
        one = one or (shares, written)
        # The batches are the same, only the threads of a convolution may differ.
        np.testing.assert_allclose(shares, one[0], rtol=0, atol=1e-6)
        assert written["confusions"] == one[1]["confusions"]
    assert run("evaluate", "run.name=x", cwd=tmp_path).returncode == 0
    plain = json.loads((tmp_path / "runs/x/evaluation.json").read_text())
    assert plain["per_class"] == one[1]["per_class"]
    assert one[1].keys() - plain.keys() == {"metrics", "confusions"}
    assert not (tmp_path / "runs/x/evaluation_classes.csv").exists()
    done = run("evaluate", "run.name=x", "predictions=none/p.csv", cwd=tmp_path)
    assert done.returncode == 64
    assert "predictions (none/p.csv) must be in an existing directory" in done.stdout


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("predictions=p.txt", "predictions (p.txt) must end in .csv or .parquet, which choose the format"),
        ("top_k=3", "top_k (3) is the number of classes in the file of predictions, which is not written; "
         "give predictions=FILE.csv too"),
        ("metrics=true", "metrics=true is stored with a run, and model.weights is a file; "
         "give run.name in place of model.weights"),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(override, line):
    with pytest.raises(ConfigError) as error:
        compose("evaluate", [override, *(["model.weights=x.pth"] if "metrics" in override else [])])
    assert str(error.value) == line
