"""Averaged weights: the formula, and what becomes of them in a run. test_train.py has resumption and evaluation."""

import pytest
import torch
from torch import Tensor, nn

from alexnet_ddp.cli import compose
from alexnet_ddp.config import Device
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training.ema import EMA
from alexnet_ddp.training.parts import TrainingParts
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.vote import StepVote

YES, NO = torch.tensor(True), torch.tensor(False)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def drift(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model[1].running_mean.add_(1)


def test_the_average_follows_its_formula_and_begins_as_the_weights():
    model = net()
    ema, expected = (
        EMA(model, 0.9),
        {n: p.detach().double().clone() for n, p in model.named_parameters()},
    )
    for _ in range(5):
        drift(model)
        ema.update(YES)
        expected = {
            n: 0.9 * expected[n] + 0.1 * p.detach().double() for n, p in model.named_parameters()
        }
    for name, average in expected.items():
        torch.testing.assert_close(ema.state_dict()[name].double(), average, rtol=1e-6, atol=1e-6)


def test_a_step_that_was_not_applied_leaves_the_average_as_it_is():
    ema = EMA(model := net(), 0.9)
    before = {n: t.clone() for n, t in ema.state_dict().items()}
    drift(model)
    ema.update(NO)
    assert all(
        torch.equal(ema.state_dict()[name], before[name]) for name, _ in model.named_parameters()
    )


def test_a_file_of_averages_is_a_file_of_weights_with_the_buffers_of_now():
    ema = EMA(model := net(), 0.9)
    drift(model)
    found = ema.state_dict()
    assert list(found) == list(model.state_dict())
    assert torch.equal(found["1.running_mean"], model[1].running_mean)
    assert not torch.equal(found["0.weight"], model[0].weight)


def test_an_evaluation_has_the_averages_and_training_its_weights_again_even_after_an_error():
    ema = EMA(model := net(), 0.9)
    drift(model)
    mine = {n: t.clone() for n, t in model.state_dict().items()}

    def evaluate() -> None:
        with ema.in_place():
            assert all(torch.equal(t, ema.state_dict()[n]) for n, t in model.state_dict().items())
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert all(torch.equal(t, mine[n]) for n, t in model.state_dict().items())


# --- in a run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def world():
    with distributed.session(Device.cpu) as alone:
        yield alone


def training(world: World, root, *overrides: str) -> TrainingParts:
    cfg = compose(["data=synthetic", "data.image_size=32", "data.num_train=64", "data.num_val=8", *overrides,
                   "data.num_classes=3", "trainer.global_batch_size=4", f"run.root={root}", "run.name=x"])  # fmt: skip
    return TrainingParts(RunSetup(cfg, world))


def go(run: TrainingParts, steps: int) -> None:
    setup = run.setup
    batches = run.batches(setup.state.step)
    for _ in range(steps):
        step = setup.state.step
        num_images = len(setup.sampler.batch(step))
        run.train_step(batches, step, setup.lr(step), num_images, StepVote())
        setup.state.step += 1


def copies(run: TrainingParts) -> dict[str, dict[str, Tensor]]:
    return {
        stem: {n: t.clone() for n, t in group.items()} for stem, group in run.state_dict().items()
    }


def test_a_gradient_that_is_not_finite_leaves_the_averages_and_a_roll_back_takes_them_back(
    world, tmp_path
):
    run = training(world, tmp_path, "trainer.ema_decay=0.9")
    go(run, 2)
    run.setup.checkpoints.save(run.setup.state, run.state_dict(), is_last=True)
    saved = copies(run)["ema"]
    parameter = next(run.model.parameters())
    poison = parameter.register_hook(lambda grad: grad * torch.nan)
    go(run, 1)
    poison.remove()
    assert run.train_step.poll_nonfinite()
    assert all(torch.equal(t, saved[name]) for name, t in copies(run)["ema"].items())
    go(run, 1)
    assert not torch.equal(copies(run)["ema"]["features.0.weight"], saved["features.0.weight"])
    run.roll_back(3)
    assert all(torch.equal(t, saved[name]) for name, t in copies(run)["ema"].items())
    run.setup.checkpoints.close()
    run.close()


def test_a_checkpoint_without_averages_lets_them_begin_as_its_weights(world, tmp_path, caplog):
    run = training(world, tmp_path)
    go(run, 1)
    run.setup.checkpoints.save(run.setup.state, run.state_dict(), is_last=True)
    run.setup.checkpoints.close()
    run.close()
    again = training(world, tmp_path, "trainer.ema_decay=0.9", "resume.allow_changes=true")
    assert (
        "no averaged weights (trainer.ema_decay): they are initialised with its weights"
        in caplog.text
    )
    found = copies(again)
    assert all(torch.equal(t, found["model"][name]) for name, t in found["ema"].items())
    again.setup.checkpoints.close()
    again.close()
