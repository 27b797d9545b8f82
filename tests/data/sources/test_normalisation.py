"""data.mean=auto: the statistics of shards are computed, recorded, and used by other commands."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import alexnet_ddp
from alexnet_ddp.config import ShardsConfig
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.data.sources.shard_index import INDEX
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.runtime.errors import DataError
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
