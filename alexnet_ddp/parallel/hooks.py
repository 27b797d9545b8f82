"""PowerSGD, a communication hook that compresses the gradients."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import DDPConfig
from alexnet_ddp.runtime.distributed import World, average

log = logging.getLogger(__name__)


class PowerSGD:
    """torch's PowerSGD (Vogels, Karimireddy, Jaggi 2019), with a state that can be saved.

    Ranks send low-rank factors of each gradient matrix. Each rank adds the approximation error to
    its next gradient. Training depends only on the mean of these errors over the ranks. The
    checkpoint contains that mean, so a run can resume on any number of ranks, equal to rounding.
    """

    gradients_differ = False

    def __init__(self, ddp: DistributedDataParallel, cfg: DDPConfig, world: World) -> None:
        rank = cfg.value_of("powersgd_rank")
        self._world = world
        self._state = PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=cfg.value_of("powersgd_start_step"),
        )
        ddp.register_comm_hook(self._state, powerSGD_hook)
        # The shapes of the saved tensors depend on these three values.
        self._layout = torch.tensor(
            [rank, cfg.bucket_mb or 0, world.device.type == "cuda"], dtype=torch.float32
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Collective. Replace each rank's errors by their mean, and return errors and factors.

        Returns an empty dict if a value is not finite: a run that resumes from it starts without
        errors.
        """
        average(list(self._state.error_dict.values()), self._world)
        state = {
            f"{kind}.{bucket}": tensor
            for kind, memory in self._memories().items()
            for bucket, tensor in memory.items()
        }
        if not all(tensor.isfinite().all() for tensor in state.values()):
            return {}
        return state | {"layout": self._layout}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore errors and factors; drop them, with a warning, if their shapes do not fit."""
        if not torch.equal(state.get("layout", self._layout).cpu(), self._layout):
            log.warning(
                "parallel.hook=powersgd: the checkpoint was saved with another powersgd_rank, "
                "bucket_mb or device; its errors are dropped"
            )
            state = {}
        memories = self._memories()
        for memory in memories.values():
            memory.clear()
        for name, tensor in state.items():
            if name != "layout":
                kind, bucket = name.split(".")
                memories[kind][int(bucket)] = tensor.clone()

    def set_step(self, step: int) -> None:
        self._state.iter = step

    def sync_replicas(
        self,
        step: int,
        required: bool,
        tensors: Callable[[], list[Tensor]],
        progress: Callable[[], None],
    ) -> bool:
        """True: all ranks apply the same gradient, so the replicas are always equal."""
        return True

    def _memories(self) -> dict[str, dict[int, Tensor]]:
        return {
            "error": self._state.error_dict,
            "p": self._state.p_memory_dict,
            "q": self._state.q_memory_dict,
        }
