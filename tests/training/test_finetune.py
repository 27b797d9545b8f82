"""Fine-tuning: which parameters are trained, what is sent and saved for them, and resumption across the switch."""

import json
import os
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp.cli import compose
from alexnet_ddp.config import ConfigError, Device
from alexnet_ddp.model import Backbone, head_parameters
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training.parts import TrainingParts
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.vote import StepVote
from tests.ranks import run_command, run_ranks
from tests.test_train import ENV, sha_of_newest

IMAGES = [
    *("data=synthetic", "data.image_size=32", "data.num_train=64", "data.num_val=8"),
    *("data.num_classes=3", "trainer.global_batch_size=4", "scheduler=constant", "run.name=x"),
]
RESNET = ["model=torchvision", "model.name=resnet18"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A ResNet of seven classes, whose running statistics are not the initial ones."""
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=7)
    model(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def world():
    with distributed.session(Device.cpu) as alone:
        yield alone


def training(
    world: World,
    root: Path | str,
    weights: Path | str,
    *overrides: str,
    network: list[str] = RESNET,
) -> TrainingParts:
    cfg = compose([*IMAGES, *network, f"model.weights={weights}", f"run.root={root}", *overrides])
    return TrainingParts(RunSetup(cfg, world))


def go(parts: TrainingParts, steps: int) -> None:
    """Train as Trainer does, without what is due between the steps."""
    setup = parts.setup
    batches = parts.batches(setup.state.step)
    for _ in range(steps):
        step = setup.state.step
        num_images = len(setup.sampler.batch(step))
        parts.train_step(batches, step, setup.lr(step), num_images, StepVote())
        setup.state.step += 1
        if parts.unfreeze_due(setup.state.step):
            parts.unfreeze()


def copies(parts: TrainingParts) -> dict[str, dict[str, Tensor]]:
    return {
        stem: {name: tensor.clone() for name, tensor in group.items()}
        for stem, group in parts.state_dict().items()
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "torch optimizer.name=RAdam"])
def test_only_the_head_is_trained_decayed_and_saved_with_moments(
    world, tmp_path, weights, optimizer
):
    more = f"optimizer={optimizer} optimizer.weight_decay=0.1 trainer.ema_decay=0.5".split()
    parts = training(world, tmp_path, weights, "finetune.method=head", *more)
    before, head = copies(parts), {"fc.weight", "fc.bias"}
    assert set(head_parameters(parts.model)) == head
    go(parts, 3)
    with parts.evaluation_model() as model:
        assert not any(module.training for module in model.modules())
    go(parts, 1)
    after = copies(parts)
    assert changed(before["model"], after["model"]) == head
    assert changed(before["ema"], after["ema"]) == head
    assert changed(after["model"], after["ema"]) == head  # the average lags behind
    assert {name.rpartition("/")[2] for name in after["optimizer"]} == head
    assert [module for module in parts.model.modules() if module.training] == [parts.model.fc]
    parts.close()


@pytest.mark.slow
def test_a_frozen_backbone_computes_as_in_an_evaluation(world, tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "alexnet.pth"
    torch.save(torchvision.models.alexnet(num_classes=3).state_dict(), path)
    more = ["model=alexnet", f"model.weights={path}", "model.dropout=0.5", "data.image_size=64"]
    cfg = [*IMAGES, *more, f"run.root={tmp_path}", "finetune.method=head"]
    parts = TrainingParts(RunSetup(compose(cfg), world))
    images = torch.randn(4, 3, 64, 64)
    trained = parts.model(images)  # no dropout, so that features may be computed once
    assert trained.grad_fn is not None
    with parts.evaluation_model() as model:
        torch.testing.assert_close(model(images), trained, rtol=0, atol=0)
    parts.close()


def sent(root: str, weights: str, method: str) -> tuple[int, int]:
    """What sent_by() counts in a run with finetune.method."""
    with distributed.session(Device.cpu) as world:
        return sent_by(training(world, root, weights, f"finetune.method={method}"))


def sent_by(parts: TrainingParts) -> tuple[int, int]:
    """The values of one step's gradients that DDP reduces, and of the buffers that are averaged."""
    ddp, sizes = parts.parallel_model.ddp, []

    def count(state: None, bucket):
        sizes.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, count)
    go(parts, 1)
    parts.close()
    return sum(sizes), sum(buffer.numel() for buffer in parts.train_step._statistics)


