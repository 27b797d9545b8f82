"""Which layers of a network are split, over how many ranks, and their replacement by split ones."""

from torch import nn

from alexnet_ddp.config import HybridConfig
from alexnet_ddp.parallel.group import Group, Part, require_divisor
from alexnet_ddp.parallel.split import ColumnLinear, RowLinear
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import ConfigError

_SHARE = 0.5  # of all parameters: below, their gradients are not what a step sends most
# Between two split layers, and no others: they treat each unit alone, so a rank needs no more than its part of them.
_ELEMENTWISE = {
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "GELU",
    "SiLU",
    "Tanh",
    "Hardswish",
    "Identity",
    "KeyedDropout",
}


def find_layers(model: nn.Module, names: list[str] | None) -> list[str]:
    """Names of the linear layers to split, in their order: two or more that follow each other in one nn.Sequential.

    names: the user's choice; None: worth_splitting(). Raises ConfigError.
    """
    chains = _all_chains(model)
    if names is not None:
        if (
            not any(
                names == chain[k : k + len(names)] for chain in chains for k in range(len(chain))
            )
            or len(names) < 2
        ):
            known = "; ".join(", ".join(chain) for chain in chains) or "none in this network"
            rule = "must be two or more linear layers that follow each other, with nothing but activations between them"
            raise ConfigError(f"parallel.split ({', '.join(names)}) {rule}; these do: {known}")
        return names
    found = worth_splitting(model)
    if not found:
        linear = [
            p.numel() for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()
        ]
        here = f"no chain of linear layers, the largest has {max(linear, default=0) / 1e6:.1f} M"
        if chains:
            here = f"{_count(model, chains[-1]) / 1e6:.1f} M"
        rule = f"pays where linear layers that follow each other hold at least half of the parameters; here: {here}"
        why = "of which the gradients cost less than gathering activations would"
        total = sum(p.numel() for p in model.parameters())
        raise ConfigError(f"parallel=hybrid {rule} of {total / 1e6:.1f} M, {why}; use parallel=ddp")
    return found


def worth_splitting(model: nn.Module) -> list[str]:
    """All linear layers of the last nn.Sequential that has at least two, one behind the other, if they hold at least
    half of the network's parameters; else none.
    """
    chains = _all_chains(model)
    total = sum(p.numel() for p in model.parameters())
    return chains[-1] if chains and _count(model, chains[-1]) >= _SHARE * total else []


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
    """The runs of at least two linear layers, with nothing but elementwise modules between them."""
    chains: list[list[str]] = [[]]
    for name, module in sequential.named_children():
        if isinstance(module, nn.Linear):
            chains[-1].append(f"{prefix}.{name}" if prefix else name)
        elif type(module).__name__ not in _ELEMENTWISE or getattr(module, "whole_image", False):
            chains.append([])
    return [chain for chain in chains if len(chain) > 1]


def group_size(cfg: HybridConfig, model: nn.Module, names: list[str], world: World) -> int:
    """Ranks that share one set of the split layers. Raises ConfigError. Rank 0 decides: nodes may differ."""
    inside_nodes = world.device.type == "cuda" and world.world_size % world.local_world_size == 0
    size = cfg.group_size or (world.local_world_size if inside_nodes else world.world_size)
    require_divisor("parallel.group_size", size, world)
    first, *others = (model.get_submodule(name) for name in names)
    units = min(first.out_features, *(layer.in_features for layer in others))
    if size > units:
        rule = (
            f"must be at most {units}, the fewest units of a split layer, for each rank to have one"
        )
        raise ConfigError(
            f"parallel.group_size ({size}) {rule}; use a divisor of {world.world_size}, or parallel=ddp"
        )
    return size


def split_layers(
    model: nn.Module, names: list[str], group: Group
) -> tuple[dict[str, Part], list[nn.Module]]:
    """Replace the layers by this rank's parts of them. The parts by parameter name, and the dropouts between them."""
    parts, dropouts = {}, []
    prefix, _, first = names[0].rpartition(".")
    sequential = model.get_submodule(prefix)
    children = list(sequential.named_children())
    inside = False
    for name, module in children:
        full = f"{prefix}.{name}" if prefix else name
        if full in names:
            is_last = full == names[-1]
            new = (
                ColumnLinear(module, group) if name == first else RowLinear(module, group, is_last)
            )
            setattr(sequential, name, new)
            parts |= {f"{full}.{key}": part for key, part in new.parts.items()}
            units = Part(0, module.weight.shape, group)  # this layer's outputs
            inside = not is_last
        elif inside and type(module).__name__ == "KeyedDropout":
            module.first_unit = units.start()
            dropouts.append(module)
    return parts, dropouts
