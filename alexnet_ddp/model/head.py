"""The head (classifier layer) of a network: finds it, and matches its rows to classes by name."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.printing import listed

_MUCH_LARGER = 2.0  # times the standard deviation of nn.Linear


def find_head(model: nn.Module) -> str:
    """The name of the layer that returns the logits: the last linear layer or convolution.

    This holds for every torchvision classifier; auxiliary classifiers precede the head. Raises
    ConfigError if the network has no such layer.
    """
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    if not layers:
        rule = "has no linear layer and no convolution, so its head is not known"
        remedy = "end the network with nn.Linear, or leave finetune and model.head as they are"
        raise ConfigError(f"{type(model).__name__} {rule}; {remedy}")
    return layers[-1]


def head_parameters(model: nn.Module) -> list[str]:
    """The names of the weight and bias of the head; their rows are the classes."""
    name = find_head(model)
    own = model.get_submodule(name).named_parameters(recurse=False)
    return [f"{name}.{parameter}" if name else parameter for parameter, _ in own]


def initial_head(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the head of an initialised network, for classes that its weights lack.

    EfficientNet and MNASNet initialise a head of few classes ten times larger than nn.Linear does.
    Its random logits would dominate a short fine-tuning, so a weight that is much larger is scaled
    to the standard deviation of nn.Linear, 1 / sqrt(3 * inputs).
    """
    found = {}
    for name in head_parameters(model):
        tensor = model.get_parameter(name).detach()
        if tensor.dim() > 1:
            usual, own = (3 * tensor[0].numel()) ** -0.5, float(tensor.std())
            if own > _MUCH_LARGER * usual:
                tensor = tensor * (usual / own)
        found[name] = tensor
    return found


@dataclass(frozen=True)
class ClassChange:
    """Class folder names in the order of the head's rows: `then` in a file, `now` in the data."""

    then: list[str]
    now: list[str]

    @property
    def kept(self) -> list[str]:
        return [name for name in self.now if name in set(self.then)]

    @property
    def dropped(self) -> list[str]:
        return [name for name in self.then if name not in set(self.now)]

    @property
    def new(self) -> list[str]:
        return [name for name in self.now if name not in set(self.then)]

    @property
    def is_reorder(self) -> bool:
        return set(self.then) == set(self.now)

    def __str__(self) -> str:
        if self.is_reorder:
            return f"the same {len(self.now)} classes in another order"
        parts = (("kept", self.kept), ("dropped", self.dropped), ("new", self.new))
        return ", ".join(f"{len(names)} {what}{_listed(names)}" for what, names in parts)

    def move(self, rows: Tensor, fresh: Tensor) -> Tensor:
        """Reorder `rows`, [len(then), ...], for the classes `now`: returns [len(now), ...].

        New classes get their rows of `fresh`, [len(now), ...].
        """
        old_row = {name: k for k, name in enumerate(self.then)}
        kept = [k for k, name in enumerate(self.now) if name in old_row]
        moved = fresh.to(rows).clone()
        moved[torch.tensor(kept, dtype=torch.long)] = rows[[old_row[self.now[k]] for k in kept]]
        return moved


def _listed(names: list[str]) -> str:
    return f" ({listed(names)})" if names else ""


def follow_classes(
    tensors: dict[str, Tensor], change: ClassChange, fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return `tensors` with the rows of the head reordered for the classes change.now.

    tensors: by parameter name, or by "moment/name" for the optimizer.
    fresh: the initialised parameters of the head, for new classes; their moments are zero.
    """
    moved = {}
    for name, tensor in tensors.items():
        moment, _, parameter = name.rpartition("/")
        start = fresh.get(parameter)
        # A head of another network has other columns. It is kept, and loading it reports the error.
        if (
            start is not None
            and tensor.dim()
            and tensor.shape == (len(change.then), *start.shape[1:])
        ):
            tensor = change.move(tensor, torch.zeros_like(start) if moment else start)
        moved[name] = tensor
    return moved
