"""Hybrid parallelism: a group of ranks shards the large linear layers, DDP replicates the rest.

Sharded layers exchange activations (sharded_linear.py) instead of gradients. This sends fewer bytes
if the layers are large and the global batch is not.

torch's DTensor and its tensor-parallel API are not used, for two reasons:

- Uneven sizes: here shards may differ in size by one unit, and ranks may have different numbers of
  images (none, in the last batch of an epoch). DTensor pads uneven shards.
- Keyed dropout: masks are a function of (seed, step, image, unit). A dropout between sharded layers
  needs the keys of all ranks' images and the index of the shard's first unit (model/dropout.py), so
  that the masks equal those of plain DDP. DTensor's random operators use generator state.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import DDPConfig, HybridConfig
from alexnet_ddp.parallel.ddp import DDPModel
from alexnet_ddp.parallel.group import Group, Shard, ShardedTensor, require_divisor
from alexnet_ddp.parallel.modes import evaluation_mode
from alexnet_ddp.parallel.sharded_linear import ColumnLinear, RowLinear
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import ConfigError

# Below this share of all parameters, the layers' gradients are not most of what a step sends.
_MIN_SHARE = 0.5
# The only modules allowed between two sharded layers: they treat each unit on its own, so a rank
# needs only its shard of the units.
_ELEMENTWISE = {
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "GELU",
    "SiLU",
    "Tanh",
    "Hardswish",
    "Identity",
}


@runtime_checkable
class _KeyedDropout(Protocol):
    """The attributes of model/dropout.py's KeyedDropout that a hybrid uses."""

    keys: Tensor | Callable[[], Tensor] | None
    first_unit: int
    whole_image: bool

    def train(self) -> object: ...


