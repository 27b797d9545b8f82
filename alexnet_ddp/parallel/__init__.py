"""How replicas stay equal: DistributedDataParallel, for all of a network or for all but its large linear layers.

The loss that is differentiated is a sum over images times world_size / (images of the global batch), so that DDP's mean
over the ranks is the mean over the global batch, however uneven the slices are.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import AUTO, DDPConfig, Hook, HybridConfig, ParallelConfig, WireDtype
from alexnet_ddp.parallel.group import Group, Part, SplitTensor
from alexnet_ddp.parallel.hooks import LocalSGD, PowerSGD, bucket_size, local_group, register_hook
from alexnet_ddp.parallel.layers import find_layers, group_size, split_layers
from alexnet_ddp.runtime.distributed import World, from_main

# torch 2.14 renamed the option that copies rank 0's buffers before each forward pass.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"
)


def build_parallel(cfg: ParallelConfig, model: nn.Module, world: World) -> "ParallelModel":
    """Collective. Wrap `model`, alike on all ranks. Later, buffers are ours to average (engine.py).

    Raises ConfigError where the network, or the number of ranks, does not suit.
    """
    match cfg:
        case DDPConfig():
            options = {"bucket_cap_mb": bucket_size(cfg, world), "static_graph": cfg.static_graph}
            wrapped = ParallelModel(model, world, options)
            wrapped.hook = register_hook(wrapped.ddp, cfg, world)
            return wrapped
        case HybridConfig():
            names = find_layers(model, cfg.split)
            size = from_main(lambda: group_size(cfg, model, names, world), world)
            options = {"bucket_cap_mb": cfg.bucket_mb}
            if size == 1:
                return ParallelModel(model, world, options)
            wire = {WireDtype.fp32: torch.float32, WireDtype.bf16: torch.bfloat16}[cfg.wire_dtype]
            return ParallelModel(model, world, options, names, Group.of(world, size, wire))
    raise TypeError(f"no parallelism for {type(cfg).__name__}")


def check_parallel(cfg: ParallelConfig, model: nn.Module, world: World) -> None:
    """Raises ConfigError where build_parallel would. No rank waits for another."""
    match cfg:
        case DDPConfig():
            bucket_size(cfg, world)
            if cfg.hook is Hook.post_local_sgd and world.world_size > 1:
                local_group(cfg, world)
        case HybridConfig():
            names = find_layers(model, cfg.split)
            if cfg.group_size != AUTO:
                group_size(cfg, model, names, world)


class ParallelModel(nn.Module):
    """A model that learns as one over all ranks.

    options: DDP's. names: of the layers that are split over `group`; all others are replicated. `parts` says which
    slice of which parameter this rank holds. In a forward pass all members of a group take part, each with its images.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        options: dict[str, Any],
        names: list[str] | None = None,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        self._world, self._group = world, group
        self.parts: dict[str, Part] = {}
        self._dropouts: list[nn.Module] = []
        self._split: set[nn.Parameter] = set()
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self._pending: list[Callable[[], object]] = []
        if group is not None:
            self._skeleton = copy.deepcopy(model).to("meta")
            self.parts, self._dropouts = split_layers(model, names, group)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model, list(self.parts)
            )
            self._split = {model.get_parameter(name) for name in self.parts}
            for parameter in self._split if group.copies else ():
                parameter.register_post_accumulate_grad_hook(self._add_up)
        ids = [world.device.index] if world.device.type == "cuda" else None
        self.hook: PowerSGD | LocalSGD | None = None
        options = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True, **options}
        self.ddp = DistributedDataParallel(model, ids, **options)

    def on_wait(self, waiting: Callable[[], AbstractContextManager]) -> None:
        """Enter waiting() where a forward pass waits for other ranks, as it does where layers are split."""
        if self._group is not None:
            self._group.waiting = waiting

    @property
    def model(self) -> nn.Module:
        """The network itself, with this rank's part of what is split."""
        return self.ddp.module

    @property
    def is_split(self) -> bool:
        return self._group is not None

    @property
    def num_parameters(self) -> int:
        """Of the whole network."""
        parameters = self.model.named_parameters()
        return sum(
            (self.parts[name].shape if name in self.parts else p.shape).numel()
            for name, p in parameters
        )

    def forward(self, images: Tensor, slots: int) -> Tensor:
        """Collective where layers are split. images: [n, 3, size, size] -> logits [n, classes].

        slots: the largest n of the ranks in this pass, the same on all.
        """
        if self._group is None:
            return self.ddp(images)
        self._group.count, self._group.slots = len(images), slots
        if self._dropouts:
            self._gather_keys(len(images))
        return self.ddp(images)

    def nothing_to_learn(self, image: Tensor, slots: int = 1) -> Tensor:
        """A loss whose gradient is zero: what a rank without images contributes. Statistics and dropout stay untouched.

        image: float [1, 3, size, size], of zeros.
        """
        self.ddp.eval()
        for dropout in self._dropouts:
            dropout.train()  # the other ranks' images pass here
            dropout.keys = None
        loss = self(image, slots).float().sum() * 0.0
        self.ddp.train()
        return loss

    def warm_up_buckets(self, image: Tensor) -> None:
        """Collective. One backward pass without effect, before the first step of a process.

        DDP lays out its buckets anew at the forward pass that follows its first backward pass, and a sum over three or
        more ranks depends on the layout. A run that is resumed has to add in the order in which the undisturbed run
        does.
        """
        self.nothing_to_learn(image).backward()
        self.finish_backward()
        self.zero_grad(set_to_none=True)

    def no_sync(self) -> AbstractContextManager[None]:
        """Around the micro-batches of a step but the last: gradients stay this rank's."""
        return self.ddp.no_sync()

    def finish_backward(self) -> None:
        """Collective. After the backward pass that synchronises: waits for what DDP does not wait for."""
        for wait in self._pending:
            wait()
        self._pending.clear()

    def agree_on_infinities(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
    ) -> None:
        """Collective. After unscale_(): an infinity in a part of a gradient is known to who holds the other parts, and
        under local SGD one in a rank's own gradient to all.
        """
        if (self._group is not None or self._is_apart) and scaler.is_enabled():
            for found in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)

    def global_norms(self, norms: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """Collective. norms: [..., n], of what this rank holds of n parameters or their gradients -> of all of them.

        Under local SGD, the root mean square over the ranks: no rank decides by its own gradient alone.
        """
        if self._is_apart:
            squares = norms.square()
            dist.all_reduce(squares)
            return (squares / self._world.world_size).sqrt()
        which = tuple(p in self._split for p in parameters)
        if not any(which):
            return norms
        if which not in self._masks:  # on the device, once: a step waits for no copy
            self._masks[which] = torch.tensor(which, device=norms.device)
        mask = self._masks[which]
        squares = norms.square() * mask
        dist.all_reduce(
            squares
        )  # over all groups, which have the same: no rank differs from another by a rounding
        squares /= self._group.world_size // self._group.size
        return torch.where(mask, squares.sqrt(), norms)

    def canonical(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | SplitTensor]:
        """Tensors by name, as "weight's name" or "moment/weight's name", marked where they are parts."""
        return {
            name: SplitTensor(t, part) if (part := self._part(name, t)) else t
            for name, t in tensors.items()
        }

    def local(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: whole tensors by name -> what this rank holds of them."""
        return {
            name: part.of(t) if (part := self._part(name, t)) else t for name, t in tensors.items()
        }

    def whole_model(self) -> nn.Module:
        """Collective. The network with whole layers, for an evaluation. It shares what is not split."""
        if self._group is None:
            return self.model
        state = self.model.state_dict()
        state |= {name: part.whole(state[name]) for name, part in self.parts.items()}
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict(state, assign=True)
        return model

    @property
    def _is_apart(self) -> bool:
        return isinstance(self.hook, LocalSGD) and self.hook.is_apart

    def _part(self, name: str, tensor: Tensor) -> Part | None:
        return (
            self.parts.get(name.rpartition("/")[2]) if tensor.dim() else None
        )  # AdamW's count of steps is a scalar

    def _gather_keys(self, count: int) -> None:
        """The dropouts between split layers see the images of all ranks. Their keys travel while the others compute."""
        keys, group = self._dropouts[0].keys, self._group
        if keys is None:
            keys = torch.zeros(count, dtype=torch.int32, device=self._world.device)
        arrive = _Once(group.start_gather(group.padded(keys)))
        for dropout in self._dropouts:
            dropout.keys = arrive

    def _add_up(self, parameter: Tensor) -> None:
        """The copies of this part, in other groups, have seen other images."""
        if self.ddp.require_backward_grad_sync:
            work = dist.all_reduce(parameter.grad, group=self._group.copies, async_op=True)
            self._pending.append(work.wait)


class _Once:
    """Waits at the first call, and remembers."""

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait, self._found = wait, None

    def __call__(self) -> Tensor:
        if self._found is None:
            self._found = self._wait().flatten()
        return self._found
