"""Build the parallel model that the configuration selects, or check that it can be built."""

import torch
from torch import nn

from alexnet_ddp.config import (
    AUTO,
    DDPConfig,
    Hook,
    HybridConfig,
    ParallelConfig,
    WireDtype,
)
from alexnet_ddp.parallel.ddp import DDPModel, bucket_size
from alexnet_ddp.parallel.group import Group
from alexnet_ddp.parallel.hybrid import HybridModel, find_layers, group_size
from alexnet_ddp.parallel.interface import ParallelModel
from alexnet_ddp.parallel.local_sgd import local_group
from alexnet_ddp.runtime.distributed import World, from_main

_DTYPES = {WireDtype.fp32: torch.float32, WireDtype.bf16: torch.bfloat16}


def build_parallel(cfg: ParallelConfig, model: nn.Module, world: World) -> ParallelModel:
    """Collective. Wrap `model`, which must be equal on all ranks.

    DDP does not synchronise the buffers: the training step averages them (training/step.py).
    Raises ConfigError if the network or the number of ranks does not fit the configuration.
    """
    match cfg:
        case DDPConfig():
            return DDPModel(model, world, cfg)
        case HybridConfig():
            names = find_layers(model, cfg.split)
            size = from_main(lambda: group_size(cfg, model, names, world), world)
            ddp = DDPConfig(bucket_mb=cfg.bucket_mb)
            if size == 1:
                return DDPModel(model, world, ddp)
            group = Group.create(world, size, _DTYPES[cfg.wire_dtype])
            return HybridModel(model, world, ddp, names, group)
    raise TypeError(f"no parallelism for {type(cfg).__name__}")


def check_parallel(cfg: ParallelConfig, model: nn.Module, world: World) -> None:
    """Raise ConfigError if build_parallel() would, without communication between ranks."""
    match cfg:
        case DDPConfig():
            bucket_size(cfg, world)
            if cfg.hook is Hook.post_local_sgd and world.world_size > 1:
                local_group(cfg, world)
        case HybridConfig():
            names = find_layers(model, cfg.split)
            if cfg.group_size != AUTO:
                group_size(cfg, model, names, world)
