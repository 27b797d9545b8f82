"""Optimizers, their parameter groups, and their state by parameter name.

To add an optimizer: a class of options in config/recipe.py with @optimizer_choice, and a builder
with @builds here.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from alexnet_ddp.config import (
    AdamWConfig,
    ConfigError,
    LARSConfig,
    LARSVariant,
    OptimizerConfig,
    SGDConfig,
)
from alexnet_ddp.config.plugins import ELEMENTWISE, PluginOptimizerConfig, TorchOptimizerConfig
from alexnet_ddp.config.recipe import OPTIMIZERS, AdamConfig
from alexnet_ddp.plugins import OPTIMIZERS as PLUGINS
from alexnet_ddp.plugins import is_elementwise

State = dict[str, Tensor]
Groups = list[dict[str, Any]]


# Maps local norms, [2, n] of this rank's shards of n weights and gradients, and the n parameters
# to the global norms, [2, n] of the full tensors.
GlobalNorms = Callable[[Tensor, list[nn.Parameter]], Tensor]

_Cfg = TypeVar("_Cfg", bound=OptimizerConfig)
Builder = Callable[[_Cfg, Groups, GlobalNorms], torch.optim.Optimizer]
_BUILDERS: dict[type[OptimizerConfig], Builder[Any]] = {}
_UPDATES_SHARDS: dict[type[OptimizerConfig], Callable[[Any], bool]] = {}


def builds(
    cfg: type[_Cfg], *, updates_shards: Callable[[_Cfg], bool]
) -> Callable[[Builder[_Cfg]], Builder[_Cfg]]:
    """Make a function the builder of optimizers with the options `cfg`.

    It takes the options, the parameter groups and the function that turns a rank's norms into
    global ones. updates_shards: True if the update of an element needs no other element of its
    tensor, except through that function; else parallel=hybrid, which splits tensors, is refused.
    """

    def add(build: Builder[_Cfg]) -> Builder[_Cfg]:
        _BUILDERS[cfg] = build
        _UPDATES_SHARDS[cfg] = updates_shards
        return build

    return add


def build_optimizer(
    cfg: OptimizerConfig,
    model: nn.Module,
    global_norms: GlobalNorms = lambda norms, parameters: norms,
    lr_factors: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of `cfg`, of the parameters that require gradients.

    Its groups contain `lr_factor`, which set_lr multiplies by the step's rate. lr_factors: factors
    of the rate by the name of the parameter; a missing one is 1.

    Raises ConfigError if torch or a plugin refuses the options.
    """
    optimizer = _BUILDERS[type(cfg)](cfg, _groups(cfg, model, lr_factors or {}), global_norms)
    for group in optimizer.param_groups:
        group.setdefault("lr_factor", 1.0)
    reset(optimizer)
    return optimizer


@builds(SGDConfig, updates_shards=lambda cfg: True)
def _sgd(cfg: SGDConfig, groups: Groups, global_norms: GlobalNorms) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, cfg.lr, cfg.momentum, nesterov=cfg.nesterov, fused=True)


@builds(AdamConfig, updates_shards=lambda cfg: True)
def _adam(cfg: AdamConfig, groups: Groups, global_norms: GlobalNorms) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, fused=True)


@builds(AdamWConfig, updates_shards=lambda cfg: True)
def _adamw(cfg: AdamWConfig, groups: Groups, global_norms: GlobalNorms) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, fused=True)


@builds(LARSConfig, updates_shards=lambda cfg: True)
def _lars(cfg: LARSConfig, groups: Groups, global_norms: GlobalNorms) -> torch.optim.Optimizer:
    for group in groups:
        adapts_all = cfg.variant is LARSVariant.all_parameters
        group["adapts"] = adapts_all or group["params"][0].dim() > 1
    return LARS(groups, cfg.lr, cfg.momentum, cfg.eta, global_norms)


@builds(TorchOptimizerConfig, updates_shards=lambda cfg: cfg.name in ELEMENTWISE)
def _torch(
    cfg: TorchOptimizerConfig, groups: Groups, global_norms: GlobalNorms
) -> torch.optim.Optimizer:
    known = {
        name: found
        for name, found in vars(torch.optim).items()
        if isinstance(found, type)
        and issubclass(found, torch.optim.Optimizer)
        and found is not torch.optim.Optimizer
    }
    if cfg.name not in known:
        usable = ", ".join(sorted(known.keys() - {"LBFGS", "SparseAdam"}))
        raise ConfigError(
            f"optimizer.name ({cfg.name}) is no class of torch.optim; there are: {usable}"
        )
    options = inspect.signature(known[cfg.name]).parameters
    decays = any(group["weight_decay"] for group in groups)
    if decays and "weight_decay" not in options:
        rule = f"would be ignored by {cfg.name}; set it to 0"
        raise ConfigError(f"optimizer.weight_decay ({cfg.weight_decay}) {rule}")
    return _built(f"optimizer.name={cfg.name}", known[cfg.name], cfg, groups)


