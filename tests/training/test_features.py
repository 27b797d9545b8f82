"""finetune.cache_features: the same training as without it, resumption, reuse, damage, refusals."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from alexnet_ddp.cli import compose
from alexnet_ddp.config import ConfigError, Device
from alexnet_ddp.data.features import FeatureFile, FeatureWriter, modification_times
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import MachineError
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.training.evaluation import evaluate
from alexnet_ddp.training.parts import TrainingParts
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.vote import StepVote
from tests.conftest import make_folder
from tests.ranks import run_command, run_ranks
from tests.test_train import ENV, rows, sha_of_newest

STEPS = 6
DATA = [
    *("data=synthetic", "data.image_size=32", "data.num_train=21", "data.num_val=11"),
    *("data.num_classes=3", "trainer.global_batch_size=8", "trainer.eval_batch_size=4"),
    *("scheduler=constant", "optimizer=adamw", "optimizer.lr=1e-3", "run.name=x"),
    *("augment=none", "finetune.method=head", "trainer.ema_decay=0.5"),
    *("model=torchvision", "model.name=mobilenet_v3_small", "model.dropout=0.5"),
]
CACHED = "finetune.cache_features=true"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A MobileNetV3 of seven classes, with two linear layers and a dropout; its statistics are not the initial ones."""
    torch.manual_seed(1)
    model = torchvision.models.mobilenet_v3_small(num_classes=7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of this one batch
    model(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(model.state_dict(), path)
    return path


def training(world: World, root: str, weights: str, *overrides: str) -> TrainingParts:
    more = [f"model.weights={weights}", f"run.root={root}"]
    return TrainingParts(RunSetup(compose([*DATA, *more, *overrides]), world))


def go(parts: TrainingParts, steps: int) -> list[float]:
    """Train `steps` steps; their losses."""
    setup, losses = parts.setup, []
    batches = parts.batches(setup.state.step)
    for _ in range(steps):
        step = setup.state.step
        num_images = len(setup.sampler.batch(step))
        votes = parts.train_step(batches, step, setup.lr(step), num_images, StepVote()).votes
        losses.append(votes.loss)
        setup.state.step += 1
    return losses


def evaluated(parts: TrainingParts) -> dict[str, float]:
    cfg, world, val = parts.setup.cfg.trainer, parts.setup.world, parts.setup.data.val
    work = evaluation_batches(len(val), cfg.eval_batch_size, world.rank, world.world_size)
    with parts.evaluation_model() as model:
        batches = parts.val_loader.batches(work)
        result = evaluate(model, batches, cfg, 3, world, StopSignal())
    assert result is not None
    return result.row


def finish(parts: TrainingParts) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """The state after a training, as a checkpoint holds it, and the evaluation."""
    row = evaluated(parts)
    groups = parts.state_dict()
    state = {stem: {n: t.clone() for n, t in group.items()} for stem, group in groups.items()}
    parts.setup.checkpoints.close()
    parts.close()
    return state, row


def compare(root: str, weights: str) -> tuple[list[float], list[float], dict, dict, set[str]]:
    """Losses and evaluations without and with the cache; the tensors that a resumption changed."""
    os.environ["XDG_CACHE_HOME"] = f"{root}/cache"
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        plain = training(world, f"{root}/plain", weights)
        expected = go(plain, STEPS)
        state, row = finish(plain)
        calm = training(world, f"{root}/calm", weights, CACHED)
        found = go(calm, STEPS)
        cached_state, cached_row = finish(calm)
        assert cached_state.keys() == state.keys()
        for stem, group in state.items():
            torch.testing.assert_close(cached_state[stem], group, rtol=1e-4, atol=1e-5)
        first = training(world, f"{root}/hit", weights, CACHED)
        go(first, 2)
        first.setup.checkpoints.save(first.setup.state, first.state_dict(), is_last=True)
        finish(first)
        if world.is_main:  # features that are computed again have the same bits
            shutil.rmtree(f"{root}/cache/alexnet_ddp/features")
        distributed.raise_together(None, world)
        rest = training(world, f"{root}/hit", weights, CACHED)
        assert rest.setup.state.step == 2
        go(rest, STEPS - 2)
        again, _ = finish(rest)
        differ = {
            f"{stem}/{name}"
            for stem, group in cached_state.items()
            for name, tensor in group.items()
            if not torch.equal(tensor, again[stem][name])
        }
        return expected, found, row, cached_row, differ


@pytest.mark.slow
def test_the_losses_are_those_without_the_cache_and_a_run_resumes_bit_equal(tmp_path, weights):
    """One rank and two: 21 and 11 images are divided unevenly, and a rank has empty batches."""
    by_ranks = []
    for ranks in (1, 2):
        results = run_ranks(compare, ranks, str(tmp_path / str(ranks)), str(weights))
        expected, found, row, cached_row, differ = results[0]
        assert found == pytest.approx(expected, abs=1e-5)
        assert cached_row == pytest.approx(row, abs=1e-4)
        assert cached_row["val/num_images"] == 11
        assert differ == set()
        by_ranks.append(found)
    assert by_ranks[0] == pytest.approx(by_ranks[1], abs=1e-5)
    assert max(by_ranks[0]) - min(by_ranks[0]) > 0.01  # the images and the updates matter


@pytest.mark.slow
def test_a_second_start_reuses_the_features_and_a_damaged_file_is_computed_again(
    tmp_path, weights, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)

    def start(*more: str) -> list[str]:
        caplog.clear()
        with distributed.session(Device.cpu) as world:
            training(world, str(tmp_path / "runs"), str(weights), CACHED, *more).close()
        found = [r.getMessage() for r in caplog.records if "cache_features" in r.getMessage()]
        return [line.removeprefix("finetune.cache_features: ").split()[0] for line in found]

    assert start() == ["computing", "computing"]
    folder = tmp_path / "cache" / "alexnet_ddp" / "features"
    files = sorted(folder.glob("*.f32"))
    assert sorted(file.stat().st_size for file in files) == [4 * 1024 * 11, 4 * 1024 * 21]
    assert len(list(folder.iterdir())) == 4
    assert start() == ["the", "the"]
    with files[0].open("r+b") as file:
        file.write(b"\x01")
    assert sorted(start()) == ["computing", "the"]
    assert "its SHA-256 is another one" in caplog.text
    assert start("data.mean=[0.5,0.5,0.5]") == ["computing", "computing"]
    assert start("data.limit_train=10") == ["computing", "the"]
    assert len(list(folder.glob("*.f32"))) == 5


def test_a_feature_file_is_complete_or_absent(tmp_path, caplog):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    file = FeatureFile(tmp_path / "new" / "key", 4, (3,), [1.0])
    assert file.open(True, True) is None
    writer = FeatureWriter(file)
    writer.add(values[:3])
    writer.close()  # an error elsewhere
    assert list((tmp_path / "new").iterdir()) == []
    writer = FeatureWriter(file)
    writer.add(values[:3])
    writer.add(values[3:])
    writer.commit([Skipped(1, 2, "damaged", "x.jpg is damaged")])
    writer.close()
    found = file.open(True, accepts_bad=True)
    assert found is not None
    assert writer.error is None
    np.testing.assert_array_equal(found.array, values)
    assert found.bad == {2: Skipped(1, 2, "damaged", "x.jpg is damaged")}
    assert file.open(True, accepts_bad=False) is None
    assert FeatureFile(file.path, 4, (3,), [1.01]).open(True, True) is None  # another network
    assert "WARNING" not in caplog.text
    assert FeatureFile(file.path, 5, (3,), [1.0]).open(True, True) is None
    assert "48 bytes, not 60" in caplog.text
    file.record.write_text('{"bad": []}')
    assert file.open(True, True) is None
    file.record.unlink()
    assert file.open(True, True) is None


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"cannot be written \(.*set XDG_CACHE_HOME"):
        FeatureWriter(FeatureFile(tmp_path / "file" / "key", 4, (3,), [1.0]))


def test_an_image_that_is_replaced_by_one_of_equal_size_is_noticed(tmp_path):
    index = index_folder(make_folder(tmp_path, 5, 5), "train")
    before, path = modification_times(index), Path(index.name(3))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert modification_times(index) != before


def test_a_network_that_computes_something_after_its_head_is_refused(tmp_path):
    path = tmp_path / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), path)
    more = ["model.name=squeezenet1_1", f"model.weights={path}", "data.image_size=64", CACHED]
    cfg = compose([*DATA, *more, f"run.root={tmp_path}"])
    with distributed.session(Device.cpu) as world, pytest.raises(ConfigError) as error:
        TrainingParts(RunSetup(cfg, world))
    assert str(error.value) == (
        "finetune.cache_features=true needs a network that ends with its head, and SqueezeNet "
        "computes something after classifier.1; leave finetune.cache_features false"
    )


