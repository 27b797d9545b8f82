"""Low-rank adapters of the layers of a network: LoRA and AdaLoRA, by the library peft.

peft is the extra `peft` of this package.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from alexnet_ddp.config import FinetuneConfig, Method
from alexnet_ddp.model.head import find_head, head_parameters
from alexnet_ddp.model.shapes import run_on_meta
from alexnet_ddp.runtime.errors import ConfigError

log = logging.getLogger(__name__)

ADAPTER = "default"  # the name of the adapters within peft
# A subclass may compute something else with its weight. timm's only pads its input.
_CLASSES = ("Linear", "Conv2d", "Conv2dSame")


class Adapters:
    """Adds adapters to the linear layers and convolutions of `model` before its head, in place.

    LoRA (Hu et al. 2021) trains two factors of a low rank, whose product is added to the frozen
    weight; AdaLoRA (Zhang et al. 2023) three, and the ranks of the layers differ. At first the
    product is zero. Only the adapters and the head get gradients. BatchNorm uses its running
    statistics and keeps them, as if in evaluation mode; dropout stays as it is.

    A layer `name` becomes peft's layer of this name, which has the layer as `base_layer`.

    seed: of the initial values. image_size: pixels of an image that the network accepts.
    Raises ConfigError if peft is missing, or if the network has no layer to adapt.
    """

    def __init__(self, model: nn.Module, cfg: FinetuneConfig, seed: int, image_size: int) -> None:
        self._model = model
        names = adaptable_layers(model, image_size, f"finetune.method={cfg.method.value}")
        head = {name: model.get_parameter(name) for name in head_parameters(model)}
        trained_head = [parameter for parameter in head.values() if parameter.requires_grad]
        before = set(model.state_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft = import_peft(cfg.method)
            peft.inject_adapter_in_model(_peft_config(peft, cfg, names), model, ADAPTER)
        for parameter in trained_head:
            parameter.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.training = False
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        # Names in the adapted network -> names in the plain one, if they differ.
        self._plain = {
            f"{name}.base_layer.{key}": f"{name}.{key}"
            for name, layer in self._layers.items()
            for key in layer.base_layer.state_dict()
        }
        self._own = [name for name in model.state_dict() if name not in before | set(self._plain)]
        self._initial = {name: model.state_dict()[name].clone() for name in self._own}

    @property
    def names(self) -> list[str]:
        """The names of the tensors of the adapters."""
        return self._own

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the adapters, and the weights that they are added to."""
        bases = [f"{name}.base_layer.weight" for name in self._layers]
        state = self._model.state_dict()
        return {name: state[name] for name in (*self._own, *bases)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the tensors of state_dict(). Without any, the adapters start as new.

        Raises ConfigError if the names differ.
        """
        state = self.state_dict()
        if state_dict and state_dict.keys() != state.keys():
            rule = "the adapters of the checkpoint have other names than those of this peft"
            raise ConfigError(f"{rule}; install the version of peft that the run was started with")
        self._model.load_state_dict(state_dict or self._initial, strict=False)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Add the adapters to the weights for a while; afterwards restore them, bit for bit.

        Within, the network computes what a plain network with merged_state() computes.
        """
        layers = self._layers.values()
        kept = [layer.base_layer.weight.detach().clone() for layer in layers]
        with torch.no_grad():
            for layer in layers:
                layer.merge()
        try:
            yield
        finally:
            for layer, weight in zip(layers, kept):  # peft would subtract, which rounds
                layer.base_layer.weight.data.copy_(weight)
                layer.merged_adapters.clear()

    def merged_state(self) -> dict[str, Tensor]:
        """Copies of the network's tensors by the names of the plain network, adapters merged."""
        own = set(self._own)
        with self.merged():
            return {
                self._plain.get(name, name): tensor.detach().clone()
                for name, tensor in self._model.state_dict().items()
                if name not in own
            }

    def with_own(self, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state_dict of the adapted network: tensors of the plain one, and these adapters."""
        names = {there: here for here, there in self._plain.items()}
        state = self._model.state_dict()
        own = {name: state[name] for name in self._own}
        return {names.get(name, name): tensor for name, tensor in plain.items()} | own

    def lr_factors(self, plain: Mapping[str, float]) -> dict[str, float]:
        """Factors of the learning rate by name: an adapter has that of the weight it adds to.

        plain: the factors of the plain network; a missing one is 1.
        """
        layers = {name: name.partition(".lora_")[0] for name in self._own}
        factors = {name: plain.get(f"{layer}.weight", 1.0) for name, layer in layers.items()}
        return {**plain, **factors}


def adaptable_layers(model: nn.Module, image_size: int, option: str) -> list[str]:
    """The names of the layers that get adapters: linear layers and convolutions before the head.

    Logs which ones are left out. Raises ConfigError, which begins with `option`, if none is left.
    """
    head, called = find_head(model), _called_modules(model, image_size)
    names, left_out = [], Counter[str]()
    for name, module in model.named_modules():
        if name == head or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        reason = _why_not(module) or (None if name in called else "that are not called as modules")
        if reason is None:
            names.append(name)
        else:
            left_out[reason] += 1
    listed = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not names:
        rule = "finds no linear layer or convolution before the head that it can adapt"
        remedy = "use finetune.method=head or full"
        raise ConfigError(f"{option} {rule}{f' (layers {listed})' if listed else ''}; {remedy}")
    if listed:
        log.info("%s: %d layers get adapters; without: %s", option, len(names), listed)
    return names


def import_peft(method: Method) -> Any:
    """The module peft. Raises ConfigError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        rule = f"finetune.method={method.value} needs peft"
        raise ConfigError(f"{rule}; pip install 'alexnet-ddp[peft]'") from error
    return peft


def _peft_config(peft: Any, cfg: FinetuneConfig, names: list[str]) -> Any:
    # A text is a regular expression for the whole name; a list would also match other names' ends.
    common = {
        "target_modules": "|".join(map(re.escape, names)),
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0,  # peft's would draw from a generator
    }
    if cfg.method is Method.lora:
        return peft.LoraConfig(r=cfg.lora_rank, **common)
    # The schedule of the ranks is that of training/adalora.py.
    ranks = {"init_r": cfg.initial_rank, "target_r": cfg.lora_rank, "total_step": 1}
    return peft.AdaLoraConfig(**ranks, **common)


def _why_not(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Why `layer` gets no adapter, for "3 ..."; None if it may get one."""
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "with groups"
    if isinstance(layer, nn.Conv2d) and (layer.dilation != (1, 1) or layer.padding_mode != "zeros"):
        return "with dilation or another padding than zeros"
    if type(layer).__name__ not in _CLASSES:
        return f"of the class {type(layer).__name__}"
    return None if layer.weight.requires_grad else "that the network excludes from training"


def _called_modules(model: nn.Module, image_size: int) -> set[str]:
    """The names of the modules that a forward pass calls.

    Some networks, such as Swin, use the weights of a layer without calling it.
    """
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        run_on_meta(model, image_size)
    finally:
        for handle in handles:
            handle.remove()
    return called
