"""parallel=hybrid equals parallel=ddp: real gloo processes, dropout on, indivisible batches."""

import logging.handlers

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ddp.config import (
    AlexNetConfig,
    ConfigError,
    DDPConfig,
    Device,
    Hook,
    HybridConfig,
    LARSConfig,
    NoAugmentConfig,
    SGDConfig,
    SyntheticConfig,
    TorchvisionConfig,
    TrainerConfig,
    WireDtype,
)
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.model import build_model
from alexnet_ddp.model.alexnet import AlexNet
from alexnet_ddp.model.dropout import key_dropout, set_dropout_keys
from alexnet_ddp.parallel import build, build_parallel, find_layers
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.errors import Diverged, RunError
from alexnet_ddp.training.ema import EMA
from alexnet_ddp.training.optim import build_optimizer, load_state_by_name, state_by_name
from alexnet_ddp.training.replicas import Replicas
from alexnet_ddp.training.replicas import differences as differences_of_shards
from alexnet_ddp.training.step import TrainStep
from alexnet_ddp.training.vote import StepVote
from tests.ranks import run_ranks
from tests.test_train import run

SGD = SGDConfig(lr=0.01, momentum=0.9, weight_decay=5e-4)
IMAGES = SyntheticConfig(image_size=64, num_train=103, num_val=10, num_classes=5)
# An epoch has 103 images: batches of 17, and a last one of a single image. Every step is clipped.
TRAINER = TrainerConfig(epochs=4, global_batch_size=17, clip_grad_norm=0.5, label_smoothing=0.1)


def small_alexnet():
    """AlexNet's structure with few units, whose numbers no group size divides."""
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(3, 16, 11, 4, 2),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(16, 13, 3),
        nn.ReLU(True),
    ]
    units = [
        nn.Dropout(0.5),
        nn.Linear(13 * 9, 401),
        nn.ReLU(True),
        nn.Dropout(0.5),
        nn.Linear(401, 307),
        nn.ReLU(True),
    ]
    model = AlexNet(nn.Sequential(*convolutions), 3, nn.Sequential(*units, nn.Linear(307, 5)))
    key_dropout(model)
    return model


def trained(parallel, num_steps, trainer=TRAINER, make=small_alexnet, optimizer=SGD):
    """Losses and gradient norms by step; after the last one, full parameters and local count."""
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        model = make()
        wrapped = build_parallel(parallel, model, world)
        decay = trainer.ema_decay
        ema = EMA(model, decay) if decay is not None else None
        updates = build_optimizer(optimizer, model, wrapped.global_norms)
        step = TrainStep(wrapped, updates, trainer, 0, world, (3, 64, 64), ema=ema)
        data = open_data(IMAGES).train
        sampler = GlobalBatchSampler(len(data), trainer.global_batch_size, seed=0)
        loader = build_loader(
            IMAGES, data, build_augment(NoAugmentConfig(), 0, 64, 73), 1, world.device
        )
        batches = loader.batches(
            sampler.micro_batches(
                range(num_steps), world.rank, world.world_size, trainer.micro_batch_size
            )
        )
        losses, norms = [], []
        for k in range(num_steps):
            outcome = step(batches, k, optimizer.lr, len(sampler.batch(k)), StepVote())
            sums = step.meter.read()
            losses.append(sums["loss"] / sums["images"])
            norms.append(float(outcome.grad_norm))
            step.meter.reset()
        loader.close()
        local = sum(p.numel() for p in model.parameters())
        if step.ema is not None:
            step.ema._fill(step.ema._average)
        full = {name: p.detach().numpy() for name, p in wrapped.full_model().named_parameters()}
    return losses, norms, full, local


def alexnet():
    return build_model(AlexNetConfig(), 5, 64, seed=0)


def differences(one, other):
    """The largest |a - b| / |a| of losses and norms, and that of parameter tensors."""
    found = [abs(a - b) / abs(a) for k in (0, 1) for a, b in zip(one[k], other[k])]
    return max(found), max(
        np.linalg.norm(one[2][n] - other[2][n]) / np.linalg.norm(one[2][n]) for n in one[2]
    )


