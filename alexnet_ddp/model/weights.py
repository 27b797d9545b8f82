"""Weight files from elsewhere. No code in them ever runs."""

import logging
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from alexnet_ddp.config import ConfigError

log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path, new_head: bool = True) -> None:
    """Load a .safetensors or torch file by name. Raises ConfigError where names or shapes differ.

    new_head: where only the number of classes differs, leave the last layer as initialised, with a warning.
    """
    weights = read_weights(path)
    own = model.state_dict()
    head = [name for name, _ in model.named_parameters()][-2:]
    changed = [n for n in head if n in weights and weights[n].shape != own[n].shape]
    if changed and new_head:
        classes = f"{len(weights[changed[0]])} classes in the file, {len(own[changed[0]])} in the data"
        log.warning("model.weights: %s: the head (%s) starts afresh", classes, ", ".join(changed))
        weights |= {name: own[name] for name in changed}
    remedy = "give the weights of this network, or the network of these weights"
    fit(model, weights, f"model.weights ({path}) does not fit the model", remedy)


def fit(model: nn.Module, weights: dict[str, Tensor], complaint: str, remedy: str) -> None:
    """Load tensors by name. Raises ConfigError where they are another network's: complaint, difference, remedy."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConfigError(f"{complaint}: {difference}; {remedy}") from error


def load_checkpoint(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load the tensors of a checkpoint, all of them. Raises ConfigError where they are another network's."""
    complaint = f"{origin} holds another network than the configuration"
    fit(model, weights, complaint, "give the model that was trained, or another run.name")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises ConfigError for a file that is missing, damaged, or holds anything but tensors."""
    if not path.is_file():
        raise ConfigError(
            f"model.weights ({path}) is not a file; give a .safetensors or a torch file of tensors by name"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError, AttributeError, TypeError) as error:  # of torch's unpickler, on text
        rule = "it holds more than tensors, or is no torch file; nothing in it was run"
        raise ConfigError(f"model.weights ({path}) is refused: {rule}; save model.state_dict()") from error
    except (safetensors.SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0].split(". ")[0] or "it ends too early"  # without torch's advice
        raise ConfigError(f"model.weights ({path}) cannot be read: {reason}; copy the file again") from error
    by_name = isinstance(weights, dict) and all(
        isinstance(n, str) and isinstance(w, Tensor) for n, w in weights.items()
    )
    if not by_name:
        raise ConfigError(f"model.weights ({path}) holds more than tensors by name; save model.state_dict()")
    return weights
