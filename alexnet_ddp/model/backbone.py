"""The backbone of a network, which is everything but its head: frozen, or trained."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from alexnet_ddp.model.head import find_head, head_parameters


class Backbone:
    """All parameters and modules of `model` but the head's; see head.py.

    A parameter that the network itself excludes from training (requires_grad is false) stays
    excluded.
    """

    def __init__(self, model: nn.Module) -> None:
        head, names = find_head(model), set(head_parameters(model))
        self._modules = [module for name, module in model.named_modules() if name != head]
        self._parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if name not in names and parameter.requires_grad
        ]

    def freeze(self) -> None:
        """Exclude the backbone from training.

        Its parameters get no gradients. Its modules compute as in an evaluation: BatchNorm uses its
        running statistics and keeps them, dropout drops nothing.
        """
        self._set(is_trained=False)

    def unfreeze(self) -> None:
        """Train the backbone again."""
        self._set(is_trained=True)

    def _set(self, is_trained: bool) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(is_trained)
            parameter.grad = None
        for module in self._modules:
            module.training = is_trained


def freeze_batch_norm(model: nn.Module) -> None:
    """Have each BatchNorm use its running statistics and keep them; its parameters are trained."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = False