@pytest.fixture(scope="module")
def reference():
    """Seven steps under ddp in one process."""
    return run_ranks(trained, 1, DDPConfig(), 7)[0]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("ranks", "cfg", "micro"),
    [(2, HybridConfig(), None), (3, HybridConfig(), 2), (4, HybridConfig(group_size=2), None)],
    ids=["2", "3 in micro-batches", "2 x 2"],
)
def test_hybrid_equals_ddp(reference, ranks, cfg, micro):
    trainer = TrainerConfig(**{**vars(TRAINER), "micro_batch_size": micro})
    for rank in run_ranks(trained, ranks, cfg, 7, trainer):
        assert max(differences(reference, rank)) < 1e-5
        limit = 0.6 if ranks != 3 else 0.4
        assert rank[3] < limit * reference[3]  # a rank holds its shards only


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_hybrid_equals_ddp_with_lars_and_averaged_weights(ranks):
    lars = LARSConfig(lr=2.0, eta=0.01, weight_decay=5e-4)
    trainer = TrainerConfig(**{**vars(TRAINER), "ema_decay": 0.5})
    (expected,) = run_ranks(trained, 1, DDPConfig(), 7, trainer, small_alexnet, lars)
    for rank in run_ranks(trained, ranks, HybridConfig(), 7, trainer, small_alexnet, lars):
        assert max(differences(expected, rank)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg", [DDPConfig(static_graph=True), DDPConfig(bucket_mb=0.1)], ids=["static", "buckets"]
)
def test_static_graph_and_bucket_size_do_not_change_the_result(reference, cfg):
    trainer = TrainerConfig(**{**vars(TRAINER), "micro_batch_size": 3})
    for rank in run_ranks(trained, 2, cfg, 7, trainer):
        assert max(differences(reference, rank)) < 1e-5


def in_float64(module, inputs):
    return tuple(x.double() for x in inputs)


def alexnet_in_float64():
    """AlexNet with a tenth of the units in its hidden layers, which takes a twentieth of the time."""
    model = alexnet()
    for k, (inputs, outputs) in {1: (9216, 409), 4: (409, 409), 6: (409, 5)}.items():
        model.classifier[k] = nn.Linear(inputs, outputs)
    model = model.double()
    model.register_forward_pre_hook(in_float64)
    return model


def trained_in_float64(parallel, num_steps):
    """In float32 a rounding difference flips a ReLU or a maximum after some steps. In float64 none does."""
    build._DTYPES[WireDtype.fp32] = torch.float64  # in this process, which ends with the test
    return trained(parallel, num_steps, TRAINER, alexnet_in_float64)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_hybrid_equals_ddp_after_twenty_steps(ranks, full):
    (expected,) = run_ranks(trained_in_float64, 1, DDPConfig(), 20)
    groups_of_two = [HybridConfig(group_size=2)] * (ranks == 4)
    for cfg in groups_of_two + [HybridConfig()] * (ranks == 2 or full):
        for rank in run_ranks(trained_in_float64, ranks, cfg, 20):
            assert max(differences(expected, rank)) < 1e-6


def test_two_of_the_three_layers_can_be_sharded(reference):
    cfg = HybridConfig(split=["classifier.1", "classifier.4"])
    for rank in run_ranks(trained, 2, cfg, 3):
        assert rank[0] == pytest.approx(reference[0][:3], rel=1e-5)


def test_bf16_activations_change_the_losses_by_less_than_a_thousandth(reference):
    for rank in run_ranks(trained, 2, HybridConfig(wire_dtype=WireDtype.bf16), 7):
        assert rank[0] != reference[0]
        assert rank[0] == pytest.approx(reference[0], rel=1e-3)


@pytest.mark.slow
def test_find_layers_finds_the_classifier_and_refuses_a_network_without_one():
    def network(name):
        return build_model(TorchvisionConfig(name=name), 1000, 224, seed=0)

    assert find_layers(build_model(AlexNetConfig(), 1000, 224, seed=0), None) == [
        f"classifier.{k}" for k in (1, 4, 6)
    ]
    assert find_layers(network("vgg11"), None) == [f"classifier.{k}" for k in (0, 3, 6)]
    with pytest.raises(ConfigError) as refused:
        find_layers(network("resnet18"), None)
    assert str(refused.value) == (
        "parallel=hybrid needs consecutive linear layers with at least half of the parameters; "
        "this network's largest linear layer has 0.5 M of 11.7 M. Their gradients cost less than "
        "gathering activations would; use parallel=ddp"
    )
    with pytest.raises(ConfigError, match=r"possible: classifier.1, classifier.4, classifier.6"):
        find_layers(
            build_model(AlexNetConfig(), 1000, 224, seed=0), ["classifier.1", "classifier.6"]
        )


def refused_on_three_ranks():
    chain = nn.Sequential(nn.Linear(9, 2), nn.ReLU(), nn.Linear(2, 9))
    with distributed.session(Device.cpu) as world:
        with pytest.raises(RunError) as indivisible:
            build_parallel(HybridConfig(group_size=2), small_alexnet(), world)
        with pytest.raises(RunError) as narrow:
            build_parallel(HybridConfig(split=["0", "2"]), chain, world)
    assert indivisible.value.exit_code == narrow.value.exit_code == 64
    return str(indivisible.value), str(narrow.value)


