"""The images that predict finds, and its output."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from pyarrow.csv import read_csv
from safetensors.torch import save_file

from alexnet_ddp import load_run
from alexnet_ddp.cli import compose
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.compose import compose as compose_command
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.export.folder import preprocessing_of
from alexnet_ddp.model import build_model, find_head
from alexnet_ddp.predict import command
from alexnet_ddp.predict.images import find_images
from alexnet_ddp.runtime.errors import DataError
from tests.conftest import make_folder
from tests.network import QUICK
from tests.test_train import SMALL, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/: images, a linked folder, hidden entries and other types. Changes to its parent."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "photos/a.jpg",
        "photos/b.PNG",
        "photos/sub/c.jpeg",
        "ext/linked.jpg",
        "photos/.hidden/d.jpg",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    for name in ("photos/._a.jpg", "photos/e.jfif", "photos/notes.txt"):
        Path(name).write_bytes(b"x")
    os.symlink("../ext", "photos/link")
    return tmp_path


def paths_of(pattern: str) -> list[str]:
    """The paths that predict classifies, in order."""
    paths = find_images(pattern)
    return [paths.name(i) for i in range(len(paths))]


def test_a_folder_is_searched_as_for_training_and_ignored_entries_are_reported(photos, caplog):
    assert paths_of("photos") == [
        "photos/a.jpg",
        "photos/b.PNG",
        "photos/link/linked.jpg",
        "photos/sub/c.jpeg",
    ]
    notes = {record.getMessage() for record in caplog.records}
    assert len(notes) == 2
    assert any(note.startswith("ignored 2 entries (hidden), such as photos/.") for note in notes)
    assert any(
        note.startswith("ignored 2 entries (other types), such as photos/") for note in notes
    )
    os.makedirs("data/train")
    shutil.move("photos", "data/train/photos")
    os.symlink("../../../ext", "data/train/photos/link2")
    os.unlink("data/train/photos/link")
    index = index_folder(Path("data"), "train")
    listed = paths_of("data/train/photos")
    assert [os.path.abspath(path) for path in listed] == [index.name(i) for i in range(len(index))]


def test_a_folder_that_links_to_itself_is_refused(photos):
    os.symlink("..", "photos/sub/up")
    with pytest.raises(
        DataError, match="links to a folder that contains it, without end; remove that link"
    ):
        find_images("photos")
    with pytest.raises(
        DataError, match="is below a link to a folder that contains it; remove that link"
    ):
        find_images("photos/**/*.jpg")
    os.unlink("photos/sub/up")
    assert paths_of("photos/**/*.jpeg") == ["photos/sub/c.jpeg"]
    below = f"{os.getcwd()}/./photos"
    assert paths_of(f"{below}/**/*.jpeg") == [f"{below}/sub/c.jpeg"]


def test_a_path_takes_few_bytes_of_memory(tmp_path):
    """Of a million images, less than the network of a run: no Python object for each."""
    for k in range(2000):
        path = tmp_path / f"{k // 500}/{k:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    tracemalloc.start()
    try:
        paths = find_images(str(tmp_path))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(paths) == 2000
    assert paths.name(1999) == f"{tmp_path}/3/0001999.jpg"
    assert kept < 50 * 2000
    assert peak < 150 * 2000


@pytest.mark.parametrize(
    "name", ["photos/e.jfif", "photos/._a.jpg", "photos/notes.txt", "./photos/a.jpg"]
)
def test_a_given_file_is_used_regardless_of_its_name(photos, name):
    assert paths_of(name) == [name]


@pytest.mark.parametrize(
    "name",
    ["photos[/x].jpg", "a[b]c.jpg", "*.jpg", "?.jpg", "d[1]/e[2].jpg", os.fsdecode(b"\xff.jpg")],
)
def test_a_file_with_the_characters_of_a_glob_is_found(photos, name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(b"x")
    assert paths_of(name) == [name]


def test_a_glob_below_a_folder_with_brackets_is_found(photos):
    for name in ("d[1]/e.jpg", "d[1]/f.jfif", "d[1]/sub/g.jpg", "d1/no.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    assert paths_of("d[1]/*.jpg") == ["d[1]/e.jpg"]
    assert paths_of("d[1]/*") == ["d[1]/e.jpg", "d[1]/f.jfif"]
    assert paths_of(f"{photos}/d[1]/*/*.jpg") == [f"{photos}/d[1]/sub/g.jpg"]
    assert paths_of("*/no.jpg") == ["d1/no.jpg"]


@pytest.mark.parametrize(
    "pattern", ["nowhere", "nowhere/*.jpg", "empty", "photos/.hidden/*.png", ""]
)
def test_no_image_is_an_error_of_one_line(photos, pattern, caplog):
    os.makedirs("empty")
    Path("empty/notes.txt").write_bytes(b"x")
    with pytest.raises(DataError, match="matches no image") as error:
        find_images(pattern)
    assert "\n" not in str(error.value)
    assert caplog.records == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder):
    """A run of two steps in its root, and a folder of ten images, of which two cannot be read."""
    root = tmp_path_factory.mktemp("predict")
    overrides = [*SMALL, f"data.root={image_folder}", "run.root=runs", "run.name=x"]
    assert run("train", *overrides, "trainer.max_steps=2", cwd=root).returncode == 0
    (root / "photos").mkdir()
    for k, file in enumerate(sorted(image_folder.glob("val/*/*.jpg"))[::8]):
        shutil.copy(file, root / f"photos/{k}.jpg")
    (root / "photos/1a.jpg").write_bytes(b"no image")
    (root / "photos/5 truncated.jpg").write_bytes((root / "photos/5.jpg").read_bytes()[:300])
    return root


def _require_head_inputs(root, embeddings, rows):
    """The head must compute the written predictions from the written embeddings."""
    trained = load_run(root / "runs/x", plugins=["tests.network"])
    head = trained.model.get_submodule(find_head(trained.model))
    with torch.inference_mode():
        probabilities = head(torch.from_numpy(embeddings)).softmax(1)
    good = [row for row in rows if "error" not in row]
    for values, row in zip(probabilities, good, strict=True):
        for one in row["predictions"]:
            k = trained.classes.index(one["class"])
            assert values[k].item() == pytest.approx(one["probability"], rel=1e-4, abs=1e-7)


of_a_run = pytest.mark.xdist_group("predict")  # in one worker, which trains it once


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@of_a_run
def test_every_image_has_a_line_in_order_for_any_number_of_ranks(trained):
    found, embeddings = {}, {}
    options = ["images=photos", "output=o.jsonl", "embeddings=e.npy", "min_confidence=0.9999"]
    for ranks in (0, 3):
        done = run("predict", "run.name=x", *options, ranks=ranks, cwd=trained)
        assert done.returncode == 0, done.stdout
        assert "10 images, 2 of them cannot be read, 8 to ask a person" in done.stdout
        assert done.stdout.count("1a.jpg: not an image") == 1
        assert done.stdout.count("run x is not calibrated") == 1
        found[ranks] = rows_of(trained / "o.jsonl")
        embeddings[ranks] = np.load(trained / "e.npy")
        good = [row["image"] for row in found[ranks] if row.get("ask_a_person")]
        assert [row["image"] for row in rows_of(trained / "e.jsonl")] == good
    assert embeddings[0].dtype == np.float32
    assert len(embeddings[0]) == 8
    np.testing.assert_allclose(embeddings[0], embeddings[3], rtol=1e-5, atol=1e-6)
    _require_head_inputs(trained, embeddings[0], found[0])
    names = sorted(file.name for file in (trained / "photos").iterdir())
    assert [row["image"] for row in found[0]] == [f"photos/{name}" for name in names]
    assert [row["image"] for row in found[0] if "error" in row] == [
        "photos/1a.jpg",
        "photos/5 truncated.jpg",
    ]
    for one, other in zip(found[0], found[3], strict=True):
        assert one["image"] == other["image"]
        for mine, theirs in zip(one.get("predictions", []), other.get("predictions", [])):
            assert mine["class"] == theirs["class"]
            assert mine["probability"] == pytest.approx(theirs["probability"], rel=1e-5)
    assert sum(p["probability"] for p in found[0][0]["predictions"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@of_a_run
def test_a_csv_has_a_column_for_each_class_and_for_the_reason(trained):
    done = run("predict", "run.name=x", "images=photos", "output=o.csv", "top_k=2", cwd=trained)
    assert done.returncode == 0, done.stdout
    rows = list(csv.DictReader((trained / "o.csv").open(newline="")))
    assert list(rows[0]) == [
        *("image", "class_1", "probability_1", "class_2", "probability_2", "error")
    ]
    assert len(rows) == 10
    good = [row for row in rows if not row["error"]]
    assert len(good) == 8
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) > 0 for row in good)
    assert {row["class_1"] for row in good} <= {f"class{k}" for k in range(5)}
    assert [row["class_1"] for row in rows if row["error"]] == ["", ""]


OF_THREE = ["model=alexnet_small", "data.image_size=32", "data.mean=[0.4,0.5,0.6]"]
NAMES = ["a cat", "b", "c"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """w.pt: weights of a network of three classes; export/: the same, calibrated; and a.png."""
    root = tmp_path_factory.mktemp("three")
    cfg = compose(["data=synthetic", *OF_THREE])
    tensors = build_model(cfg.model, 3, 32, 0).state_dict()
    torch.save(tensors, root / "w.pt")
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    (root / "names.json").write_text(json.dumps(NAMES))
    noise = np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8)
    Image.fromarray(noise).save(root / "a.png")
    export = root / "export"
    export.mkdir()
    save_file(tensors, export / "model.safetensors", {"classes": json.dumps(NAMES)})
    how = preprocessing_of(cfg.data, in_graph=False)
    files = {"model": {"options": OF_THREE[:1]}, "preprocessing": how, "classes": NAMES}
    for stem, content in (files | {"metrics": {"temperature": 2.0}}).items():
        (export / f"{stem}.json").write_text(json.dumps(content))
    return root


def start(root: Path, *overrides: str) -> None:
    """Predict a.png in this process."""
    threads = torch.get_num_threads()
    given = [f"images={root}/a.png", "device=cpu", *overrides]
    try:
        command.main(compose_command("predict", given), given)
    finally:
        torch.set_num_threads(threads)


def predicted(root: Path, *overrides: str) -> dict[str, float]:
    """Class -> probability of a.png."""
    start(root, f"output={root}/o.jsonl", *overrides)
    (row,) = rows_of(root / "o.jsonl")
    return {one["class"]: one["probability"] for one in row["predictions"]}


def test_a_file_of_weights_with_classes_and_an_exported_folder_are_taken(three, caplog):
    weights = [*OF_THREE, f"model.weights={three}/w.pt"]
    found = predicted(three, *weights, f"classes={three}/names.txt", "min_confidence=0.9")
    assert "a file of weights is not calibrated" in caplog.text
    assert predicted(three, *weights, f"classes={three}/names.json") == found
    file = f"model.weights={three}/export/model.safetensors"  # with class names
    assert predicted(three, *OF_THREE, file) == found
    caplog.clear()
    exported = predicted(three, f"export={three}/export", "min_confidence=0.9")
    assert "not calibrated" not in caplog.text
    run = load_run(three / "export")
    with Image.open(three / "a.png") as image, torch.inference_mode():
        logits = run.model(run.transform(image)[None])[0]
    for by_class, temperature in ((found, 1), (exported, 2)):
        expected = dict(zip(NAMES, (logits / temperature).softmax(0).tolist()))
        assert by_class == pytest.approx(expected, rel=1e-4)


def test_published_weights_bring_their_preprocessing():
    given = ["images=x", "model=torchvision", "model.name=inception_v3", "data.image_size=299"]
    data = compose_command("predict", [*given, "model.weights=DEFAULT"]).data
    assert (data.mean, data.eval_resize) == ([0.485, 0.456, 0.406], 342)
    assert compose_command("predict", ["images=x", "data.image_size=64"]).data.eval_resize == 73


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["export=d", "run.name=x"], "run.name (x) and export are two networks; give one of them"),
        (["export=d", "model.weights=f"], "export (d) and model.weights (f) are two networks"),
        (["model=alexnet"], "model is of a file of weights; a run and an export have their own"),
        (["export=d", "data.image_size=32"], "data.image_size is of a file of weights"),
        (["export=d", "classes=f"], "classes is of a file of weights"),
        (["model.weights=run:x"], "model.weights (run:x) is not a file; for a run give run.name"),
        (["model.weights=f", "model.head=new"], "model.head=new would predict with an untrained"),
        (["model.weights=f", "classes=nowhere"], "and cannot be read ([Errno 2] No such file"),
        (["model.weights={root}/w.pt"], "w.pt) contains no class names; give classes=FILE.txt"),
        (["model.weights={root}/w.pt", "classes={root}/export/metrics.json"], "a JSON list of na"),
        (["export={root}"], "is no export that load_run reads"),
    ],
)
def test_a_network_that_is_not_one_is_refused_in_one_line(three, overrides, line):
    with pytest.raises(ConfigError) as error:
        predicted(three, *(one.format(root=three) for one in overrides))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_has_no_columns_for_more_classes_than_there_are(three, suffix):
    file = three / f"o.{suffix}"
    start(three, f"export={three}/export", f"output={file}")
    table = (parquet.read_table if suffix == "parquet" else read_csv)(file)
    pairs = [name for k in (1, 2, 3) for name in (f"class_{k}", f"probability_{k}")]
    assert table.column_names == ["image", *pairs, "error"]
    assert len(table) == 1


@pytest.mark.slow
@of_a_run
def test_predictions_of_a_calibrated_run_are_divided_by_its_temperature(trained):
    """evaluate with all its files on two ranks, then predict into Parquet files."""
    run_dir = trained / "runs/calibrated"
    shutil.copytree(trained / "runs/x", run_dir)
    name = "run.name=calibrated"
    asked = ["calibrate=true", "metrics=true", "predictions=val.csv"]
    done = run("evaluate", name, *asked, ranks=2, cwd=trained)
    assert done.returncode == 0, done.stdout
    assert "Cohen's kappa" in done.stdout
    evaluated = json.loads((run_dir / "evaluation.json").read_text())
    assert 0 <= evaluated["metrics"]["auroc_macro"] <= 1
    assert len((run_dir / "evaluation_classes.csv").read_text().splitlines()) == 6
    assert len((trained / "val.csv").read_text().splitlines()) == 62
    assert "expected calibration error (15 bins) " in done.stdout
    known = json.loads((run_dir / "calibration.json").read_text())
    assert known["loss_after"] <= known["loss_before"]
    assert known["num_images"] == evaluated["val/num_images"]
    ece = evaluated["metrics"]["expected_calibration_error"]
    assert ece == pytest.approx(known["ece_before"], abs=1e-12)
    files = ["output=o.parquet", "embeddings=e.parquet", "layer=features.0"]
    done = run("predict", name, "images=photos", *files, "min_confidence=0.3", cwd=trained)
    assert done.returncode == 0, done.stdout
    assert "not calibrated" not in done.stdout
    calibrated = parquet.read_table(trained / "o.parquet").to_pylist()
    assert len(calibrated) == 10
    assert [row["image"] for row in calibrated if row["error"]] == [
        "photos/1a.jpg",
        "photos/5 truncated.jpg",
    ]
    good = [row for row in calibrated if not row["error"]]
    embeddings = parquet.read_table(trained / "e.parquet").to_pylist()
    assert [row["image"] for row in embeddings] == [row["image"] for row in good]
    trained_run = load_run(run_dir)
    assert trained_run.temperature == known["temperature"]
    for row, embedding in zip(good, embeddings, strict=True):
        image = trained_run.transform(Image.open(trained / row["image"]))[None]
        with torch.inference_mode():
            logits = trained_run.model(image)
            expected = (logits / known["temperature"]).softmax(1).max().item()
            first = trained_run.model.get_submodule("features.0")(image).flatten()
        assert row["probability_1"] == pytest.approx(expected, rel=1e-4)
        assert row["ask_a_person"] == (row["probability_1"] < 0.3)
        np.testing.assert_allclose(embedding["embedding"], first, rtol=1e-4, atol=1e-5)


@of_a_run
def test_predictions_agree_with_the_evaluation(trained, image_folder):
    same = ["run.name=x", "output=o.jsonl", "top_k=1"]
    done = run("predict", *same, f"images={image_folder}/val", cwd=trained)
    assert done.returncode == 0, done.stdout
    rows = rows_of(trained / "o.jsonl")
    correct = sum(Path(r["image"]).parent.name == r["predictions"][0]["class"] for r in rows)
    assert run("evaluate", "run.name=x", "run.root=runs", cwd=trained).returncode == 0
    found = json.loads((trained / "runs/x/evaluation.json").read_text())
    assert (found["val/correct1"], found["val/num_images"]) == (correct, len(rows))


@pytest.mark.slow
@of_a_run
def test_paths_come_from_standard_input_and_are_printed_without_an_output(trained):
    command = [sys.executable, "-m", "alexnet_ddp.predict", *QUICK[:1], "run.name=x", "images=-"]
    paths = ["photos/3.jpg", "photos/0.jpg", f"{trained}/photos/3.jpg"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        cwd=trained,
        env=environment,
        input="\n".join(paths) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if ".jpg" in line]
    assert len(shown) == 3
    assert all(path in line for path, line in zip(paths, shown))


@pytest.mark.sampled
@of_a_run
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["images=photos", "output=o.txt"],
            64,
            "output (o.txt) must end in .jsonl, .csv or .parquet",
        ),
        (["images=photos", "output=no/o.csv"], 64, "must be in an existing directory"),
        (["images=photos", "embeddings=no/e.npy"], 64, "must be in an existing directory"),
        (
            ["images=photos", "embeddings=e.npy", "layer=feature.1"],
            64,
            "layer (feature.1) is not a layer of Quick; nearest: features.1",
        ),
        (["images=photos", "on_bad_image=raise"], 65, "leave it out with on_bad_image=skip"),
        (["images=photos/1a.jpg"], 65, "none of the 1 images can be read"),
    ],
)
def test_what_cannot_be_done_is_one_line(trained, options, code, message):
    done = run("predict", "run.name=x", *options, cwd=trained)
    assert done.returncode == code, done.stdout
    assert message in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_names_are_printed_and_recorded_unchanged_even_if_a_pipe_is_closed(tmp_path):
    """Train for an epoch on classes with names that look like markup; evaluate and predict."""
    folder = make_folder(tmp_path / "data", 24, 10)
    classes = ["cat [female]", "cat [male]", "[/]", ":smile:", "\x1b[31mred"]
    for split in ("train", "val"):
        for i, name in enumerate(c.replace("/", "∕") for c in classes):
            (folder / split / f"class{i}").rename(folder / split / name)
    overrides = ("data=folder", f"data.root={folder}", "data.image_size=64", "trainer.epochs=1")
    done = run("train", *overrides, "logger.tensorboard=false", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "runs/data-alexnet_small/checkpoints").is_dir()
    name = "run.name=data-alexnet_small"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "alexnet_ddp.evaluate", name]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": write, "stderr": subprocess.DEVNULL}
    assert (
        subprocess.run(command, cwd=tmp_path, env=env, timeout=240, check=False, **pipes).returncode
        == 0
    )
    os.close(write)
    record = json.loads((tmp_path / "runs/data-alexnet_small/evaluation.json").read_text())
    assert len(record["per_class"]) == 5
    shown = run("evaluate", name, cwd=tmp_path)
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    assert all(
        text in shown.stdout
        for text in ("cat [female]", "cat [male]", "[∕]", ":smile:", r"\x1b[31mred")
    )

    target = folder / "val" / ("long" * 40)
    target.mkdir()
    shutil.copy(next((folder / "val/cat [male]").iterdir()), target / "photos[x].jpg")
    (target / "broken.jpg").write_bytes(b"no image")
    shown = run("predict", name, f"images={target}", "output=o.jsonl", cwd=tmp_path)
    assert shown.returncode == 0
    assert f"{target}/broken.jpg: not an image" in shown.stdout
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"{target}/broken.jpg", f"{target}/photos[x].jpg"]
    shown = run("predict", name, f"images={target}", cwd=tmp_path)
    assert f"{target}/photos[x].jpg" in shown.stdout
