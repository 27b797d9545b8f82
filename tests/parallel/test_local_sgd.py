"""parallel.hook=post_local_sgd equals plain DDP with period 1, else torch's SGD on own images."""

import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alexnet_ddp.config import ConfigError, DDPConfig, Device, Hook, NoAugmentConfig, TrainerConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.effects import apply_effects
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.model.dropout import set_dropout_keys
from alexnet_ddp.parallel import build_parallel, local_sgd
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.errors import RunError
from alexnet_ddp.training.optim import build_optimizer, state_by_name
from alexnet_ddp.training.step import TrainStep
from alexnet_ddp.training.vote import StepVote
from tests.conftest import make_folder
from tests.parallel.test_parallel import IMAGES, SGD, small_alexnet
from tests.ranks import run_ranks
from tests.test_train import SMALL, rows, run, sha_of_newest, start_and_hit

TRAINER = TrainerConfig(epochs=4, global_batch_size=17)


def local(period: int, start: int = 0, group: int | None = None) -> DDPConfig:
    names = {"local_sgd_period": period, "local_sgd_start_step": start, "local_sgd_group": group}
    return DDPConfig(hook=Hook.post_local_sgd, **names)


def batches_of(rank: int, world_size: int, num_steps: int):
    """Yield a rank's batch and the number of images in the global batch, step by step."""
    data = open_data(IMAGES).train
    sampler = GlobalBatchSampler(len(data), TRAINER.global_batch_size, seed=0)
    loader = build_loader(
        IMAGES, data, build_augment(NoAugmentConfig(), 0, 64, 73), 1, torch.device("cpu")
    )
    batches = loader.batches(sampler.micro_batches(range(num_steps), rank, world_size, None))
    for step in range(num_steps):
        yield next(batches), len(sampler.batch(step))
    loader.close()


def trained(cfg: DDPConfig, num_steps: int) -> tuple[list[bool], dict[str, np.ndarray]]:
    """Whether the replicas are equal after each step; this rank's final weights and moments."""
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        model = small_alexnet()
        wrapped = build_parallel(cfg, model, world)
        optimizer = build_optimizer(SGD, model)
        step = TrainStep(wrapped, optimizer, TRAINER, 0, world, (3, 64, 64))

        def state():
            return model.state_dict() | state_by_name(optimizer, model)

        equal = []
        if wrapped.hook is not None:
            wrapped.hook.set_step(0)
        for k, (batch, num_images) in enumerate(
            batches_of(world.rank, world.world_size, num_steps)
        ):
            step(iter([batch]), k, SGD.lr, num_images, StepVote())
            if wrapped.hook is not None:
                equal.append(
                    wrapped.hook.sync_replicas(
                        k + 1, False, lambda: list(state().values()), lambda: None
                    )
                )
        return equal, {name: t.numpy().copy() for name, t in state().items()}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest |a - b| / |a| of a tensor: how far two replicas are apart."""
    return max(np.linalg.norm(one[n] - other[n]) / np.linalg.norm(one[n]) for n in one)


def simulated(
    num_ranks: int, period: int, start: int, num_steps: int
) -> list[dict[str, np.ndarray]]:
    """The weights and moments of all ranks, computed in one process with torch's SGD."""
    torch.set_num_threads(1)
    models = [small_alexnet() for _ in range(num_ranks)]
    optimizers = [
        torch.optim.SGD(m.parameters(), SGD.lr, SGD.momentum, weight_decay=SGD.weight_decay)
        for m in models
    ]
    work = [batches_of(rank, num_ranks, num_steps) for rank in range(num_ranks)]
    for step in range(num_steps):
        for model, batches in zip(models, work):
            batch, num_images = next(batches)
            set_dropout_keys(model, 0, step, batch.indices)
            model.zero_grad()
            if len(batch.labels):
                logits = model(apply_effects(batch.images, batch.effects))
                (
                    F.cross_entropy(logits, batch.labels, reduction="sum") * num_ranks / num_images
                ).backward()
            else:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
        if step < start:
            average([[p.grad for p in m.parameters()] for m in models])
        for optimizer in optimizers:
            optimizer.step()
        if step + 1 <= start or (step + 1) % period == 0:
            average([[p.data for p in m.parameters()] for m in models])
            average(
                [
                    [o.state[p]["momentum_buffer"] for p in m.parameters()]
                    for m, o in zip(models, optimizers)
                ]
            )
    found = []
    for model, optimizer in zip(models, optimizers):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        moments = {
            f"momentum_buffer/{n}": optimizer.state[p]["momentum_buffer"]
            for n, p in model.named_parameters()
        }
        found.append({name: t.numpy() for name, t in (weights | moments).items()})
    return found


def average(tensors: list[list[torch.Tensor]]) -> None:
    for copies in zip(*tensors):
        mean = torch.stack(copies).mean(0)
        for copy in copies:
            copy.copy_(mean)


def test_with_period_1_it_equals_plain_ddp():
    ((_, expected),) = run_ranks(trained, 1, DDPConfig(), 7)
    for equal, found in run_ranks(trained, 3, local(period=1), 7):
        assert equal == [True] * 7
        assert apart(expected, found) < 1e-5


