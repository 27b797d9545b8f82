"""An exponential moving average of the weights for evaluation: trainer.ema_decay."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """After each applied step: average = decay * average + (1 - decay) * weights.

    The averages start as the weights. Parameters are averaged; buffers (BatchNorm's running
    statistics, which are averages already) are those of the model. Each average has the name and
    the shape of its parameter, which may be this rank's shard of a layer.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Average once more if `applied`, a bool on the device, is true. No host wait."""
        parameters = self._parameters
        averages = list(self._average.values())
        weights: list[Tensor] = [parameters[name] for name in self._average]
        share = (1 - self._decay) * applied.to(averages[0].dtype)
        torch._foreach_lerp_(averages, weights, [share] * len(averages))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the names of the model's state_dict, so that a file of them is a weights file."""
        return self._model.state_dict() | self._average

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the averages. One that is missing starts as the weight. Buffers are ignored."""
        for name, weights in self._parameters.items():
            self._average[name].copy_(state_dict.get(name, weights))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averages as its weights; restore its own afterwards, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters."""
        return self._average

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())