@builds(PluginOptimizerConfig, updates_shards=lambda cfg: is_elementwise(cfg.name))
def _plugin(
    cfg: PluginOptimizerConfig, groups: Groups, global_norms: GlobalNorms
) -> torch.optim.Optimizer:
    optimizer = _built(f"optimizer.name={cfg.name}", PLUGINS.get(cfg.name), cfg, groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        rule = f"the plugin returned {type(optimizer).__name__}"
        raise ConfigError(f"optimizer.name ({cfg.name}): {rule}; return a torch.optim.Optimizer")
    return optimizer


def _built(
    what: str,
    build: Callable[..., torch.optim.Optimizer],
    cfg: TorchOptimizerConfig | PluginOptimizerConfig,
    groups: Groups,
) -> torch.optim.Optimizer:
    try:
        return build(groups, lr=cfg.lr, **cfg.args)
    except (TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{what} with optimizer.args={cfg.args} is refused: {text}") from error


def needs_full_tensors(cfg: OptimizerConfig) -> str | None:
    """Why `cfg` cannot update a shard of a tensor by itself, for a message; None if it can."""
    if _UPDATES_SHARDS[type(cfg)](cfg):
        return None
    if isinstance(cfg, PluginOptimizerConfig):
        return f"optimizer.name={cfg.name} was not registered with elementwise=True"
    choices = [f"optimizer={name}" for name, owner in OPTIMIZERS.items() if owner is type(cfg)]
    which = f"optimizer.name={cfg.name}" if isinstance(cfg, TorchOptimizerConfig) else choices[0]
    return f"{which} computes the update of an element from other elements of its tensor too"


def apply_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: Tensor) -> None:
    """One step, unless `bad`, a number on the device, is not 0: the gradient is not finite.

    Fused optimizers read `bad` on the device, as their found_inf, and the scaler of fp16 finds
    infinities itself. Any other optimizer knows of neither, so this waits for the device.
    """
    if scaler.is_enabled() or reads_found_inf(optimizer) or not bad.item():
        scaler.step(optimizer)


def reads_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """True if the optimizer applies nothing when its `found_inf` on the device is not 0."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))  # torch's own mark


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Clear the state. Fused SGD, Adam, AdamW and LARS get moments of zeros at once.

    A first step that found_inf cancels would leave SGD's uninitialised, and the size of a
    checkpoint is known before there is one. Other optimizers make their state in their first step.
    """
    optimizer.state.clear()
    names = _moments(optimizer)
    for group in optimizer.param_groups if names else ():
        if names == ["momentum_buffer"] and not group["momentum"]:
            continue
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in names}
            if "exp_avg" in names:
                moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter].update(moments)


