"""The parts of a checkpoint of a network with adapters.

model.safetensors and ema.safetensors hold plain networks with merged weights, by torchvision's
names, as in every run. What training resumes from is in adapters.safetensors (the adapters, and the
weights that they are added to) and ema_adapters.safetensors (the averages of the adapters).
"""

from torch import Tensor, nn

from alexnet_ddp.model import Adapters, load_checkpoint
from alexnet_ddp.training.ema import EMA


class MergedModel:
    """The network with merged weights, by the names of the plain network.

    source: for messages. After load_state_dict(), adapters that are not loaded too start from the
    merged weights.
    """

    def __init__(self, model: nn.Module, adapters: Adapters, source: str) -> None:
        self._model, self._adapters, self._source = model, adapters, source

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors of the plain network."""
        return self._adapters.merged_state()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the tensors of the plain network. Raises ConfigError if they do not fit."""
        load_checkpoint(self._model, self._adapters.with_own(state_dict), self._source)


class MergedEMA:
    """The averaged network with merged weights, by the names of the plain network."""

    def __init__(self, ema: EMA, adapters: Adapters) -> None:
        self._ema, self._adapters = ema, adapters

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors of the plain network."""
        with self._ema.in_place():
            return self._adapters.merged_state()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the averages of the head. Adapters and frozen weights start as the weights.

        The names of adapted layers are not those of the plain network, so merged weights are not
        taken for averages.
        """
        self._ema.load_state_dict(state_dict)


class AdapterAverages:
    """The averages of the adapters. To be loaded after MergedEMA."""

    def __init__(self, ema: EMA, adapters: Adapters) -> None:
        self._ema, self._adapters = ema, adapters

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the names of the adapters."""
        return {name: self._ema.averages[name] for name in self._adapters.names}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the averages. One that is missing stays."""
        for name, average in state_dict.items():
            self._ema.averages[name].copy_(average)
