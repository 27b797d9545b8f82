"""data.mean=auto, and the normalisation that weights of a run bring: found, recorded, and used."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import alexnet_ddp
from alexnet_ddp import cli
from alexnet_ddp.config import ShardsConfig
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.data import IMAGENET_MEAN, IMAGENET_STD
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.data.sources.shard_index import INDEX
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.files import write_json
from tests.archives import make_archives
from tests.network import QUICK
from tests.packing import pack
from tests.test_train import SMALL, rows, run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with archives/ and packed/. Do not change them."""
    place = tmp_path_factory.mktemp("auto")
    make_archives(place / "archives")
    pack(place / "archives", place / "packed", shorter_side=None, keep_original=True)
    return place


def numbers(place) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of all pixels of the training images."""
    train = open_data(ShardsConfig(root=str(place / "packed"))).train
    images = (Image.open(io.BytesIO(train.read(i))).convert("RGB") for i in range(len(train)))
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]) / 255
    return pixels.mean(0).tolist(), pixels.std(0).tolist()


def test_auto_is_the_mean_and_the_deviation_of_the_training_images(place):
    mean, std = numbers(place)
    cfg = ShardsConfig(root=str(place / "packed"), mean="auto")
    found = open_data(cfg).normalised(cfg)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.std == pytest.approx(std, abs=1e-9)
    cfg = ShardsConfig(root=str(place / "packed"), mean="auto", std=[0.1, 0.2, 0.3])
    found = open_data(cfg).normalised(cfg)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.std == [0.1, 0.2, 0.3]
    cfg = ShardsConfig(root=str(place / "packed"))
    assert open_data(cfg).normalised(cfg) is cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": [0.1, 0, 0.1]}, "takes the standard deviations [0.1, 0.0, 0.1] from "),
        ({"mean": None}, "which cannot be read ('NoneType' object is not iterable); prepare the "),
    ],
)
def test_statistics_that_cannot_be_used_are_one_line(place, tmp_path, change, message):
    copy = Path(shutil.copytree(place / "packed", tmp_path / "copy"))
    stats = json.loads((copy / "train.stats.json").read_bytes())
    (copy / "train.stats.json").write_text(json.dumps(stats | change))
    index = json.loads((copy / INDEX).read_bytes())
    digest = Storage(str(copy)).sha256("train.stats.json")
    index["splits"]["train"]["files"]["train.stats.json"] = digest
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError) as error:
        open_data(ShardsConfig(root=str(copy), mean="auto"))
    assert str(error.value).startswith("data.mean (auto) ")
    assert message in str(error.value)


@pytest.mark.slow
def test_a_run_records_the_numbers_and_other_data_are_evaluated_with_them(place, tmp_path):
    data = ["data.image_size=64", "trainer.max_steps=3", "trainer.global_batch_size=8", *SMALL[2:]]
    shards = ["data=shards", f"data.root={place / 'packed'}", "data.mean=auto"]
    done = run("train", *shards, *data, "run.name=a", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout
    mean, std = numbers(place)
    recorded = yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text())["data"]
    assert recorded["mean"] == pytest.approx(mean, abs=1e-9)
    assert recorded["std"] == pytest.approx(std, abs=1e-9)
    loaded = alexnet_ddp.load_run(tmp_path / "runs/a")
    assert loaded.config.data.normalisation == (tuple(recorded["mean"]), tuple(recorded["std"]))

    other = ["data=imagenet", f"data.root={place / 'archives'}"]
    done = run("evaluate", "run.name=a", *other, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "runs/a/evaluation.json").read_text())["val/loss"]
    assert found == pytest.approx(rows(tmp_path / "runs/a", "val/loss")[-1]["val/loss"], rel=1e-6)
    export = ["run.name=a", "format=safetensors", "output=out", "data.mean=auto", *QUICK[:1]]
    done = run("export", *export, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    how = json.loads((tmp_path / "out/preprocessing.json").read_text())
    assert (how["mean"], how["std"]) == (recorded["mean"], recorded["std"])
    done = run("train", *shards, *data, "trainer.max_steps=4", "run.name=a", cwd=tmp_path)
    assert done.returncode == 0, done.stdout  # the same run
    assert "resuming" in done.stdout


RUN = "data: {image_size: 64, eval_resize: 64, eval_interpolation: bicubic, mean: [0.1, 0.1, 0.1], std: [0.9, 0.9, 0.9]}"


def recorded_run(directory: Path, options: str = RUN) -> None:
    """A run that has recorded `options`, and an empty checkpoint."""
    checkpoint = directory / "checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    (directory / "config.yaml").write_text(options)
    write_json(directory / "run.json", {"overrides": []})


def inputs(*options: str, run_dir: Path | None = None) -> tuple:
    """mean, std, interpolation and resize of a training at 32 px."""
    given = ["data=synthetic", "data.image_size=32", *options]
    found = compose("train", given, run_dir=run_dir).data
    return found.mean, found.std, str(found.eval_interpolation), found.eval_resize


@pytest.mark.parametrize("weights", ["run:a", "runs/a", "runs/a/checkpoints/step-00000002"])
def test_weights_of_a_run_bring_the_inputs_of_the_run(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    recorded_run(tmp_path / "runs/a")
    own = [0.1] * 3, [0.9] * 3, "bicubic", 32
    assert inputs(f"model.weights={weights}") == own
    assert inputs(f"model.weights={weights}", "data.std=[1,1,1]")[:2] == ([0.1] * 3, [1] * 3)
    cfg = compose("evaluate", ["data=synthetic", f"model.weights={weights}"])
    assert (cfg.data.mean, cfg.data.eval_resize) == ([0.1] * 3, 224)
    timm = ["model=timm", "model.name=test_vit"]
    assert inputs(*timm, f"model.weights={weights}") == own


def test_defaults_of_the_run_are_those_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded_run(tmp_path / "runs/a", "data: {image_size: 30, eval_resize: 34, mean: null}")
    plain = list(IMAGENET_MEAN), list(IMAGENET_STD), "bilinear"
    # 34 of 30 is 224 / 256, rounded.
    found = compose("train", ["data=synthetic", "model.weights=run:a"]).data
    assert (found.mean, found.std, found.eval_interpolation) == plain
    assert found.eval_resize == 256


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_that_has_begun_keeps_its_own_inputs(tmp_path, monkeypatch, exists):
    """As a run from before weights of runs brought theirs, and if that run is gone."""
    monkeypatch.chdir(tmp_path)
    if exists:
        recorded_run(tmp_path / "runs/a")
    recorded_run(tmp_path / "runs/b", "data: {image_size: 32, eval_resize: 37, mean: null}")
    plain = list(IMAGENET_MEAN), list(IMAGENET_STD), "bilinear", 37
    for weights in ("run:a", "runs/a"):
        assert inputs(f"model.weights={weights}", "run.name=b") == plain
        moved = tmp_path / "runs/b"
        assert inputs(f"model.weights={weights}", "run.name=c", run_dir=moved) == plain
        record = {"overrides": ["data=synthetic", f"model.weights={weights}", "run.name=other"]}
        write_json(moved / "run.json", record)
        assert cli.config_of_run(moved, []).data.mean == list(IMAGENET_MEAN)
    (tmp_path / "runs/b/checkpoints/step-00000002").rmdir()
    assert inputs("model.weights=run:a", "run.name=b")[0] == ([0.1] * 3 if exists else None)


@pytest.mark.slow
def test_a_run_from_weights_of_a_run_is_evaluated_as_it(image_folder, tmp_path):
    data = [f"data.root={image_folder}", *SMALL[:2]]
    small = [*data, *SMALL[2:]]
    strange = ["data.mean=[0.1,0.1,0.1]", "data.std=[0.9,0.9,0.9]"]
    done = run("train", *small, *strange, "trainer.max_steps=2", "run.name=a", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    small += ["trainer.max_steps=1", "run.name=b", "model.weights=run:a"]
    done = run("train", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    recorded = yaml.safe_load((tmp_path / "runs/b/config.yaml").read_text())["data"]
    assert (recorded["mean"], recorded["std"]) == ([0.1] * 3, [0.9] * 3)
    of_run = run("evaluate", "run.name=a", cwd=tmp_path)
    of_weights = run("evaluate", *data, *QUICK[1:], "model.weights=run:a", cwd=tmp_path)
    assert of_run.stdout.splitlines()[-1] == of_weights.stdout.splitlines()[-1]
    shutil.rmtree(tmp_path / "runs/a")
    done = run("evaluate", "run.name=b", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