def _moments(optimizer: torch.optim.Optimizer) -> list[str]:
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    kind = type(optimizer)
    if kind is LARS or (kind is torch.optim.SGD and is_fused):
        return ["momentum_buffer"]
    if kind in (torch.optim.Adam, torch.optim.AdamW) and is_fused:
        amsgrad = any(group["amsgrad"] for group in optimizer.param_groups)
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
    return []


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def _groups(cfg: OptimizerConfig, model: nn.Module, lr_factors: Mapping[str, float]) -> Groups:
    """Weights, and biases with norms: the second may learn at another rate and without decay.

    Each is divided by the factor of the learning rate, the parameters with the highest first.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = cfg.weight_decay if cfg.decay_biases else 0.0
    groups: Groups = []
    for is_matrix in (True, False):
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trained:
            if (parameter.dim() > 1) == is_matrix:
                by_factor.setdefault(lr_factors.get(name, 1.0), []).append(parameter)
        kind_factor = 1.0 if is_matrix else cfg.bias_lr_factor
        groups += [
            {
                "params": by_factor[factor],
                "weight_decay": cfg.weight_decay if is_matrix else decay,
                "lr_factor": factor * kind_factor,
            }
            for factor in sorted(by_factor, reverse=True)
        ]
    return groups


# Python numbers of the state are saved as scalars, under names that begin with their type.
_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> State:
    """The optimizer's state as "momentum_buffer/features.0.weight" -> tensor: no pickle, no
    parameter numbers.

    A Python number is a scalar under "int:count/features.0.weight". Raises ConfigError for a state
    of another kind.
    """
    found: State = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{key}/{name}"] = value
            elif value is not None:
                kind, dtype = _number(optimizer, key, value)
                found[f"{kind}:{key}/{name}"] = torch.tensor(value, dtype=dtype)
    if len(optimizer.state.keys() - set(parameters.values())):
        rule = "keeps state that belongs to no parameter, which cannot be saved"
        raise ConfigError(f"{type(optimizer).__name__} {rule}; keep it in self.state[parameter]")
    return found


def _number(
    optimizer: torch.optim.Optimizer, key: object, value: object
) -> tuple[str, torch.dtype]:
    for kind, (owner, dtype) in _NUMBERS.items():
        if type(value) is owner:
            return kind, dtype
    rule = f"keeps {key} of type {type(value).__name__}, which cannot be saved"
    raise ConfigError(f"{type(optimizer).__name__} {rule}; keep tensors and numbers in its state")


def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: State) -> None:
    """The inverse of state_by_name. Hyperparameters stay those of the configuration."""
    reset(optimizer)
    parameters = dict(model.named_parameters())
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    on_device = all(
        group.get("fused") or group.get("capturable") or isinstance(optimizer, LARS)
        for group in optimizer.param_groups
    )
    for entry, value in state.items():
        key, name = entry.split("/", 1)
        kind, colon, number = key.partition(":")
        parameter = parameters[name]
        if parameter not in trained:  # saved by a run that trained more: resume.allow_changes
            continue
        if colon and kind in _NUMBERS:
            optimizer.state[parameter][number] = _NUMBERS[kind][0](value.item())
        elif value.shape == parameter.shape and value.dim():
            # With the strides of the parameter: fused kernels walk both as flat memory, and files
            # know no channels_last.
            copy = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            optimizer.state[parameter][key] = copy
        else:  # torch keeps the count of steps in host memory, except for fused kernels
            device = "cpu" if key == "step" and not on_device else parameter.device
            optimizer.state[parameter][key] = value.to(device, copy=True)


class OptimizerState:
    """An optimizer's tensors as a part of a checkpoint. See state_by_name."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model

    def state_dict(self) -> State:
        """Return the tensors as "momentum_buffer/features.0.weight" -> tensor."""
        return state_by_name(self._optimizer, self._model)

    def load_state_dict(self, state_dict: State) -> None:
        """Load the tensors. An empty state starts all moments at zero."""
        load_state_by_name(self._optimizer, self._model, state_dict)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: You, Gitman, Ginsburg 2017, algorithm 1.

    rate = eta |w| / (|g| + wd |w|), or 1 if a norm is 0
    v = momentum v + lr rate (g + wd w)
    w = w - v

    The rate is part of v, as in the paper. Libraries that multiply v by the rate give other results
    when the rate changes.

    A group has `weight_decay` and `adapts`: if `adapts` is false, its rate is 1. Like torch's fused
    optimizers it reads `found_inf` on the device and applies nothing if that is not 0; no rank
    waits for the device. step() overwrites the gradients.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets found_inf, and leaves it to us

    def __init__(
        self, groups: list[dict], lr: float, momentum: float, eta: float, global_norms: GlobalNorms
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eta": eta})
        self._global_norms = global_norms  # called once a step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        assert getattr(self, "grad_scale", None) is None, (
            "unscale the gradients first: their norms count here"
        )
        owners = [
            (p, p.grad, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        parameters = [p for p, _, _ in owners]
        here = torch.stack([norms(parameters), norms([grad for _, grad, _ in owners])])
        full = self._global_norms(here, parameters)
        for (parameter, grad, group), w, g in zip(owners, *full.unbind()):
            self._update(parameter, grad, group, w, g)

    def _update(
        self, parameter: nn.Parameter, grad: Tensor, group: dict, w: Tensor, g: Tensor
    ) -> None:
        """w, g: norms of the full weight and gradient, scalars on the device."""
        decay, lr = group["weight_decay"], torch.full_like(w, group["lr"])
        if group["adapts"]:
            lr *= torch.where((w > 0) & (g > 0), group["eta"] * w / (g + decay * w), 1.0)
        if decay:
            grad.add_(parameter, alpha=decay)
        # With a loss scale of 1 / lr and a rate of 1, torch's kernel has lr within v.
        sgd(
            [parameter],
            [grad],
            [self.state[parameter]["momentum_buffer"]],
            fused=True,
            grad_scale=lr.reciprocal().float(),
            found_inf=getattr(self, "found_inf", None),
            lr=1.0,
            momentum=group["momentum"],
            weight_decay=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def norms(tensors: list[Tensor]) -> Tensor:
    """[n].

    Row by row on the CPU: there, in one piece, torch's sum of 38 million fp32 squares is off by 0.4
    %.
    """
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors))
    norm = torch.linalg.vector_norm
    return torch.stack(
        [norm(norm(t.flatten(1), dim=1)) if t.dim() > 1 else norm(t) for t in tensors]
    )