class HybridModel(DDPModel):
    """A network whose linear layers `names` are sharded over `group`; the rest is replicated.

    `shards` maps the names of sharded parameters to their shards. All members of a group take part
    in each forward pass, each with its own images. Implements ParallelModel (interface.py).
    """

    def __init__(
        self, model: nn.Module, world: World, cfg: DDPConfig, names: list[str], group: Group
    ) -> None:
        """Collective. Replaces the layers in `model`. cfg: DDP's options for the other layers."""
        skeleton = copy.deepcopy(model).to("meta")
        shards, dropouts = shard_layers(model, names, group)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(shards))
        super().__init__(model, world, cfg)
        self._group = group
        self._skeleton = skeleton
        self.shards = shards
        self._dropouts = dropouts
        self._sharded = {model.get_parameter(name) for name in shards}
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self._pending: list[Callable[[], object]] = []
        for parameter in self._sharded if group.copies else ():
            parameter.register_post_accumulate_grad_hook(self._start_all_reduce)

    @property
    def is_split(self) -> bool:
        return True

    @property
    def num_parameters(self) -> int:
        return sum(
            (self.shards[name].shape if name in self.shards else p.shape).numel()
            for name, p in self.model.named_parameters()
        )

    def forward(self, images: Tensor, max_images: int) -> Tensor:
        self._group.num_images = len(images)
        self._group.max_images = max_images
        if self._dropouts:
            self._gather_keys(len(images))
        return self.ddp(images)

    def on_wait(
        self,
        waiting: Callable[[], AbstractContextManager],
        exchange: Callable[[], AbstractContextManager],
    ) -> None:
        super().on_wait(waiting, exchange)
        self._group.wait_context, self._group.exchange_context = waiting, exchange

    def zero_loss(self, image: Tensor, max_images: int = 1) -> Tensor:
        with evaluation_mode(self.model):
            for dropout in self._dropouts:
                dropout.train()  # it drops units of the other ranks' images
                dropout.keys = None
            return self(image, max_images).float().sum() * 0.0

    def finish_backward(self) -> None:
        """Collective. Wait for the all-reduce of the sharded gradients, which DDP ignores."""
        for wait in self._pending:
            wait()
        self._pending.clear()

    def global_norms(self, norms: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        is_sharded = tuple(p in self._sharded for p in parameters)
        if not any(is_sharded):
            return norms
        if is_sharded not in self._masks:  # kept on the device, so that no step waits for a copy
            self._masks[is_sharded] = torch.tensor(is_sharded, device=norms.device)
        mask = self._masks[is_sharded]
        squares = norms.square() * mask
        # Over the whole world, not the group: then the result is bit-equal on all ranks. All groups
        # have the same shards, so the sum is divided by the number of groups.
        with self._exchange():
            dist.all_reduce(squares)
        squares /= self._group.world_size // self._group.size
        return torch.where(mask, squares.sqrt(), norms)

    def sharded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | ShardedTensor]:
        return {
            name: ShardedTensor(t, shard) if (shard := self._shard(name, t)) else t
            for name, t in tensors.items()
        }

    def local(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: shard.of(t) if (shard := self._shard(name, t)) else t
            for name, t in tensors.items()
        }

    def full_model(self) -> nn.Module:
        state = self.model.state_dict()
        state |= {name: shard.full_tensor(state[name]) for name, shard in self.shards.items()}
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict(state, assign=True)
        return model

    @property
    def _gradients_differ(self) -> bool:
        return True  # an infinity may be in one rank's shard only

    def _shard(self, name: str, tensor: Tensor) -> Shard | None:
        """The shard of a parameter or its moment; None for scalars such as AdamW's step."""
        return self.shards.get(name.rpartition("/")[2]) if tensor.dim() else None

    def _gather_keys(self, num_images: int) -> None:
        """Start gathering the dropout keys of all ranks' images; dropouts wait for the result."""
        keys = cast(Tensor | None, self._dropouts[0].keys)  # set_dropout_keys() sets no function
        if keys is None:
            keys = torch.zeros(num_images, dtype=torch.int32, device=self._world.device)
        gathered = _Lazy(self._group.start_all_gather(self._group.pad(keys)))
        for dropout in self._dropouts:
            dropout.keys = gathered

    def _start_all_reduce(self, parameter: Tensor) -> None:
        """Sum a shard's gradient over the groups, each of which has other images."""
        if self.ddp.require_backward_grad_sync:
            assert parameter.grad is not None  # this is called after it was accumulated
            work = dist.all_reduce(parameter.grad, group=self._group.copies, async_op=True)
            assert work is not None  # because of async_op
            self._pending.append(work.wait)


class _Lazy:
    """A tensor that is waited for at the first call and cached for later ones."""

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait = wait
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._result is None:
            self._result = self._wait().flatten()
        return self._result


def find_layers(model: nn.Module, names: list[str] | None) -> list[str]:
    """The names of the linear layers to shard: two or more consecutive ones of one nn.Sequential.

    names: the user's choice; None: worth_splitting(). Raises ConfigError.
    """
    if names is not None:
        _check_names(model, names)
        return names
    found = worth_splitting(model)
    if not found:
        raise ConfigError(
            "parallel=hybrid needs consecutive linear layers with at least half of the parameters; "
            f"{_largest(model)}. Their gradients cost less than gathering activations would; "
            "use parallel=ddp"
        )
    return found


def worth_splitting(model: nn.Module) -> list[str]:
    """All linear layers of the last chain, if they have at least half of the parameters.

    A chain: two or more linear layers of one nn.Sequential, with only elementwise modules between
    them. Returns an empty list if sharding does not pay.
    """
    chains = _all_chains(model)
    total = sum(p.numel() for p in model.parameters())
    return chains[-1] if chains and _count(model, chains[-1]) >= _MIN_SHARE * total else []


