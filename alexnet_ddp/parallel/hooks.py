"""What becomes of the gradients on their way between the ranks: DDP's communication hooks, by name."""

from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import DDPConfig, Hook
from alexnet_ddp.distributed import World, average

ONE_BUCKET_MB = 1e6


def register_hook(ddp: DistributedDataParallel, cfg: DDPConfig) -> "PowerSGD | None":
    """fp16, bf16: gradients are rounded, summed in 16 bits, and widened again: half of the bytes."""
    match cfg.hook:
        case Hook.none:
            return None
        case Hook.fp16:
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        case Hook.bf16:
            ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
        case Hook.powersgd:
            return PowerSGD(ddp, cfg)
    return None


class PowerSGD:
    """Vogels, Karimireddy, Jaggi 2019, as torch has it: of each matrix the ranks send a product of two thin ones, and
    each adds what the product has missed to its next gradient.

    What follows depends on the mean of these errors over the ranks, and not on which rank has which: a checkpoint holds
    the mean, and a run goes on from it on any number of ranks, equal to rounding.
    """

    def __init__(self, ddp: DistributedDataParallel, cfg: DDPConfig) -> None:
        rank, start = cfg.powersgd_rank or 4, cfg.powersgd_start_step or 100
        self._state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=start)
        ddp.register_comm_hook(self._state, powerSGD_hook)

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Collective. By name; the same on all ranks, which then go on with the mean error, too."""
        errors = self._state.error_dict
        average(list(errors.values()), world)
        found = {f"error.{key}": t for key, t in errors.items()}
        found |= {f"p.{key}": t for key, t in self._state.p_memory_dict.items()}
        return found | {f"q.{key}": t for key, t in self._state.q_memory_dict.items()}

    def go_on(self, step: int, tensors: dict[str, Tensor]) -> None:
        """`step` steps are done; tensors: what tensors() gave then."""
        self._state.iter = step
        places = {"error": self._state.error_dict, "p": self._state.p_memory_dict, "q": self._state.q_memory_dict}
        for memory in places.values():
            memory.clear()
        for name, tensor in tensors.items():
            kind, key = name.split(".")
            places[kind][int(key)] = tensor.clone()
