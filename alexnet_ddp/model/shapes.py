"""A forward pass that computes shapes only."""

from typing import Any

import torch
from torch import nn


def run_on_meta(model: nn.Module, image_size: int) -> Any:
    """Pass one image of image_size pixels through `model` in evaluation mode, on the meta device.

    Returns the network's output, without values. All modules of `model` must have the same mode.
    """
    was_training = model.training
    with torch.no_grad():
        output = torch.func.functional_call(
            model.eval(),
            {n: torch.empty_like(t, device="meta") for n, t in model.state_dict().items()},
            torch.empty(1, 3, image_size, image_size, device="meta"),
        )
    model.train(was_training)
    return output