@pytest.mark.slow
def test_nothing_is_sent_for_frozen_parameters_and_statistics(tmp_path, weights):
    full = torchvision.models.resnet18(num_classes=3)
    num_statistics = sum(b.numel() for b in full.buffers() if b.is_floating_point())
    for rank in run_ranks(sent, 2, str(tmp_path / "full"), str(weights), "full"):
        assert rank == (sum(p.numel() for p in full.parameters()), num_statistics)
    for rank in run_ranks(sent, 2, str(tmp_path / "head"), str(weights), "head"):
        assert rank == (512 * 3 + 3, 0)


def resumes(root: str, weights: str, optimizer: str, stops: list[int]) -> dict[int, dict]:
    """Train six steps with the switch after three; and resume from checkpoints of these steps."""
    more = ["finetune.method=gradual", "finetune.head_epochs=0.19", "trainer.ema_decay=0.9"]
    more += ["finetune.backbone_lr_factor=0.5", "finetune.layer_decay=0.7"]
    more += [f"optimizer={optimizer}", "optimizer.weight_decay=0.1", "optimizer.lr=0.01"]
    more += ["finetune.freeze_batch_norm=true"] * (optimizer == "adamw")
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        calm = training(world, f"{root}/calm", weights, *more)
        go(calm, 6)
        expected, found = copies(calm), {}
        for stop in stops:
            first = training(world, f"{root}/{stop}", weights, *more)
            go(first, stop)
            assert first.is_frozen(first.setup.state.step) == (stop < 3)
            first.setup.checkpoints.save(first.setup.state, first.state_dict(), is_last=True)
            first.setup.checkpoints.close()
            first.close()
            rest = training(world, f"{root}/{stop}", weights, *more)
            assert rest.setup.state.step == stop
            go(rest, 6 - stop)
            after = copies(rest)
            found[stop] = {
                stem: changed(expected[stem], after[stem]) for stem in ("model", "optimizer", "ema")
            }
            rest.setup.checkpoints.close()
            rest.close()
        calm.close()
        return found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.full), "adamw"])
def test_gradual_training_resumes_bit_equal_in_both_phases_and_at_the_switch(
    tmp_path, weights, optimizer, full
):
    """Without --full in the first phase and at the switch."""
    nothing, stops = {"model": set(), "optimizer": set(), "ema": set()}, [2, 3] + [5] * full
    for rank in run_ranks(resumes, 2, str(tmp_path), str(weights), optimizer, stops):
        assert rank == dict.fromkeys(stops, nothing)


def test_after_the_switch_all_parameters_are_trained_and_the_heads_moments_are_kept(
    world, tmp_path, weights
):
    gradual = ["finetune.method=gradual", "finetune.head_epochs=0.19", "optimizer=adamw"]
    parts = training(world, tmp_path, weights, *gradual)
    start = copies(parts)
    go(parts, 3)
    switch, stopwatch = copies(parts), parts.train_step.stopwatch
    assert changed(start["model"], switch["model"]) == {"fc.weight", "fc.bias"}
    moments = switch["optimizer"]
    assert moments["step/fc.weight"] == 3
    assert moments["step/conv1.weight"] == 0
    assert moments["exp_avg/fc.weight"].any()
    assert not moments["exp_avg/conv1.weight"].any()
    go(parts, 1)
    assert changed(switch["model"], copies(parts)["model"]) == set(switch["model"])
    assert all(module.training for module in parts.model.modules())
    assert parts.train_step.stopwatch is stopwatch  # the next row is of steps of both phases
    parts.close()


