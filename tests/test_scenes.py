"""The Python examples of docs/scenes.md, run in their order on small data, and the commands between them."""

import gzip
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_train import run

PAGE = Path(__file__).parents[1] / "docs/scenes.md"


def examples(section: str) -> list[str]:
    """The Python code blocks below the heading that begins with `section`."""
    (text,) = re.findall(rf"\n## {section}.*?(?=\n## |\Z)", PAGE.read_text(), re.DOTALL)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def command_of(name: str, begin: str) -> list[str]:
    """The options of the page's command `name` that contain `begin`."""
    text = PAGE.read_text().replace("\\\n", " ")
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
        done = run(name, *command_of(name, "run.name=products"), *more, "device=cpu", cwd=tmp_path)
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
