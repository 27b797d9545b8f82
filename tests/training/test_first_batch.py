"""batch.png: the first batch as the network sees it."""

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_ddp.config import BasicAugmentConfig, FolderConfig, NoAugmentConfig, OnBadImage
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.effects import IMAGENET, apply_effects, normalise, to_pixels
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.training.first_batch import write_first_batch
from tests.test_train import SMALL, run


def write(tmp_path, image_folder, how, **more):
    cfg = FolderConfig(root=str(image_folder), image_size=48, **more)
    images = open_data(cfg).train
    sampler = GlobalBatchSampler(len(images), 40, seed=0)
    loader = build_loader(cfg, images, build_augment(how, 0, 48, 55), 1, torch.device("cpu"))
    write_first_batch(tmp_path, loader, sampler, [f"name{k}" for k in range(5)])
    (batch,) = loader.batches(sampler.micro_batches(range(1), 0, 1, None))
    seen = apply_effects(batch.images, batch.effects)
    loader.close()
    return seen, batch


def cell(picture, k):
    """The pixels of image k, without the line below it."""
    left, top = 10 + k % 8 * 58, 34 + k // 8 * 78
    return picture[top : top + 48, left : left + 48]


@pytest.mark.parametrize(
    "how", [NoAugmentConfig(), BasicAugmentConfig(brightness=0.4, mixup_alpha=1)]
)
def test_the_picture_shows_what_the_network_gets(tmp_path, image_folder, how):
    seen, _ = write(tmp_path, image_folder, how)
    with Image.open(tmp_path / "batch.png") as file:
        picture = np.asarray(file.convert("RGB"))
    for k in (0, 7, 8, 31):
        shown = torch.from_numpy(cell(picture, k).copy())[None]
        assert (normalise(shown, None)[0] - seen[k]).abs().max() < 0.5 / 255 / 0.22 + 1e-5
    assert picture.shape[0] == 34 + 4 * 78  # 32 of the 40 images


def test_pixels_are_the_inverse_of_the_normalisation():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert np.array_equal(to_pixels(normalise(images, None), IMAGENET), images.numpy())


def test_without_a_readable_image_there_is_no_picture_and_no_error(tmp_path, image_folder, caplog):
    broken = tmp_path / "data"
    for split in ("train", "val"):
        (broken / split / "a").mkdir(parents=True)
        (broken / split / "a" / "x.jpg").write_bytes(b"no image")
    cfg = FolderConfig(root=str(broken), image_size=48, on_bad_image=OnBadImage["raise"])
    images = open_data(cfg).train
    loader = build_loader(cfg, images, None, 1, torch.device("cpu"))
    caplog.set_level("INFO")
    write_first_batch(tmp_path, loader, GlobalBatchSampler(1, 1, seed=0), ["a"])
    loader.close()
    assert not (tmp_path / "batch.png").exists()
    assert "batch.png is not written: " in caplog.text


def hyperparameters(events):
    """The options in TensorBoard's table of hyperparameters, by name."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    return HParamsPluginData.FromString(start).session_start_info.hparams


@pytest.mark.slow
def test_a_run_writes_its_first_batch_and_tensorboard_shows_it(image_folder, tmp_path):
    same = [*SMALL, f"data.root={image_folder}", f"run.root={tmp_path}", "run.name=x"]
    options = ["trainer.max_steps=2", "logger.tensorboard=true", "logger.histograms_every_steps=2"]
    done = run("train", *same, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    with Image.open(tmp_path / "x/batch.png") as picture:
        assert picture.size == (10 + 8 * 74, 34 + 4 * 94)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "x").rglob("events.out.tfevents*")).parent))
    events.Reload()
    assert events.Tags()["images"] == ["batch", "val/confusion_matrix", "val/largest_losses"]
    kinds = {name.partition("/")[0] for name in events.Tags()["histograms"]}
    assert kinds == {"parameters", "gradients"}
    assert [one.step for one in events.Histograms(events.Tags()["histograms"][0])] == [2]
    (text,) = events.Tensors("config/text_summary")
    assert b"max_steps: 2" in text.tensor_proto.string_val[0]
    options = hyperparameters(events)
    assert options["trainer.max_steps"].number_value == 2
    assert options["trainer.drop_last"].string_value == "False"
    assert options["trainer.precision"].string_value == "fp32"
    assert "_hparams_/session_end_info" in events.summary_metadata


@pytest.mark.slow
def test_wandb_gets_the_first_batch_once(image_folder, tmp_path):
    same = [*SMALL, f"data.root={image_folder}", f"run.root={tmp_path}", "run.name=x"]
    same += ["logger.wandb=offline", "trainer.epochs=1"]
    env = {"WANDB_MODE": "offline"}
    for steps in (2, 4):
        done = run("train", *same, f"trainer.max_steps={steps}", env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    (picture,) = tmp_path.glob("x/wandb/offline-run-*/files/media/images/batch_*.png")
    assert picture.read_bytes() == (tmp_path / "x/batch.png").read_bytes()
