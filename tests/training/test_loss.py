"""The training loss with class weights: exact for every division of the global batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_ddp.config import ConfigError, DDPConfig, Device, NoAugmentConfig, TrainerConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.effects import Effects, Mixing, apply_effects
from alexnet_ddp.data.loader import Batch, build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler, MicroBatch
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.parallel import build_parallel
from alexnet_ddp.runtime import distributed
from alexnet_ddp.training.loss import CrossEntropy, class_weights
from alexnet_ddp.training.optim import build_optimizer
from alexnet_ddp.training.step import TrainStep
from alexnet_ddp.training.vote import StepVote
from tests.ranks import run_ranks
from tests.training.test_step import IMAGES, SGD

WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
STEPS, BATCH = 5, 17


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * 64, 5))


def trained(micro_batch_size):
    """Losses by step, and the final weight, of TrainStep."""
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        model, sizes = network(), {"global_batch_size": BATCH, "micro_batch_size": micro_batch_size}
        trainer = TrainerConfig(epochs=9, label_smoothing=0.1, **sizes)
        wrapped = build_parallel(DDPConfig(), model, world)
        optimizer = build_optimizer(SGD, model)
        step = TrainStep(wrapped, optimizer, trainer, 0, world, (3, 64, 64), class_weights=WEIGHTS)
        images = open_data(IMAGES).train
        sampler = GlobalBatchSampler(len(images), BATCH, seed=0)
        augment = build_augment(NoAugmentConfig(), 0, 64, 73)
        loader = build_loader(IMAGES, images, augment, 1, world.device)
        works = sampler.micro_batches(range(STEPS), world.rank, world.world_size, micro_batch_size)
        batches, losses = loader.batches(works), []
        for k in range(STEPS):
            outcome = step(batches, k, SGD.lr, len(sampler.batch(k)), StepVote())
            losses.append(outcome.votes.loss)
        sums = step.meter.read()
        loader.close()
        return losses, sums["loss"] / sums["weight"], model[2].weight.detach().numpy()


def reference():
    """The same with torch's weighted mean over the global batch."""
    model, images = network(), open_data(IMAGES).train
    optimizer = torch.optim.SGD(
        model.parameters(), SGD.lr, SGD.momentum, weight_decay=SGD.weight_decay
    )
    sampler = GlobalBatchSampler(len(images), BATCH, seed=0)
    loader, losses = build_loader(IMAGES, images, None, 1, torch.device("cpu")), []
    for batch in loader.batches(sampler.micro_batches(range(STEPS), 0, 1, None)):
        logits = model(apply_effects(batch.images, batch.effects))
        loss = F.cross_entropy(logits, batch.labels, WEIGHTS, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    loader.close()
    return losses, model[2].weight.detach().numpy()


@pytest.mark.parametrize(("ranks", "micro"), [(1, None), (1, 4), (2, None), (3, 2)])
def test_class_weights_give_torchs_weighted_mean_over_the_global_batch(ranks, micro):
    losses, weight = reference()
    for found, mean, found_weight in run_ranks(trained, ranks, micro):
        assert found == pytest.approx(losses, rel=1e-5)
        assert min(losses) < mean < max(losses)
        assert np.linalg.norm(found_weight - weight) < 1e-5 * np.linalg.norm(weight)


def test_mixed_labels_are_weighted_by_class_and_share():
    torch.manual_seed(0)
    logits, own, other = torch.randn(4, 5), torch.tensor([0, 1, 2, 4]), torch.tensor([4, 1, 0, 3])
    share = torch.tensor([0.9, 0.5, 0.25, 1.0])
    mixing = Mixing(torch.tensor([1, 2, 3, 0]), other, share, torch.zeros(4, 4), share)
    micro_batch = MicroBatch(0, 0, np.arange(4), True)
    effects = Effects(mixing=mixing)
    batch = Batch(micro_batch, torch.zeros(0), own, torch.arange(4), effects, [])
    target = share[:, None] * F.one_hot(own, 5) + (1 - share[:, None]) * F.one_hot(other, 5)
    loss = CrossEntropy(0.0, WEIGHTS)
    assert loss(logits, batch).item() == pytest.approx(
        F.cross_entropy(logits, target, WEIGHTS, reduction="sum").item(), rel=1e-6
    )
    assert loss(logits, batch, "none").sum().item() == pytest.approx(loss(logits, batch).item())
    assert loss.weight(batch).item() == pytest.approx((target @ WEIGHTS).sum().item())


def test_balanced_weights_are_inverse_to_the_number_of_images():
    labels = np.repeat(np.arange(3, dtype=np.int32), [6, 2, 4])
    found = class_weights("balanced", labels, 3)
    assert found.tolist() == pytest.approx([12 / 18, 2.0, 1.0])  # as scikit-learn's
    assert found[labels].mean().item() == pytest.approx(1)
    assert class_weights(None, labels, 3) is None
    with pytest.raises(ConfigError, match=r"trainer.class_weights has 2 numbers, the data has 3"):
        class_weights([1.0, 2.0], labels, 3)