@pytest.mark.slow
def test_between_synchronisations_each_rank_trains_with_torchs_sgd_on_its_own_images():
    """Seven steps: gradients are averaged in two; replicas are equal after the third and sixth."""
    expected = simulated(2, period=3, start=2, num_steps=7)
    found = run_ranks(trained, 2, local(period=3, start=2), 7)
    assert [equal for equal, _ in found] == [[True, True, True, False, False, True, False]] * 2
    assert apart(expected[0], expected[1]) > 1e-3  # the last steps used different images
    for (_, one), other in zip(found, expected):
        assert apart(other, one) < 1e-5


@pytest.mark.slow
def test_the_ranks_of_a_group_stay_equal():
    found = [state for _, state in run_ranks(trained, 4, local(period=5, group=2), 3)]
    assert apart(found[0], found[1]) == apart(found[2], found[3]) == 0
    assert apart(found[0], found[2]) > 1e-3


def test_replicas_are_averaged_in_messages_of_similar_size(monkeypatch):
    monkeypatch.setattr(local_sgd, "_MESSAGE_SIZE", 900)
    tensors = [
        torch.zeros(3),
        torch.zeros(1000, 9).t(),
        torch.zeros(0),
        torch.zeros(10),
        torch.zeros(2, 5000),
    ]
    messages = list(local_sgd._messages(tensors))
    for message in messages:
        for piece in message:
            piece += 1
    assert all((tensor == 1).all() for tensor in tensors)  # each value once, in place
    # A row is not divided.
    assert max(sum(piece.numel() for piece in message) for message in messages) == 5000
    assert len(messages) == 1 + 9 + 1 + 2


def an_infinite_gradient_on_rank_1():
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        model = small_alexnet()
        wrapped = build_parallel(local(period=5), model, world)
        step = TrainStep(wrapped, build_optimizer(SGD, model), TRAINER, 0, world, (3, 64, 64))
        wrapped.hook.set_step(0)
        if world.rank == 1:
            model.classifier[1].weight.register_hook(lambda gradient: gradient * float("inf"))
        before = [p.detach().clone() for p in model.parameters()]
        batch, num_images = next(batches_of(world.rank, world.world_size, 1))
        step(iter([batch]), 0, SGD.lr, num_images, StepVote())
        return step.poll_nonfinite(), all(
            torch.equal(p, kept) for p, kept in zip(model.parameters(), before)
        )


def test_a_nonfinite_gradient_on_one_rank_skips_the_step_on_all():
    assert run_ranks(an_infinite_gradient_on_rank_1, 2) == [(True, True)] * 2


def refused(group: int) -> str:
    with distributed.session(Device.cpu) as world, pytest.raises(RunError) as error:
        build_parallel(local(period=5, group=group), small_alexnet(), world)
    assert error.value.exit_code == 64
    return str(error.value)


def test_an_invalid_group_is_refused_on_all_ranks():
    indivisible = (
        "parallel.local_sgd_group (2) must divide the number of processes (3); nearest: 1 or 3"
    )
    assert run_ranks(refused, 3, 2) == [indivisible] * 3
    all_ranks = "parallel.local_sgd_group (2) must be less than the number of processes (2)"
    assert all(line.startswith(all_ranks) for line in run_ranks(refused, 2, 2))


def test_its_options_are_refused_with_other_hooks_and_checked():
    with pytest.raises(
        ConfigError, match=r"parallel.local_sgd_period would be ignored with parallel.hook=none"
    ):
        DDPConfig(local_sgd_period=4)
    with pytest.raises(ConfigError, match=r"parallel.local_sgd_period \(0\) must be at least 1"):
        local(period=0)
    with pytest.raises(
        ConfigError, match=r"parallel.local_sgd_start_step \(-1\) must be at least 0"
    ):
        local(period=2, start=-1)


@pytest.mark.slow
def test_a_run_that_is_stopped_between_synchronisations_resumes_bit_equal(tmp_path):
    """A stop and a save by time wait for the next synchronisation; an epoch's end (26) is one."""
    make_folder(tmp_path / "data", 205, 21)
    overrides = [
        *SMALL,
        f"data.root={tmp_path}/data",
        f"run.root={tmp_path}/runs",
        "trainer.epochs=2",
    ]
    overrides += [
        "trainer.global_batch_size=8",
        "checkpoint.save_every_steps=20",
        "trainer.check_every_steps=10",
    ]
    overrides += [
        "parallel.hook=post_local_sgd",
        "parallel.local_sgd_period=4",
        "parallel.local_sgd_start_step=3",
    ]
    overrides += ["trainer.ema_decay=0.9", "optimizer=adamw", "optimizer.lr=0.001"]
    calm = run("train", *overrides, "run.name=calm", ranks=2, cwd=tmp_path)
    assert calm.returncode == 0, calm.stdout
    runs, hit = (
        tmp_path / "runs",
        [*overrides, "run.name=hit", "checkpoint.save_every_minutes=0.01"],
    )
    while start_and_hit(signal.SIGTERM, hit, runs / "hit", 17, ranks=2):
        newest = int(max((runs / "hit" / "checkpoints").glob("step-*")).name.split("-")[1])
        assert newest % 4 == 0 or newest in (1, 2, 3, 10, 26, 30, 50, 52)
    assert rows(runs / "hit", "train/loss")[-1]["step"] == 52
    losses = [
        {r["step"]: r["train/loss"] for r in rows(runs / name, "train/loss")}
        for name in ("calm", "hit")
    ]
    assert losses[0] == losses[1]
    for stem in ("model", "optimizer", "ema"):
        assert sha_of_newest(runs / "calm", stem) == sha_of_newest(runs / "hit", stem)