HEAD = f"{CACHED} finetune.method=head model.weights=x"
WRONG = {
    CACHED: (
        "finetune.cache_features (true) would be ignored with finetune.method=full; leave it false"
    ),
    HEAD: (
        "finetune.cache_features=true computes each image once, and this augmentation changes it "
        "in each epoch; use augment=none, or leave finetune.cache_features false"
    ),
    f"{HEAD} augment=none data.start_image_size=32 data.grow_epochs=2": (
        "finetune.cache_features=true: data.start_image_size (32) changes the images in each "
        "epoch; leave it out, or leave finetune.cache_features false"
    ),
    f"{HEAD} augment=none trainer.compile=true": (
        "trainer.compile=true would be ignored: only the head is trained, which is one layer; "
        "leave it false, or leave finetune.cache_features false"
    ),
    f"{HEAD} augment=none data=plugin data.name=x": (
        "finetune.cache_features=true cannot tell whether the images of data=plugin are the same "
        "as before; leave finetune.cache_features false"
    ),
}


@pytest.mark.parametrize("overrides", WRONG)
def test_combinations_that_do_not_work_are_one_line(overrides):
    with pytest.raises(ConfigError) as error:
        compose(overrides.split())
    assert str(error.value) == WRONG[overrides]


@pytest.mark.slow
def test_the_commands_use_such_a_run_like_any_other(tmp_path):
    """Two ranks, a bad image that is skipped, a resumption without the cache; then one rank, evaluate, predict."""
    root = make_folder(tmp_path / "photos", 43, 21)
    bad = sorted(root.rglob("train/class1/*.jpg"))[2]
    bad.write_bytes(bad.read_bytes()[:300])
    torch.manual_seed(1)
    net = torchvision.models.resnet18(num_classes=7)
    net(torch.randn(8, 3, 64, 64))  # other running statistics than the initial ones
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    common = ["model=torchvision", "model.name=resnet18", "model.weights=resnet18.pth"]
    common += ["data=folder", f"data.root={root}", "data.image_size=64", "augment=none"]
    common += ["data.on_bad_image=skip", "trainer.global_batch_size=8", "trainer.epochs=2"]
    common += [
        "finetune.method=head",
        "scheduler=constant",
        "trainer.log_every_steps=1",
        "logger.tensorboard=false",
    ]
    env = {**ENV, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def train(name: str, ranks: int, *more: str) -> Path:
        given = [*common, f"run.name={name}", *more]
        done = run_command("alexnet_ddp.train", given, ranks, tmp_path, env)
        assert done.returncode == 0, done.stdout
        return tmp_path / "runs" / name

    plain, cached = train("plain", 2), train("cached", 2, CACHED)
    for key in ("train/loss", "val/loss", "val/top1"):
        expected, found = rows(plain, key), rows(cached, key)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], abs=1e-5)
    (row,) = [json.loads(line) for line in (cached / "quarantine.jsonl").read_text().splitlines()]
    assert row["name"] == str(bad)
    train("hit", 2, CACHED, "trainer.max_steps=7")
    hit = train("hit", 2, CACHED)
    for stem in ("model", "optimizer"):
        assert sha_of_newest(hit, stem) == sha_of_newest(cached, stem)
    one = train("one", 1, CACHED)
    key = "train/loss"
    losses = [[row[key] for row in rows(run_dir, key)] for run_dir in (one, cached)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    done = run_command("alexnet_ddp.evaluate", ["run.name=cached"], 0, tmp_path, env)
    assert done.returncode == 0, done.stdout
    top1 = rows(cached, "val/top1")[-1]["val/top1"]
    assert f"{top1:.2f}" in done.stdout
    images = [f"images={root / 'val'}", "output=out.jsonl"]
    done = run_command("alexnet_ddp.predict", ["run.name=cached", *images], 0, tmp_path, env)
    assert done.returncode == 0, done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 21
