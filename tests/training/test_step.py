"""The training step and the evaluation: exact against a reference loop, and whatever the cuts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_ddp.config import (
    AdamWConfig,
    AlexNetConfig,
    AlexNetSmallConfig,
    BasicAugmentConfig,
    ConfigError,
    DDPConfig,
    Device,
    FolderConfig,
    NoAugmentConfig,
    OnBadImage,
    OnNan,
    Precision,
    SGDConfig,
    SyntheticConfig,
    TrainerConfig,
)
from alexnet_ddp.config.plugins import TorchOptimizerConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.effects import apply_effects, normalise
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler, evaluation_batches
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.model import build_model, set_dropout_keys
from alexnet_ddp.parallel import build_parallel
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.errors import DataError, RunError
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.training.evaluation import evaluate
from alexnet_ddp.training.optim import build_optimizer, state_by_name
from alexnet_ddp.training.precision import autocast, check_precision
from alexnet_ddp.training.step import TrainStep
from alexnet_ddp.training.vote import StepVote
from tests.ranks import run_ranks

SGD = SGDConfig(lr=0.01, momentum=0.9, weight_decay=5e-4)
IMAGES = SyntheticConfig(image_size=64, num_train=103, num_val=61, num_classes=5)


def steps(
    num_steps, world, model_cfg=None, trainer=None, data=IMAGES, spoil=None, how=None, cfg=SGD
):
    """Train `num_steps` steps in this process group: losses by step, final parameters, the TrainStep, the last outcome."""
    trainer = trainer or TrainerConfig(epochs=1, global_batch_size=17)
    model = build_model(model_cfg or AlexNetSmallConfig(), 5, 64, seed=0)
    step = TrainStep(
        build_parallel(DDPConfig(), model, world),
        build_optimizer(cfg, model),
        trainer,
        0,
        world,
        (3, data.image_size, data.image_size),
    )
    images = open_data(data).train
    sampler = GlobalBatchSampler(len(images), trainer.global_batch_size, seed=0)
    how = how or (NoAugmentConfig() if isinstance(data, SyntheticConfig) else BasicAugmentConfig())
    augment = build_augment(how, 0, 64, 73)
    loader = build_loader(data, images, augment, 1, world.device)
    works = sampler.micro_batches(
        range(num_steps), world.rank, world.world_size, trainer.micro_batch_size
    )
    batches, losses = loader.batches(works), []
    for k in range(num_steps):
        if spoil:
            spoil(k, model, world)
        outcome = step(batches, k, SGD.lr, len(sampler.batch(k)), StepVote())
        sums = step.meter.read()
        losses.append(sums["loss"] / sums["images"])
        step.meter.reset()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return losses, parameters, step, outcome


def losses_on_a_rank(num_steps, model_cfg, trainer):
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        losses, parameters, *_ = steps(num_steps, world, model_cfg, trainer)
    return losses, {name: p.numpy() for name, p in parameters.items()}


@pytest.fixture
def world():
    """A world of one, in this process."""
    with distributed.session(Device.cpu) as alone:
        yield alone


@pytest.mark.slow
def test_twenty_steps_of_alexnet_equal_a_plain_torch_loop(world, full):
    """Five without --full."""
    trainer, num_steps = TrainerConfig(epochs=1, global_batch_size=7), 20 if full else 5
    ours, parameters, *_ = steps(num_steps, world, AlexNetConfig(), trainer)

    # The reference: the same images, masks and initial weights; everything else is torch's own.
    model = build_model(AlexNetConfig(), 5, 64, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images = open_data(IMAGES).train
    sampler, loader = (
        GlobalBatchSampler(103, 7, seed=0),
        build_loader(IMAGES, images, None, 1, world.device),
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    reference = []
    for batch in loader.batches(sampler.micro_batches(range(num_steps), 0, 1, None)):
        x = ((batch.images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        set_dropout_keys(model, 0, batch.micro_batch.step, batch.indices)
        loss = F.cross_entropy(model(x), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reference.append(loss.item())

    assert ours == pytest.approx(reference, rel=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(parameters[name], p, rtol=1e-4, atol=1e-6), name


# The small one in every run of the tests; the one with 61 million parameters with --full.
LARGE = pytest.param(AlexNetConfig(), marks=[pytest.mark.slow, pytest.mark.full])
NETWORKS = [AlexNetSmallConfig(), LARGE]


@pytest.mark.parametrize("network", NETWORKS)
def test_one_two_three_ranks_and_three_micro_batches_train_the_same(network):
    """Dropout on, 103 images, batches of 51 and a last one of 1: two of three ranks have nothing to do in that step."""
    whole = TrainerConfig(epochs=1, global_batch_size=51)
    micro = TrainerConfig(epochs=1, global_batch_size=51, micro_batch_size=17)
    runs = [run_ranks(losses_on_a_rank, n, 4, network, whole) for n in (1, 2, 3)]
    runs.append(run_ranks(losses_on_a_rank, 1, 4, network, micro))
    (reference, parameters), *_ = runs[0]
    for ranks in runs:
        for losses, final in ranks:
            assert losses == pytest.approx(reference, rel=1e-5)
            for name in final:  # replicas are equal to the bit, and close to the single process
                assert np.array_equal(final[name], ranks[0][1][name]), name
                assert np.allclose(final[name], parameters[name], rtol=1e-3, atol=1e-5), name


EVERYTHING = BasicAugmentConfig(
    mixup_alpha=0.4,
    cutmix_alpha=1.0,
    erase=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
)


def seen(root, skip, rank, world_size, micro=None):
    """(step, index) -> the pixels, the partner's label and the share of the own label that the network gets to see."""
    data = FolderConfig(
        root=root, image_size=48, on_bad_image=OnBadImage.skip if skip else OnBadImage["raise"]
    )
    images, found = open_data(data).train, {}
    loader = build_loader(
        data, images, build_augment(EVERYTHING, 0, 48, 55), 2, torch.device("cpu")
    )
    for batch in loader.batches(
        GlobalBatchSampler(len(images), 17, seed=0).micro_batches(
            range(14), rank, world_size, micro
        )
    ):
        if not len(batch.indices):
            continue
        x, mixing = apply_effects(batch.images, batch.effects), batch.effects.mixing
        for k, i in enumerate(batch.indices.tolist()):
            found[batch.micro_batch.step, i] = (
                x[k].numpy().tobytes(),
                int(mixing.labels[k]),
                float(mixing.share[k]),
            )
    loader.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad", [pytest.param([], marks=pytest.mark.slow), ["00004.jpg", "00010.jpg"]]
)
def test_images_are_mixed_with_the_same_partners_for_every_world_size_and_micro_batch(
    image_folder, tmp_path, bad
):
    root = str(damaged(image_folder, tmp_path, bad) if bad else image_folder)
    whole = seen(root, bool(bad), 0, 1)
    assert len(whole) == 2 * (103 - len(bad))
    for world_size, micro in ((2, None), (3, None), (1, 5), (3, 2)):
        parts = [seen(root, bool(bad), rank, world_size, micro) for rank in range(world_size)]
        together = {key: value for part in parts for key, value in part.items()}
        assert (
            together == whole
        )  # also beside a bad image: whoever comes after it is mixed with itself