def test_a_frozen_batch_norm_keeps_its_statistics_and_trains_its_parameters(
    world, tmp_path, weights
):
    gradual = ["finetune.method=gradual", "finetune.head_epochs=0.12", "optimizer=adamw"]
    parts = training(world, tmp_path, weights, *gradual, "finetune.freeze_batch_norm=true")
    start = copies(parts)
    go(parts, 2)  # the head
    with parts.evaluation_model():
        pass
    go(parts, 1)  # all parameters
    moved, statistics = (
        changed(start["model"], copies(parts)["model"]),
        ("running_mean", "running_var"),
    )
    assert {"conv1.weight", "bn1.weight", "fc.weight"} <= moved
    assert not [name for name in moved if name.endswith((*statistics, "num_batches_tracked"))]
    assert moved | {n for n in start["model"] if n.endswith((*statistics, "tracked"))} == set(
        start["model"]
    )
    parts.close()


def test_a_parameter_that_the_network_excludes_stays_excluded():
    model = torchvision.models.resnet18(num_classes=3)
    model.conv1.weight.requires_grad_(False)
    backbone = Backbone(model)
    backbone.freeze()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "fc.weight",
        "fc.bias",
    ]
    backbone.unfreeze()
    excluded = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert excluded == ["conv1.weight"]


def test_a_network_without_a_known_head_is_refused():
    with pytest.raises(ConfigError, match="Bilinear has no linear layer and no convolution"):
        Backbone(nn.Bilinear(2, 3, 4))


@pytest.mark.slow
def test_a_checkpoint_without_these_options_is_one_of_a_full_training(world, tmp_path, weights):
    parts = training(world, tmp_path, weights)
    identity = parts.setup.checkpoints._identity
    for key in [key for key in identity if key.startswith("finetune.")]:
        del identity[key]
    parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True)
    parts.setup.checkpoints.close()
    parts.close()
    training(world, tmp_path, weights).close()
    with pytest.raises(ConfigError, match=r"finetune.method=head \(was unset\)"):
        training(world, tmp_path, weights, "finetune.method=head")
    training(world, tmp_path, weights, "finetune.method=head", "resume.allow_changes=true").close()


