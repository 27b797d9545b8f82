"""The mean of the weights of several checkpoints, with statistics of BatchNorm for these weights.

P. Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alexnet_ddp import rng
from alexnet_ddp.checkpoint.format import find_several
from alexnet_ddp.config import Config
from alexnet_ddp.data.loader import Batch, build_loader
from alexnet_ddp.data.sampler import MicroBatch, evaluation_batches
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import DataError, RunError
from alexnet_ddp.training.precision import autocast
from alexnet_ddp.training.trained import Trained, read_trained

log = logging.getLogger(__name__)


def read_average(
    cfg: Config,
    wanted: int | list[int],
    num_images: int,
    data_classes: list[str],
    open_train: Callable[[], SampleIndex],
    world: World,
) -> Trained:
    """Collective. The network with the mean of checkpoints of the run, on the device.

    wanted: see find_several. num_images: for the statistics of BatchNorm. data_classes: see
    read_trained. open_train: opens the training images, which networks without BatchNorm do not
    need. Raises ConfigError, NoCheckpoint or DataError.
    """
    checkpoints = cfg.run_dir / "checkpoints"
    chosen = distributed.from_main(lambda: find_several(checkpoints, wanted), world)
    trained = distributed.on_all(lambda: read_trained(cfg, chosen, data_classes), world)
    trained.model.to(world.device).to(memory_format=torch.channels_last)
    layers = _batch_norms(trained)
    if not layers:
        return trained
    train = distributed.first_on_node(open_train, world)
    loader = build_loader(cfg.data, train, None, world.num_cores, world.device)
    works = _shuffled_batches(len(train), num_images, cfg, world)
    with closing(loader), autocast(cfg.trainer.precision, world):
        num_used = estimate_statistics(trained.model, layers, loader.batches(works), world)
    log.info("the statistics of %d BatchNorm layers are of %d images", len(layers), num_used)
    return replace(trained, origin=trained.origin | {"batch_norm_images": num_used})


def _batch_norms(trained: Trained) -> list[_BatchNorm]:
    """The layers whose statistics vary between the checkpoints: those that are not frozen."""
    return [
        layer
        for name, layer in trained.model.named_modules()
        if isinstance(layer, _BatchNorm) and f"{name}.running_mean" in trained.varying
    ]


def _shuffled_batches(
    num_train: int, num_images: int, cfg: Config, world: World
) -> Iterator[MicroBatch]:
    """Full batches of a fixed choice of training images, the same for every number of ranks."""
    size = min(cfg.trainer.eval_batch_size, num_train)
    num_used = max(size, min(num_images, num_train) // size * size)
    order = rng.permutation(rng.fold(cfg.seed, rng.ORDER, 0), num_train)
    for work in evaluation_batches(num_used, size, world.rank, world.world_size):
        yield replace(work, indices=order[work.indices])


@torch.no_grad()
def estimate_statistics(
    model: nn.Module, layers: list[_BatchNorm], batches: Iterator[Batch], world: World
) -> int:
    """Collective. Set the running statistics of `layers` to their means over `batches`.

    As torch.optim.swa_utils.update_bn: each batch is normalised by its own statistics. But images
    are not augmented, there is no dropout, and batches are weighted by their number of images.
    The model is in evaluation mode afterwards. Returns the number of images of all ranks. Raises
    RunError on all ranks if a rank has one, and DataError if no batch has two images.
    """
    model.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = 1.0  # the running statistics are then those of the last batch
    sums = torch.zeros(1 + sum(map(len, _statistics(layers))), dtype=torch.float64)
    sums, error = sums.to(world.device), None
    try:
        for batch in batches:
            n = len(batch.labels)
            if n > 1:  # one value has no variance
                model(batch.inputs())
                found = torch.cat([sums.new_ones(1), *_statistics(layers)])
                sums += n * found
    except RunError as e:
        error = e
    distributed.raise_together(error, world)
    num_images, *_ = distributed.sum_over_ranks(sums).tolist()
    if num_images == 0:
        raise DataError("the statistics of BatchNorm need two training images that can be read")
    means = (sums[1:] / num_images).split([len(one) for one in _statistics(layers)])
    for own, mean in zip(_statistics(layers), means):
        own.copy_(mean)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
    model.eval()
    return int(num_images)


def _statistics(layers: list[_BatchNorm]) -> list[Tensor]:
    """The running means and variances, float [channels] each."""
    pairs = ((layer.running_mean, layer.running_var) for layer in layers)
    return [one for pair in pairs for one in pair if one is not None]