def mixed_losses_on_a_rank(num_steps, trainer, root):
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        data = FolderConfig(root=root, image_size=64)
        return steps(num_steps, world, AlexNetSmallConfig(), trainer, data, how=EVERYTHING)[0]


@pytest.mark.slow
def test_mixed_and_jittered_batches_have_the_same_losses_at_one_two_and_three_ranks(image_folder):
    whole = TrainerConfig(epochs=1, global_batch_size=51, label_smoothing=0.1)
    micro = TrainerConfig(epochs=1, global_batch_size=51, micro_batch_size=17, label_smoothing=0.1)
    runs = [run_ranks(mixed_losses_on_a_rank, n, 3, whole, str(image_folder)) for n in (1, 2, 3)]
    runs.append(run_ranks(mixed_losses_on_a_rank, 1, 3, micro, str(image_folder)))
    for ranks in runs:
        for losses in ranks:
            assert losses == pytest.approx(runs[0][0], rel=1e-5)


def statistics_on_a_rank():
    with distributed.session(Device.cpu) as world:
        model_cfg = AlexNetSmallConfig()
        model = build_model(model_cfg, 5, 64, seed=0)
        model.features.insert(1, nn.BatchNorm2d(64))
        step = TrainStep(
            build_parallel(DDPConfig(), model, world),
            build_optimizer(SGD, model),
            TrainerConfig(epochs=1, global_batch_size=17),
            *(0, world, (3, 64, 64)),
        )
        images = open_data(IMAGES).train
        sampler = GlobalBatchSampler(103, 17, seed=0)
        works = sampler.micro_batches(range(3), world.rank, 2, None)
        batches = build_loader(IMAGES, images, None, 1, world.device).batches(works)
        for k in range(3):
            step(batches, k, SGD.lr, 17, StepVote())
        return model.features[1].running_mean.tolist()


