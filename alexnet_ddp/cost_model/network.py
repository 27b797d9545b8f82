"""The costs of a network, layer by layer: parameters, FLOPs, activations.

They are read from shapes on the meta device, so nothing is computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_ddp.parallel import worth_splitting


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, and its FLOPs for one image."""

    name: str
    parameters: int
    flops: float  # forward; a multiply-add is two FLOPs
    backward_flops: float  # 2 * flops; 1 * flops for the first layer: no gradient for its input
    inputs: int  # floats per image
    outputs: int


@dataclass(frozen=True)
class Network:
    """The layers of a network. Per image: `saved` floats are kept for the backward pass."""

    layers: tuple[Layer, ...]  # in the order of the forward pass
    split: tuple[Layer, ...]  # those that a hybrid splits; empty if that does not pay
    saved: int

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def train_flops(self) -> float:
        """FLOPs of training on one image, forward and backward."""
        return sum(layer.flops + layer.backward_flops for layer in self.layers)

    @property
    def split_parameters(self) -> int:
        return sum(layer.parameters for layer in self.split)

    @property
    def exchanged(self) -> int:
        """Floats per image that a hybrid exchanges forward, and again backward (AlexNet: 14,312).

        These are the first split layer's inputs and the later ones' outputs.
        """
        return sum(layer.outputs for layer in self.split[1:]) + (
            self.split[0].inputs if self.split else 0
        )

    @property
    def crossover(self) -> float | None:
        """The global batch above which DDP sends fewer bytes than a hybrid over all ranks.

        It solves 2 (K-1) b exchanged = 2 (K-1) / K * split_parameters for the global batch K b.
        AlexNet: 4,096 images. None if no layer is split.
        """
        return self.split_parameters / self.exchanged if self.split else None


def read_network(model: nn.Module, image_size: int, split: list[str] | None = None) -> Network:
    """Read the costs of `model` for images of `image_size` pixels. `model` is not changed.

    split: the names of the layers that a hybrid splits, in the order of the forward pass; None:
    worth_splitting().
    """
    calls: dict[str, tuple[nn.Module, int, int]] = {}
    names = {
        module: name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(False))
    }

    def note(module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        calls[names[module]] = (module, inputs[0].numel(), first.numel())

    hooks = [module.register_forward_hook(note) for module in names]
    was_training, saved = model.training, _Saved()
    meta = {name: torch.empty_like(t, device="meta") for name, t in model.state_dict().items()}
    for name, _ in model.named_parameters():
        meta[name].requires_grad_()
    counter = FlopCounterMode(display=False)
    try:
        image = torch.empty(1, 3, image_size, image_size, device="meta")
        with counter, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
            torch.func.functional_call(model.eval(), meta, image)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    counts = {
        name.partition(".")[2]: sum(c.values()) for name, c in counter.get_flop_counts().items()
    }
    layers: list[Layer] = []
    for name, (module, inputs, outputs) in calls.items():
        leaf = not any(True for _ in module.children())
        flops = counts.get(name, 0) if leaf else 0
        own = sum(p.numel() for p in module.parameters(recurse=False))
        backward = 2 * flops if layers else flops
        layers.append(Layer(name, own, flops, backward, inputs, outputs))
    rest = sum(p.numel() for p in model.parameters()) - sum(layer.parameters for layer in layers)
    other_flops = counter.get_total_flops() - sum(layer.flops for layer in layers)
    # Costs outside any module's own forward pass, such as attention. First in the list, so that
    # their gradients are assumed to be ready last.
    if rest or other_flops:
        layers.insert(0, Layer("others", rest, other_flops, 2 * other_flops, 0, 0))
    wanted = worth_splitting(model) if split is None else split
    chosen = tuple(layer for layer in layers if layer.name in wanted)
    return Network(
        tuple(layers), chosen, saved.floats - sum(t.numel() for t in meta.values() if saved.has(t))
    )


class _Saved:
    """Counts the distinct storages that autograd keeps."""

    def __init__(self) -> None:
        # The tensors stay alive, or another storage could get the same address.
        self._kept: dict[int, Tensor] = {}

    def pack(self, x: Tensor) -> Tensor:
        self._kept[x.untyped_storage()._cdata] = x
        return x

    def has(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._kept

    @property
    def floats(self) -> int:
        return sum(x.untyped_storage().nbytes() // 4 for x in self._kept.values())
