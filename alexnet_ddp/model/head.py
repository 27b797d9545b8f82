"""The classifier layer of a network: which one it is, and rows that follow their classes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SHOWN = 5  # class names in a message


def find_head(model: nn.Module) -> str:
    """Name of the layer that returns the logits: the last linear layer or convolution of every torchvision classifier.

    Auxiliary classifiers stand before it.
    """
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ][-1]


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the head's weight and bias, whose rows are the classes."""
    name = find_head(model)
    own = model.get_submodule(name).named_parameters(recurse=False)
    return [f"{name}.{parameter}" if name else parameter for parameter, _ in own]


@dataclass(frozen=True)
class ClassChange:
    """Classes, by folder name, in the order of a head's rows: `then` in a file, `now` in the data."""

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
        """rows: [then, ...] -> [now, ...], each class with its row; new classes with their rows of `fresh`."""
        places = {name: k for k, name in enumerate(self.then)}
        to = [k for k, name in enumerate(self.now) if name in places]
        moved = fresh.to(rows).clone()
        moved[torch.tensor(to, dtype=torch.long)] = rows[[places[self.now[k]] for k in to]]
        return moved


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})" if names else ""


def follow_classes(
    tensors: dict[str, Tensor], change: ClassChange, fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors by name, or by "moment/name", with the head's rows at the places of their classes now.

    fresh: the head's parameters as initialised; moments of new classes are zero.
    """
    moved = {}
    for name, tensor in tensors.items():
        moment, _, parameter = name.rpartition("/")
        start = fresh.get(parameter)
        # Another network's head has other columns: it stays as it is, and loading it names the difference.
        if (
            start is not None
            and tensor.dim()
            and tensor.shape == (len(change.then), *start.shape[1:])
        ):
            tensor = change.move(tensor, torch.zeros_like(start) if moment else start)
        moved[name] = tensor
    return moved
