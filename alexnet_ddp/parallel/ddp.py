"""Plain DistributedDataParallel: replicas, gradient buckets, and the communication hook."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import ConfigError, DDPConfig, Hook
from alexnet_ddp.parallel.group import ShardedTensor
from alexnet_ddp.parallel.hooks import PowerSGD
from alexnet_ddp.parallel.interface import CommHook
from alexnet_ddp.parallel.local_sgd import LocalSGD
from alexnet_ddp.parallel.modes import evaluation_mode
from alexnet_ddp.runtime.distributed import World

# torch 2.14 renamed the option that copies rank 0's buffers before each forward pass.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"
)
_ONE_BUCKET_MB = 1e6


class DDPModel(nn.Module):
    """A replica of the network on each rank; DDP averages the gradients.

    Implements ParallelModel (interface.py), which documents the methods.
    """

    def __init__(self, model: nn.Module, world: World, cfg: DDPConfig) -> None:
        """Collective. Raises ConfigError if an option does not fit the number or kind of ranks."""
        super().__init__()
        self._world = world
        renamed: dict[str, Any] = {_SYNC_BUFFERS: False}
        self.ddp = DistributedDataParallel(
            model,
            [world.device.index] if world.device.type == "cuda" else None,
            bucket_cap_mb=bucket_size(cfg, world),
            static_graph=cfg.static_graph,
            gradient_as_bucket_view=True,
            **renamed,
        )
        self.hook = register_hook(self.ddp, cfg, world)
        self._exchange: Callable[[], AbstractContextManager] = nullcontext

    @property
    def model(self) -> nn.Module:
        return self.ddp.module

    @property
    def is_split(self) -> bool:
        return False

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def forward(self, images: Tensor, max_images: int) -> Tensor:
        return self.ddp(images)

    def on_wait(
        self,
        waiting: Callable[[], AbstractContextManager],
        exchange: Callable[[], AbstractContextManager],
    ) -> None:
        """There are no sharded layers: a forward pass waits for nobody."""
        self._exchange = exchange

    def zero_loss(self, image: Tensor, max_images: int = 1) -> Tensor:
        with evaluation_mode(self.model):
            return self(image, max_images).float().sum() * 0.0

    def warm_up_buckets(self, image: Tensor) -> nn.Parameter:
        """Collective. Run one backward pass without effect, before the first step of a process.

        DDP rebuilds its buckets in the forward pass that follows its first backward pass, and a sum
        over three or more ranks depends on the bucket layout. With this pass, a resumed run adds
        in the same order as an uninterrupted one. Returns the parameter whose gradient came last.
        """
        order: list[Tensor] = []
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(order.append) for p in parameters]
        self.zero_loss(image).backward()
        self.finish_backward()
        for hook in hooks:
            hook.remove()
        self.zero_grad(set_to_none=True)
        return next(p for p in parameters if p is order[-1])

    def no_sync(self) -> AbstractContextManager[None]:
        return self.ddp.no_sync()

    def finish_backward(self) -> None:
        """Nothing to wait for: DDP's own backward pass waits for its buckets."""

    def sync_found_inf(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._gradients_differ and scaler.is_enabled():
            for found in scaler._found_inf_per_device(optimizer).values():
                with self._exchange():
                    dist.all_reduce(found, op=dist.ReduceOp.MAX)

    def global_norms(self, norms: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """Collective. `norms`, or their root mean square over the ranks while gradients differ.

        With the root mean square, all ranks clip by the same norm.
        """
        if not self._gradients_differ:
            return norms
        squares = norms.square()
        with self._exchange():
            dist.all_reduce(squares)
        return (squares / self._world.world_size).sqrt()

    def sharded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | ShardedTensor]:
        return dict(tensors)

    def local(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def full_model(self) -> nn.Module:
        return self.model

    @property
    def _gradients_differ(self) -> bool:
        """True if the ranks have different gradients after the backward pass."""
        return self.hook is not None and self.hook.gradients_differ


def bucket_size(cfg: DDPConfig, world: World) -> float | None:
    """The size of a gradient bucket in MiB; None selects DDP's default. Raises ConfigError."""
    if cfg.hook is not Hook.powersgd or world.device.type != "cpu":
        return cfg.bucket_mb
    if cfg.bucket_mb is not None:
        raise ConfigError(
            f"parallel.bucket_mb ({cfg.bucket_mb:g}) would be ignored with parallel.hook=powersgd "
            "on CPUs, where gloo needs all gradients in one bucket; leave it null"
        )
    # With several buckets the messages of different buckets interleave, and gloo aborts.
    return _ONE_BUCKET_MB


def register_hook(ddp: DistributedDataParallel, cfg: DDPConfig, world: World) -> CommHook | None:
    """Collective. Register the configured communication hook; return it if it has state.

    fp16 and bf16 round the gradients, sum them in 16 bits and widen them again: half the bytes.
    """
    match cfg.hook:
        case Hook.fp16:
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        case Hook.bf16:
            ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
        case Hook.powersgd:
            return PowerSGD(ddp, cfg, world)
        case Hook.post_local_sgd if world.world_size > 1:
            return LocalSGD(ddp, cfg, world)
    return None
