"""What becomes of the gradients on their way between the ranks: DDP's communication hooks, by name."""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import ConfigError, DDPConfig, Hook
from alexnet_ddp.parallel.group import require_divisor
from alexnet_ddp.runtime.distributed import TIMEOUT, World, average, from_main

log = logging.getLogger(__name__)

_ONE_BUCKET_MB = 1e6
_PIECE = 4_000_000  # values of a message of a meeting


def bucket_size(cfg: DDPConfig, world: World) -> float | None:
    """MiB; None: DDP's own choice. Raises ConfigError."""
    if cfg.hook is not Hook.powersgd or world.device.type != "cpu":
        return cfg.bucket_mb
    if cfg.bucket_mb is not None:
        rule = "would be ignored with parallel.hook=powersgd on CPUs, where gloo needs all gradients in one bucket"
        raise ConfigError(f"parallel.bucket_mb ({cfg.bucket_mb:g}) {rule}; leave it null")
    return _ONE_BUCKET_MB  # with more, its messages cross each other, and gloo ends the run


def register_hook(
    ddp: DistributedDataParallel, cfg: DDPConfig, world: World
) -> "PowerSGD | LocalSGD | None":
    """Collective. fp16, bf16: gradients are rounded, summed in 16 bits, and widened again: half of the bytes."""
    match cfg.hook:
        case Hook.none:
            return None
        case Hook.fp16:
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        case Hook.bf16:
            ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
        case Hook.powersgd:
            return PowerSGD(ddp, cfg, world)
        case Hook.post_local_sgd if world.world_size > 1:
            return LocalSGD(ddp, cfg, world)
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
        self._world = world
        on_gpu = world.device.type == "cuda"
        self._layout = torch.tensor(
            [rank, cfg.bucket_mb or 0, on_gpu], dtype=torch.float32
        )  # of what it remembers

    def state_dict(self) -> dict[str, Tensor]:
        """Collective. By name; the same on all ranks, which then go on with the mean error, too. Nothing where a bad
        gradient has spoilt it: a run that goes on from there begins without errors.
        """
        errors = self._state.error_dict
        average(list(errors.values()), self._world)
        found = {f"error.{key}": t for key, t in errors.items()}
        found |= {f"p.{key}": t for key, t in self._state.p_memory_dict.items()}
        found |= {f"q.{key}": t for key, t in self._state.q_memory_dict.items()}
        return (
            found | {"layout": self._layout}
            if all(t.isfinite().all() for t in found.values())
            else {}
        )

    def set_step(self, step: int) -> None:
        """`step` steps are done."""
        self._state.iter = step

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        layout = tensors.pop("layout", self._layout)
        if not torch.equal(layout.cpu(), self._layout):
            log.warning(
                "parallel.hook=powersgd remembers another powersgd_rank, bucket_mb or device: it starts afresh"
            )
            tensors = {}
        places = {
            "error": self._state.error_dict,
            "p": self._state.p_memory_dict,
            "q": self._state.q_memory_dict,
        }
        for memory in places.values():
            memory.clear()
        for name, tensor in tensors.items():
            kind, key = name.split(".")
            places[kind][int(key)] = tensor.clone()


class LocalSGD:
    """Lin, Stich, Patel, Jaggi 2020: from a step on, a rank learns from the images of its own group alone, and every
    `period` steps the ranks meet: what they have learnt becomes its mean over all of them.

    The optimizer's moments are averaged with the weights (Yu, Jin, Yang 2019): behind a meeting the ranks are equal,
    and can be saved, evaluated and compared as under plain DDP. With a period of 1 and without clipping it is the
    mathematics of plain DDP for SGD, whose update is linear in the gradient.
    """

    def __init__(self, ddp: DistributedDataParallel, cfg: DDPConfig, world: World) -> None:
        self._world, self._period = world, cfg.local_sgd_period or 8
        self._start = 100 if cfg.local_sgd_start_step is None else cfg.local_sgd_start_step
        size = from_main(lambda: local_group(cfg, world), world)
        self._state = PostLocalSGDState(
            None, dist.new_subgroups(size, timeout=TIMEOUT)[0], self._start
        )
        ddp.register_comm_hook(self._state, post_localSGD_hook)
        self.set_step(0)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to remember behind a meeting."""
        return {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to load."""

    def set_step(self, step: int) -> None:
        """`step` steps are done, and the ranks are equal."""
        self._state.iter = self._met = step
        self.is_apart = step >= self._start  # in the coming step the ranks' gradients may differ

    def sync_replicas(
        self,
        step: int,
        planned: bool,
        tensors: Callable[[], list[Tensor]],
        progress: Callable[[], None],
    ) -> bool:
        """Collective. After `step` steps: make `tensors` equal, where it is time or planned. True if they are equal.

        progress: called before each message.
        """
        self.is_apart = step >= self._start
        if step <= self._start or step <= self._met:
            return True
        if step % self._period and not planned:
            return False
        for piece in _pieces(tensors()):
            progress()
            average(piece, self._world)
        self._met = step
        return True


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Small ones together and rows of large ones apart: few messages, none of which is long on a slow link."""
    piece, held = [], 0
    for tensor in tensors:
        rows = max(1, _PIECE * len(tensor) // max(1, tensor.numel()))
        for part in tensor.split(rows):
            if piece and held + part.numel() > _PIECE:
                yield piece
                piece, held = [], 0
            piece.append(part)
            held += part.numel()
    if piece:
        yield piece


def local_group(cfg: DDPConfig, world: World) -> int:
    """Ranks that learn together between two meetings. Raises ConfigError. Rank 0 decides: nodes may differ."""
    several_nodes = (
        world.local_world_size < world.world_size and world.world_size % world.local_world_size == 0
    )
    size = cfg.local_sgd_group or (world.local_world_size if several_nodes else 1)
    require_divisor("parallel.local_sgd_group", size, world)
    rule = f"is all of the {world.world_size} processes, which then never learn apart; use less, or parallel.hook=none"
    if size == world.world_size:
        raise ConfigError(f"parallel.local_sgd_group ({size}) {rule}")
    return size