def test_running_statistics_are_averaged_over_the_ranks():
    first, second = run_ranks(statistics_on_a_rank, 2)
    assert first == second
    assert any(first)


def bad_step(what, rank, optimizer_cfg, on_nan, bad=1, num_steps=4):
    """Steps of a network with BatchNorm, where `what` ("loss" or "gradient") of step `bad` is spoilt on one rank.

    Tensors (parameters, buffers, moments) before each step and after the last, verdicts, sums of the last row.
    """
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        model = build_model(AlexNetSmallConfig(), 5, 64, seed=0)
        model.features.insert(1, nn.BatchNorm2d(64))
        optimizer = build_optimizer(optimizer_cfg, model)
        trainer = TrainerConfig(epochs=1, global_batch_size=17, on_nan=on_nan)
        step = TrainStep(
            build_parallel(DDPConfig(), model, world), optimizer, trainer, 0, world, (3, 64, 64)
        )
        images = open_data(IMAGES).train
        sampler = GlobalBatchSampler(103, 17, seed=0)
        batches = build_loader(IMAGES, images, None, 1, world.device).batches(
            sampler.micro_batches(range(num_steps), world.rank, world.world_size, None)
        )
        spoil, layer = False, model.classifier[-1]
        layer.weight.register_hook(
            lambda g: g * float("nan") if spoil and what == "gradient" else g
        )
        layer.register_forward_hook(
            lambda m, x, y: y * float("inf") if spoil and what == "loss" and m.training else y
        )
        states, votes = [], []
        for k in range(num_steps + 1):
            tensors = {**model.state_dict(), **state_by_name(optimizer, model)}
            states.append({name: t.clone().numpy() for name, t in tensors.items()})
            if k < num_steps:
                spoil = k == bad and world.rank == rank
                votes.append(step(batches, k, 0.01, 17, StepVote()).votes)
        return (
            states,
            [(v.nonfinite_loss, v.nonfinite_previous) for v in votes],
            step.meter.read(),
            step.poll_nonfinite(),
        )


def same(a, b):
    """AdamW makes its moments, of zeros, in its first step."""
    return all(np.array_equal(a.get(name, np.zeros_like(b[name])), b[name]) for name in b)


ADAMW = AdamWConfig(lr=0.01)


@pytest.mark.sampled
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("bad", "optimizer_cfg"),
    [
        (1, SGD),
        pytest.param(0, ADAMW, marks=pytest.mark.slow),
        pytest.param(0, SGD, marks=[pytest.mark.slow, pytest.mark.full]),
        pytest.param(1, ADAMW, marks=[pytest.mark.slow, pytest.mark.full]),
    ],
)
def test_nothing_of_a_bad_step_is_applied_on_any_rank_and_the_next_one_is(bad, what, optimizer_cfg):
    """Parameters, moments, BatchNorm's statistics and counts, the sums of the row. Also in the first step of all."""
    ranks = run_ranks(bad_step, 2, what, 1, optimizer_cfg, OnNan.skip, bad)
    for states, verdicts, sums, _ in ranks:
        assert same(states[bad], states[bad + 1])
        assert not same(states[bad + 1], states[bad + 2])
        assert all(np.isfinite(value).all() for value in states[-1].values())
        told = (bad, (True, False)) if what == "loss" else (bad + 1, (False, True))
        assert [(k, v) for k, v in enumerate(verdicts) if any(v)] == [told]
        assert sums["images"] == 3 * 17
        assert np.isfinite(sums["loss"])
        assert same(
            states[-1], {k: v for k, v in ranks[0][0][-1].items() if "num_batches" not in k}
        )


