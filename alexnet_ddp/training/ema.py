"""An exponential moving average of the weights: what is evaluated and predicts, where trainer.ema_decay is set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """After each applied step, average = decay * average + (1 - decay) * weights; it begins as the weights.

    Parameters are averaged. Buffers (BatchNorm's running statistics, averages already) are the model's own, as they
    are. The averages have the parameters' names and shapes, whatever part of a layer this rank holds.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """applied: a bool on the device; where it is false nothing changes, and nobody waits to know."""
        averages, weights = (
            list(self._average.values()),
            [self._weights[name] for name in self._average],
        )
        share = (1 - self._decay) * applied.to(averages[0].dtype)
        torch._foreach_lerp_(averages, weights, [share] * len(averages))

    def tensors(self) -> dict[str, Tensor]:
        """All that the model's state_dict has, so that a file of them is a file of weights."""
        return self._model.state_dict() | self._average

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of tensors(); without any, the averages begin anew as the weights. Buffers stay the model's."""
        for name, weights in self._weights.items():
            self._average[name].copy_(tensors.get(name, weights))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages for weights; afterwards its own again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._weights.items()}
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            parameter.copy_(values[name])

    @property
    def _weights(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())