def test_an_invalid_group_size_is_refused_on_all_ranks():
    for indivisible, narrow in run_ranks(refused_on_three_ranks, 3):
        assert (
            indivisible
            == "parallel.group_size (2) must divide the number of processes (3); nearest: 1 or 3"
        )
        assert narrow == (
            "parallel.group_size (3) must be at most 2, the smallest number of units in a sharded "
            "layer, so that each rank has one; use a divisor of 3, or parallel=ddp"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        (["parallel=auto", "model=alexnet"], "parallel=auto takes hybrid g=2: "),
        (
            ["parallel=hybrid", "parallel.group_size=auto", "model=alexnet"],
            "parallel.group_size=auto takes hybrid g=2",
        ),
    ],
)
def test_auto_takes_and_logs_what_the_cost_model_predicts(choice, taken, tmp_path):
    sizes = [
        "data=synthetic",
        "data.image_size=64",
        "trainer.global_batch_size=8",
        "trainer.max_steps=1",
    ]
    done = run("train", *sizes, *choice, "checkpoint.save_every_steps=null", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert taken in done.stdout


def dropout_after_the_sharded_layers():
    """The logits' shape. VGG's classifier has such a dropout if only two layers are sharded."""
    with distributed.session(Device.cpu) as world:
        torch.manual_seed(0)
        hidden = [nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Dropout(0.5), nn.Linear(7, 3))
        key_dropout(model)
        wrapped = build_parallel(HybridConfig(split=["0", "2"]), model, world)
        mine = slice(0, 3) if world.rank == 0 else slice(3, 5)
        set_dropout_keys(model, 0, 0, torch.arange(5, dtype=torch.int32)[mine])
        return wrapped(torch.rand(5, 9)[mine], 3).shape


def test_a_dropout_after_the_sharded_layers_sees_the_images_of_its_rank():
    assert run_ranks(dropout_after_the_sharded_layers, 2) == [(3, 3), (2, 3)]


def autocast_pass():
    """Gradient dtypes and loss of a pass in which rank 1 has no image."""
    with distributed.session(Device.cpu) as world:
        model, blank = small_alexnet(), torch.zeros(1, 3, 64, 64)
        wrapped = build_parallel(HybridConfig(), model, world)
        with torch.autocast("cpu", torch.bfloat16):
            wrapped.warm_up_buckets(blank)
            if world.rank == 0:
                set_dropout_keys(model, 0, 0, torch.arange(1, dtype=torch.int32))
                loss = wrapped(torch.ones(1, 3, 64, 64), 1).float().sum()
            else:
                loss = wrapped.zero_loss(blank, 1)
        loss.backward()
        wrapped.finish_backward()
        return {p.grad.dtype for p in model.parameters()}, float(loss.detach())


def test_under_autocast_a_rank_without_images_sends_the_same_dtypes():
    (dtypes, loss), (others, nothing) = run_ranks(autocast_pass, 2)
    assert dtypes | others == {torch.float32}
    assert np.isfinite(loss)
    assert nothing == 0


def infinity_on_rank_1():
    with distributed.session(Device.cpu) as world:
        model = small_alexnet()
        wrapped = build_parallel(HybridConfig(), model, world).eval()
        optimizer, scaler = build_optimizer(SGD, model), torch.amp.GradScaler("cpu")
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(wrapped(torch.ones(1, 3, 64, 64), 1).sum()).backward()
        if world.rank == 1:
            model.classifier[1].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        wrapped.sync_found_inf(scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale(), all(
            torch.equal(p, kept) for p, kept in zip(model.parameters(), before)
        )


def test_an_infinity_in_one_shard_of_a_gradient_skips_the_step_on_all_ranks():
    assert run_ranks(infinity_on_rank_1, 2) == [(2.0**15, True)] * 2


def test_the_norm_of_a_large_gradient_is_exact():
    """On CPUs torch's sum over all values at once is wrong by 2e-3."""
    from alexnet_ddp.training.optim import norms

    torch.manual_seed(0)
    gradients = [torch.randn(4096, 9216) * 1e-4, torch.randn(256, 3, 3, 3), torch.randn(7)]
    exact = [float(g.double().square().sum().sqrt()) for g in gradients]
    assert [float(n) for n in norms(gradients)] == pytest.approx(exact, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "bound"), [(Hook.fp16, 1e-3), (Hook.bf16, 5e-3), (Hook.powersgd, 0.05)]
)
def test_hooks_change_the_losses_within_their_bounds(reference, hook, bound):
    cfg = DDPConfig(hook=hook, powersgd_start_step=2 if hook is Hook.powersgd else None)
    (losses, *_), (others, *_) = run_ranks(trained, 2, cfg, 7)
    assert losses == others
    assert losses != reference[0]
    assert losses == pytest.approx(reference[0], rel=bound)


def powersgd_resumes():
    """Losses of six steps, and those of a run that is saved after three steps and resumed."""
    cfg = DDPConfig(hook=Hook.powersgd, powersgd_start_step=2)
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        data = open_data(IMAGES).train
        sampler = GlobalBatchSampler(len(data), 17, seed=0)
        loader = build_loader(
            IMAGES, data, build_augment(NoAugmentConfig(), 0, 64, 73), 1, world.device
        )

        def train(steps, saved=None):
            model = small_alexnet()
            if saved:
                model.load_state_dict(saved["model"])
            wrapped = build_parallel(cfg, model, world)
            optimizer = build_optimizer(SGD, model)
            step = TrainStep(wrapped, optimizer, TRAINER, 0, world, (3, 64, 64))
            if saved:
                load_state_by_name(optimizer, model, saved["optimizer"])
            wrapped.hook.load_state_dict(saved["hook"] if saved else {})
            wrapped.hook.set_step(steps.start)
            batches, losses = (
                loader.batches(sampler.micro_batches(steps, world.rank, world.world_size, None)),
                [],
            )
            for k in steps:
                step(batches, k, SGD.lr, 17, StepVote())
                losses.append(step.meter.read()["loss"])
                step.meter.reset()
            state = {"model": model.state_dict(), "optimizer": state_by_name(optimizer, model)}
            return losses, {**state, "hook": wrapped.hook.state_dict()}

        first, saved = train(range(3))
        saved = {
            stem: {name: t.clone() for name, t in tensors.items()}
            for stem, tensors in saved.items()
        }
        return (
            train(range(6))[0],
            first,
            train(range(3, 6), saved)[0],
            train(range(3, 6), saved | {"hook": {}})[0],
        )


def test_powersgd_resumes_with_its_saved_errors():
    for uninterrupted, first, rest, without_errors in run_ranks(powersgd_resumes, 2):
        assert [*first, *rest] == pytest.approx(uninterrupted, rel=1e-5)
        assert without_errors != pytest.approx(uninterrupted[3:], rel=1e-5)


def replicas_that_differ():
    """2 x 2 ranks: a check, a changed value in rank 3's shard of fc6, and another check."""
    with distributed.session(Device.cpu) as world:
        model = small_alexnet()
        wrapped = build_parallel(HybridConfig(group_size=2), model, world)
        replicas = Replicas(1, world)
        replicas.check(0, lambda: {"model": wrapped.sharded(model.state_dict())})
        if world.rank == 3:
            model.classifier[1].weight.data[5, 7] += 1
        with pytest.raises(Diverged) as error:
            replicas.check(1, lambda: {"model": wrapped.sharded(model.state_dict())})
    return str(error.value)


def test_a_shard_is_compared_with_its_copies_in_other_groups():
    for line in run_ranks(replicas_that_differ, 4):
        assert "the replicas differ after step 1: classifier.1.weight (" in line
        assert "they were equal at step 0" in line


def test_the_odd_one_of_three_copies_of_a_shard_is_named():
    sums = np.array([[1, 5], [2, 6]] * 3)  # three groups of two ranks, two tensors
    assert not differences_of_shards(sums, 2).any()
    sums[3, 1] = 9
    assert np.argwhere(differences_of_shards(sums, 2)).tolist() == [[3, 1]]
    two = differences_of_shards(sums[:4], 2)  # two that differ: either may be wrong
    assert two[:, 1].tolist() == [0, 1, 0, 2]


def warnings_of_setup(root, *overrides):
    """What RunSetup warns of."""
    from alexnet_ddp.config.compose import compose
    from alexnet_ddp.training.setup import RunSetup

    found = logging.handlers.BufferingHandler(99)
    found.setLevel(logging.WARNING)
    logging.getLogger("alexnet_ddp").addHandler(found)
    same = ["data=synthetic", "data.num_train=64", "trainer.global_batch_size=8", "run.name=x"]
    with distributed.session(Device.cpu) as world:
        cfg = compose("train", [*same, "trainer.epochs=2", f"run.root={root}", *overrides])
        RunSetup(cfg, world).checkpoints.close()
    return [record.getMessage() for record in found.buffer]


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (1, ["parallel.hook=bf16"], ["parallel.hook=bf16 has no effect with one rank"]),
        (
            2,
            ["parallel.hook=post_local_sgd", "parallel.local_sgd_start_step=16"],
            [
                "parallel.hook=post_local_sgd starts at step 16, and the run has 16 steps; "
                "give parallel.local_sgd_start_step"
            ],
        ),
        (2, ["parallel.hook=powersgd", "parallel.powersgd_start_step=15"], []),
    ],
)
def test_a_hook_without_effect_is_warned_of(ranks, overrides, expected, tmp_path):
    for found in run_ranks(warnings_of_setup, ranks, str(tmp_path), *overrides):
        assert found == expected
