"""Half precision: where it may be used, and how."""

import torch

from alexnet_ddp.config import Precision
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import ConfigError


def check_precision(precision: Precision, world: World) -> None:
    """Raise ConfigError for half precision without a GPU, where it is 10 to 100 times slower."""
    if precision is not Precision.fp32 and world.device.type != "cuda":
        rule = "needs a CUDA device, this run is on the CPU; use trainer.precision=fp32"
        raise ConfigError(f"trainer.precision={precision.value} {rule}")


def autocast(precision: Precision, world: World) -> torch.autocast:
    """The context of a forward pass."""
    dtype = torch.float16 if precision is Precision.fp16 else torch.bfloat16
    return torch.autocast(world.device.type, dtype, enabled=precision is not Precision.fp32)
