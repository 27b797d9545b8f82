"""What becomes of the gradients on their way between the ranks: DDP's communication hooks, by name."""

import logging

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import ConfigError, DDPConfig, Hook
from alexnet_ddp.distributed import World, average

log = logging.getLogger(__name__)

_ONE_BUCKET_MB = 1e6


def bucket_size(cfg: DDPConfig, world: World) -> float | None:
    """MiB; None: DDP's own choice. Raises ConfigError."""
    if cfg.hook is not Hook.powersgd or world.device.type != "cpu":
        return cfg.bucket_mb
    if cfg.bucket_mb is not None:
        rule = "would be ignored with parallel.hook=powersgd on CPUs, where gloo needs all gradients in one bucket"
        raise ConfigError(f"parallel.bucket_mb ({cfg.bucket_mb:g}) {rule}; leave it null")
    return _ONE_BUCKET_MB  # with more, its messages cross each other, and gloo ends the run


def register_hook(ddp: DistributedDataParallel, cfg: DDPConfig, world: World) -> "PowerSGD | None":
    """fp16, bf16: gradients are rounded, summed in 16 bits, and widened again: half of the bytes."""
    match cfg.hook:
        case Hook.none:
            return None
        case Hook.fp16:
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        case Hook.bf16:
            ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
        case Hook.powersgd:
            return PowerSGD(ddp, cfg, world)
    return None


class PowerSGD:
    """Vogels, Karimireddy, Jaggi 2019, as torch has it: of each matrix the ranks send a product of two thin ones, and
    each adds what the product has missed to its next gradient.

    What follows depends on the mean of these errors over the ranks, and not on which rank has which: a checkpoint holds
    the mean, and a run goes on from it on any number of ranks, equal to rounding.
    """

    def __init__(self, ddp: DistributedDataParallel, cfg: DDPConfig, world: World) -> None:
        rank, start = cfg.powersgd_rank or 4, cfg.powersgd_start_step or 100
        self._state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=start)
        ddp.register_comm_hook(self._state, powerSGD_hook)
        on_gpu = world.device.type == "cuda"
        self._layout = torch.tensor([rank, cfg.bucket_mb or 0, on_gpu], dtype=torch.float32)  # of what it remembers

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Collective. By name; the same on all ranks, which then go on with the mean error, too. Nothing where a bad
        gradient has spoilt it: a run that goes on from there begins without errors.
        """
        errors = self._state.error_dict
        average(list(errors.values()), world)
        found = {f"error.{key}": t for key, t in errors.items()}
        found |= {f"p.{key}": t for key, t in self._state.p_memory_dict.items()}
        found |= {f"q.{key}": t for key, t in self._state.q_memory_dict.items()}
        return found | {"layout": self._layout} if all(t.isfinite().all() for t in found.values()) else {}

    def go_on(self, step: int, tensors: dict[str, Tensor]) -> None:
        """`step` steps are done; tensors: what tensors() gave then."""
        self._state.iter = step
        layout = tensors.pop("layout", self._layout)
        if not torch.equal(layout.cpu(), self._layout):
            log.warning("parallel.hook=powersgd remembers another powersgd_rank, bucket_mb or device: it starts afresh")
            tensors = {}
        places = {"error": self._state.error_dict, "p": self._state.p_memory_dict, "q": self._state.q_memory_dict}
        for memory in places.values():
            memory.clear()
        for name, tensor in tensors.items():
            kind, key = name.split(".")
            places[kind][int(key)] = tensor.clone()