WRONG = {
    "finetune.method=head": (
        "finetune.method=head without model.weights trains the head of a network whose other weights are random; "
        "give model.weights"
    ),
    "finetune.head_epochs=2": (
        "finetune.head_epochs (2) would be ignored with finetune.method=full; leave it null"
    ),
    "finetune.method=head finetune.layer_decay=0.5": (
        "finetune.layer_decay (0.5) would be ignored with finetune.method=head; leave it 1"
    ),
    "finetune.layer_decay=1.1": "finetune.layer_decay (1.1) must be in (0, 1]",
    "finetune.backbone_lr_factor=0": "finetune.backbone_lr_factor (0.0) must be greater than 0",
    "finetune.method=gradual finetune.head_epochs=0": (
        "finetune.head_epochs (0.0) must be greater than 0"
    ),
    "finetune.method=gradual finetune.head_epochs=8 model.weights=x": (
        "finetune.head_epochs (8) must be less than trainer.epochs (8), or the rest is never trained; train longer, or "
        "use finetune.method=head"
    ),
    "finetune.method=lora": (
        "finetune.method=lora without model.weights adapts a network whose weights are random; give model.weights"
    ),
    "finetune.rank=4": "finetune.rank (4) would be ignored with finetune.method=full; leave it null",
    "finetune.method=head finetune.alpha=4": (
        "finetune.alpha (4) would be ignored with finetune.method=head; leave it null"
    ),
    "finetune.method=adalora optimizer=lars model.weights=x": (
        "finetune.method=adalora computes importances from gradients, which optimizer=lars overwrites; use "
        "optimizer=adamw or sgd"
    ),
    "finetune.method=lora finetune.freeze_batch_norm=true model.weights=x": (
        "finetune.freeze_batch_norm (true) is always so with finetune.method=lora; leave it false"
    ),
    "finetune.freeze_batch_norm=true": (
        "finetune.freeze_batch_norm (true) keeps the statistics of model.weights, and there are none; give "
        "model.weights, or leave it false"
    ),
    "finetune.method=lora parallel=hybrid model.weights=x": (
        "finetune.method=lora excludes the layers from training that parallel=hybrid splits; use parallel=ddp"
    ),
    "finetune.method=gradual parallel=hybrid model.weights=x": (
        "finetune.method=gradual excludes the layers from training that parallel=hybrid splits; use parallel=ddp"
    ),
    "finetune.method=head parallel.hook=powersgd model.weights=x": (
        "finetune.method=head does not go with parallel.hook=powersgd, which keeps state for parameters that are not "
        "trained; use parallel.hook=none, fp16 or bf16"
    ),
    "finetune.method=head parallel.hook=post_local_sgd model.weights=x": (
        "finetune.method=head does not go with parallel.hook=post_local_sgd, which keeps state for parameters that are "
        "not trained; use parallel.hook=none, fp16 or bf16"
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("overrides", WRONG)
def test_combinations_that_do_not_work_are_one_line(overrides):
    with pytest.raises(ConfigError) as error:
        compose(overrides.split())
    assert str(error.value) == WRONG[overrides]


def test_a_gradual_run_that_never_trains_the_backbone_is_refused_or_warned_of(
    world, tmp_path, weights, caplog
):
    more = ["finetune.method=gradual", "finetune.head_epochs=1.99", "trainer.epochs=2"]
    with pytest.raises(ConfigError) as error:
        training(world, tmp_path, weights, *more)
    assert str(error.value) == (
        "finetune.head_epochs (1.99) leaves none of the 32 steps to the layers before it; "
        "lower it, or train for more epochs"
    )
    more[1:] = ["finetune.head_epochs=1", "trainer.epochs=2", "trainer.max_steps=16"]
    training(world, tmp_path, weights, *more).close()
    assert "finetune.head_epochs (1): the run ends with trainer.max_steps=16 before" in caplog.text


@pytest.mark.slow
def test_the_command_trains_gradually_and_resumes_across_the_switch(
    image_folder, tmp_path, weights
):
    """Two ranks; a stop in the first phase, at the switch and in the second; then replay's state and evaluate."""
    overrides = [*RESNET, "data=folder", f"data.root={image_folder}", f"model.weights={weights}"]
    overrides += ["data.image_size=32", "trainer.global_batch_size=17", "trainer.epochs=2"]
    overrides += ["finetune.method=gradual", "finetune.head_epochs=0.43"]
    overrides += ["logger.tensorboard=false", "trainer.log_every_steps=1"]
    env = {**ENV, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    for name, stops in (("calm", (6,)), ("hit", (2, 3, 5, 6))):
        for stop in stops:
            more = [f"run.name={name}", f"trainer.max_steps={stop}"]
            done = run_command("alexnet_ddp.train", [*overrides, *more], 2, tmp_path, env)
            assert done.returncode == 0, done.stdout
            assert stop < 6 or "of 11,179,077 parameters are trained" in done.stdout
    for stem in ("model", "optimizer"):
        assert sha_of_newest(tmp_path / "runs/hit", stem) == sha_of_newest(
            tmp_path / "runs/calm", stem
        )
    done = run_command("alexnet_ddp.evaluate", ["run.name=hit"], 0, tmp_path, env)
    assert done.returncode == 0, done.stdout
    evaluated = json.loads((tmp_path / "runs/hit/evaluation.json").read_text())
    assert evaluated["checkpoint"].startswith("step-")  # not the file of model.weights