@pytest.mark.slow
def test_where_bad_steps_end_a_run_the_step_after_a_bad_gradient_is_not_applied_either():
    for states, verdicts, sums, _ in run_ranks(bad_step, 2, "gradient", 1, SGD, OnNan.stop):
        assert verdicts[2] == (False, True)
        assert same(states[1], states[2])
        assert same(states[2], states[3])
        assert sums["images"] == 2 * 17  # the first step and the last one


@pytest.mark.slow
def test_a_bad_gradient_of_the_last_step_is_told_once_when_asked():
    for states, verdicts, _, settled in run_ranks(bad_step, 2, "gradient", 0, SGD, OnNan.stop, 3):
        assert verdicts == [(False, False)] * 4
        assert settled
        assert same(states[3], states[4])


def broken_image_on_one_rank(root):
    with distributed.session(Device.cpu) as world:
        try:
            steps(7, world, data=FolderConfig(root=root, image_size=64))
        except RunError as error:
            return type(error).__name__, error.exit_code, error.only_here, str(error)
    return "no error", 0, False, ""


def test_a_broken_image_ends_all_ranks_and_the_one_that_saw_it_names_it(image_folder, tmp_path):
    root = damaged(image_folder, tmp_path, ["00004.jpg"])
    ends = run_ranks(broken_image_on_one_rank, 2, str(root))
    assert sorted(end[:3] for end in ends) == [("DataError", 65, True), ("PeerFailed", 65, False)]
    assert all("class4/00004.jpg: damaged" in end[3] for end in ends)


def test_a_skipped_image_is_a_smaller_batch_with_the_exact_mean(world, image_folder, tmp_path):
    """The gradient without it equals the one of a batch that never had it, whatever the nominal size."""
    root = damaged(image_folder, tmp_path, ["00004.jpg", "00010.jpg"])
    data = FolderConfig(root=str(root), image_size=64, on_bad_image=OnBadImage.skip)
    trainer = TrainerConfig(epochs=1, global_batch_size=103)
    losses, parameters, *_ = steps(1, world, trainer=trainer, data=data)

    model = build_model(AlexNetSmallConfig(), 5, 64, seed=0)
    optimizer = build_optimizer(SGD, model)
    images = open_data(data).train
    loader = build_loader(
        data, images, build_augment(BasicAugmentConfig(), 0, 64, 73), 1, world.device
    )
    batch = next(
        loader.batches(GlobalBatchSampler(103, 103, seed=0).micro_batches(range(1), 0, 1, None))
    )
    assert len(batch.labels) == 101
    set_dropout_keys(model, 0, 0, batch.indices)
    loss = F.cross_entropy(model(normalise(batch.images, None)), batch.labels)
    loss.backward()
    optimizer.step()
    assert losses == [pytest.approx(loss.item(), rel=1e-6)]
    for name, p in model.named_parameters():
        assert torch.allclose(parameters[name], p, rtol=1e-4, atol=1e-7), name


def damaged(folder, tmp_path, names):
    """A copy of a data set with some files cut in half."""
    import shutil

    root = shutil.copytree(folder, tmp_path / "damaged")
    for path in root.rglob("*.jpg"):
        if path.name in names and "train" in path.parts:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return root


def test_clipping_limits_the_norm_of_the_mean_gradient(world):
    trainer = TrainerConfig(epochs=1, global_batch_size=17, clip_grad_norm=1e-3)
    *_, step, outcome = steps(1, world, trainer=trainer)
    norms = torch.stack(
        [s.norm() for s in state_by_name(step.optimizer, step.parallel_model.model).values()]
    )
    decay = SGD.weight_decay * sum(
        p.norm() for p in build_model(AlexNetSmallConfig(), 5, 64, seed=0).parameters()
    )
    assert norms.norm() <= 1e-3 + decay
    assert outcome.grad_norm > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "SGD",
        "Adagrad",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("Adam", "AdamW", "Adafactor", "RMSprop")
        ),
    ],
)
def test_optimizers_of_torch_that_are_not_fused_train(world, name):
    """Their kernels refuse `found_inf`, which the fused ones read."""
    losses, *_ = steps(2, world, cfg=TorchOptimizerConfig(name=name, lr=1e-3))
    assert all(np.isfinite(losses))