def group_size(cfg: HybridConfig, model: nn.Module, names: list[str], world: World) -> int:
    """The number of ranks that share the sharded layers `names`. Raises ConfigError.

    Let rank 0 decide, since the number of ranks per node may differ between nodes.
    """
    inside_nodes = world.device.type == "cuda" and world.world_size % world.local_world_size == 0
    size = cfg.group_size or (world.local_world_size if inside_nodes else world.world_size)
    require_divisor("parallel.group_size", size, world)
    layers = [model.get_submodule(name) for name in names]
    first, *others = [layer for layer in layers if isinstance(layer, nn.Linear)]  # all are
    units = min(first.out_features, *(layer.in_features for layer in others))
    if size > units:
        raise ConfigError(
            f"parallel.group_size ({size}) must be at most {units}, the smallest number of units "
            "in a sharded layer, so that each rank has one; "
            f"use a divisor of {world.world_size}, or parallel=ddp"
        )
    return size


def shard_layers(
    model: nn.Module, names: list[str], group: Group
) -> tuple[dict[str, Shard], list[_KeyedDropout]]:
    """Replace the layers `names` of `model` by sharded ones.

    Returns the shards by parameter name, and the dropouts between the sharded layers.
    """
    shards: dict[str, Shard] = {}
    dropouts: list[_KeyedDropout] = []
    prefix, _, first = names[0].rpartition(".")
    sequential = model.get_submodule(prefix)
    inside, first_unit = False, 0
    for name, module in list(sequential.named_children()):
        full_name = f"{prefix}.{name}" if prefix else name
        if full_name in names:
            assert isinstance(module, nn.Linear)  # find_layers() returns no others
            is_last = full_name == names[-1]
            new = (
                ColumnLinear(module, group) if name == first else RowLinear(module, group, is_last)
            )
            setattr(sequential, name, new)
            shards |= {f"{full_name}.{key}": shard for key, shard in new.shards.items()}
            first_unit = Shard(0, module.weight.shape, group).start()  # of this rank's outputs
            inside = not is_last
        elif inside and isinstance(module, _KeyedDropout):
            module.first_unit = first_unit
            dropouts.append(module)
    return shards, dropouts


def _check_names(model: nn.Module, names: list[str]) -> None:
    """Raise ConfigError if `names` are not two or more consecutive layers of a chain."""
    chains = _all_chains(model)
    is_run = any(names == chain[k : k + len(names)] for chain in chains for k in range(len(chain)))
    if not is_run or len(names) < 2:
        known = "; ".join(", ".join(chain) for chain in chains) or "none in this network"
        raise ConfigError(
            f"parallel.split ({', '.join(names)}) must be two or more consecutive linear layers "
            f"with only activations between them; possible: {known}"
        )


def _largest(model: nn.Module) -> str:
    """What this network has instead of a chain with half of the parameters, for a message."""
    chains = _all_chains(model)
    total = sum(p.numel() for p in model.parameters()) / 1e6
    if chains:
        return f"this network's have {_count(model, chains[-1]) / 1e6:.1f} M of {total:.1f} M"
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    most = max((p.numel() for m in linear for p in m.parameters()), default=0) / 1e6
    return f"this network's largest linear layer has {most:.1f} M of {total:.1f} M"


def _count(model: nn.Module, names: list[str]) -> int:
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def _all_chains(model: nn.Module) -> list[list[str]]:
    return [
        chain
        for name, m in model.named_modules()
        if isinstance(m, nn.Sequential)
        for chain in _chains(name, m)
    ]


def _chains(prefix: str, sequential: nn.Sequential) -> list[list[str]]:
    """The chains of one nn.Sequential: two or more linear layers, only elementwise ones between."""
    chains: list[list[str]] = [[]]
    for name, module in sequential.named_children():
        if isinstance(module, nn.Linear):
            chains[-1].append(f"{prefix}.{name}" if prefix else name)
        elif not _is_elementwise(module):
            chains.append([])
    return [chain for chain in chains if len(chain) > 1]


def _is_elementwise(module: nn.Module) -> bool:
    """Whether `module` treats each unit on its own."""
    if isinstance(module, _KeyedDropout):
        return not module.whole_image
    return type(module).__name__ in _ELEMENTWISE
