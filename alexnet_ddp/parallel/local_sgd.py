"""Post-local SGD: average gradients within a group, and parameters over all ranks periodically."""

from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import ConfigError, DDPConfig
from alexnet_ddp.parallel.group import require_divisor
from alexnet_ddp.runtime.distributed import TIMEOUT, World, average, from_main

_MESSAGE_SIZE = 4_000_000  # values per message


class LocalSGD:
    """Post-local SGD (Lin, Stich, Patel, Jaggi 2020).

    After `local_sgd_start_step`, gradients are averaged only within each group. Every
    `local_sgd_period` steps, parameters and optimizer moments are averaged across all ranks
    (moments: Yu, Jin, Yang 2019). The replicas are then equal and can be saved, evaluated and
    compared as under plain DDP. With SGD, a period of 1 and no clipping, the result equals plain
    DDP's, because SGD's update is linear in the gradient.
    """

    def __init__(self, ddp: DistributedDataParallel, cfg: DDPConfig, world: World) -> None:
        self._world = world
        self._period: int = cfg.value_of("local_sgd_period")
        self._start: int = cfg.value_of("local_sgd_start_step")
        self._synced_at = 0
        self._gradients_differ = self._start == 0
        size = from_main(lambda: local_group(cfg, world), world)
        group, _ = dist.new_subgroups(size, timeout=TIMEOUT)
        self._state = PostLocalSGDState(None, group, self._start)
        ddp.register_comm_hook(self._state, post_localSGD_hook)

    @property
    def gradients_differ(self) -> bool:
        return self._gradients_differ

    def state_dict(self) -> dict[str, Tensor]:
        """An empty dict: checkpoints are written only while the replicas are equal."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""

    def set_step(self, step: int) -> None:
        self._state.iter = step
        self._synced_at = step
        self._gradients_differ = step >= self._start

    def sync_replicas(
        self,
        step: int,
        required: bool,
        tensors: Callable[[], list[Tensor]],
        progress: Callable[[], None],
    ) -> bool:
        self._gradients_differ = step >= self._start
        if step <= self._start or step <= self._synced_at:
            return True
        if step % self._period and not required:
            return False
        for message in _messages(tensors()):
            progress()
            average(message, self._world)
        self._synced_at = step
        return True


def _messages(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Join small tensors and split large ones by rows, into messages of similar size.

    There are few messages, and none of them takes long on a slow link.
    """
    message: list[Tensor] = []
    size = 0
    for tensor in tensors:
        num_rows = max(1, _MESSAGE_SIZE * len(tensor) // max(1, tensor.numel()))
        for rows in tensor.split(num_rows):
            if message and size + rows.numel() > _MESSAGE_SIZE:
                yield message
                message, size = [], 0
            message.append(rows)
            size += rows.numel()
    if message:
        yield message


def local_group(cfg: DDPConfig, world: World) -> int:
    """The number of ranks in a group. Raises ConfigError.

    Let rank 0 decide, since the number of ranks per node may differ between nodes.
    """
    several_nodes = (
        world.local_world_size < world.world_size and world.world_size % world.local_world_size == 0
    )
    size = cfg.local_sgd_group or (world.local_world_size if several_nodes else 1)
    require_divisor("parallel.local_sgd_group", size, world)
    if size == world.world_size:
        raise ConfigError(
            f"parallel.local_sgd_group ({size}) must be less than the number of processes "
            f"({world.world_size}), or no gradient is local; use less, or parallel.hook=none"
        )
    return size