def test_label_smoothing_is_torchs(world):
    trainer = TrainerConfig(epochs=1, global_batch_size=17, label_smoothing=0.2)
    smoothed, *_ = steps(1, world, trainer=trainer)
    plain, *_ = steps(1, world)
    assert smoothed != plain


def evaluate_on_a_rank():
    data = SyntheticConfig(image_size=32, num_train=5, num_val=1003, num_classes=7)
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        model = build_model(AlexNetSmallConfig(), 7, 32, seed=1)
        images = open_data(data).val
        works = evaluation_batches(len(images), 64, world.rank, world.world_size)
        batches = build_loader(data, images, None, 1, world.device).batches(works)
        result = evaluate(
            model, batches, TrainerConfig(epochs=1, global_batch_size=1), 7, world, StopSignal()
        )
    return result.row, result.per_class.tolist()


def test_evaluation_counts_every_image_once_for_any_number_of_ranks():
    rows = [row for n in (1, 2, 3, 5) for row in run_ranks(evaluate_on_a_rank, n)]
    reference, per_class = rows[0]
    assert reference["val/num_images"] == 1003
    assert 0 < reference["val/correct1"] < reference["val/correct5"] < 1003
    for row, table in rows:
        assert table == per_class
        assert {k: v for k, v in row.items() if k != "val/loss"} == {
            k: v for k, v in reference.items() if k != "val/loss"
        }
        assert row["val/loss"] == pytest.approx(reference["val/loss"], rel=1e-12)
    assert [sum(column) for column in zip(*per_class)] == [
        1003,
        reference["val/correct1"],
        reference["val/correct5"],
    ]


def stop_in_an_evaluation():
    data = SyntheticConfig(image_size=32, num_train=5, num_val=1003, num_classes=7)
    with distributed.session(Device.cpu) as world:
        model = build_model(AlexNetSmallConfig(), 7, 32, seed=1)
        images, stop = open_data(data).val, StopSignal()
        stop.received = world.rank == 1
        batches = build_loader(data, images, None, 1, world.device).batches(
            evaluation_batches(1003, 8, world.rank, world.world_size)
        )
        return (
            evaluate(model, batches, TrainerConfig(epochs=1, global_batch_size=1), 7, world, stop)
            is None
        )


def test_a_stop_signal_to_one_rank_leaves_the_evaluation_on_all():
    assert run_ranks(stop_in_an_evaluation, 2) == [True, True]


def test_a_broken_validation_image_names_itself(world, image_folder, tmp_path):
    root = damaged(image_folder, tmp_path, [])
    next(iter(sorted(root.glob("val/*/*.jpg")))).write_bytes(b"no image")
    data = FolderConfig(root=str(root), image_size=64)
    images = open_data(data).val
    batches = build_loader(data, images, None, 1, world.device).batches(
        evaluation_batches(61, 16, 0, 1)
    )
    model, trainer = (
        build_model(AlexNetSmallConfig(), 5, 64, 0),
        TrainerConfig(epochs=1, global_batch_size=1),
    )
    with pytest.raises(DataError, match=r"val/class0/00000\.jpg: not an image"):
        evaluate(model, batches, trainer, 5, world, StopSignal())


def test_normalise_is_torchvisions():
    from torchvision.transforms import functional as TF

    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    expected = TF.normalize(
        images.permute(0, 3, 1, 2) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    assert torch.allclose(normalise(images, None), expected, atol=1e-6)
    colour = torch.rand(3, 3)
    shifted = images.permute(0, 3, 1, 2) / 255 + colour[:, :, None, None]
    expected = TF.normalize(shifted, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(normalise(images, colour), expected, atol=1e-6)
    assert normalise(images, None).is_contiguous(memory_format=torch.channels_last)


def test_half_precision_on_a_cpu_is_refused(world):
    with pytest.raises(
        ConfigError,
        match=r"trainer.precision=bf16 needs a CUDA device, this run is on the CPU; use",
    ):
        check_precision(Precision.bf16, world)
    check_precision(Precision.fp32, world)
    assert not autocast(Precision.fp32, world)._enabled
