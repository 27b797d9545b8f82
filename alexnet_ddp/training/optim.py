"""Optimizers and their parameter groups."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from alexnet_ddp.config import AdamWConfig, LARSConfig, LARSVariant, OptimizerConfig, SGDConfig

State = dict[str, Tensor]


# (norms [2, n] of what this rank holds of n weights and gradients, the n parameters) -> those of the whole tensors.
WholeNorms = Callable[[Tensor, list[nn.Parameter]], Tensor]


def build_optimizer(
    cfg: OptimizerConfig,
    model: nn.Module,
    global_norms: WholeNorms = lambda norms, parameters: norms,
) -> torch.optim.Optimizer:
    """One fused pass over the parameters. Groups carry `lr_factor`; set_lr multiplies it."""
    groups = _groups(cfg, model)
    match cfg:
        case SGDConfig():
            optimizer = torch.optim.SGD(
                groups, cfg.lr, cfg.momentum, nesterov=cfg.nesterov, fused=True
            )
        case AdamWConfig():
            optimizer = torch.optim.AdamW(
                groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, fused=True
            )
        case LARSConfig():
            for group in groups:
                group["adapts"] = (
                    cfg.variant is LARSVariant.all_parameters or group["params"][0].dim() > 1
                )
            optimizer = LARS(groups, cfg.lr, cfg.momentum, cfg.eta, global_norms)
        case _:
            raise TypeError(f"no optimizer for {type(cfg).__name__}")
    reset(optimizer)
    return optimizer


def reset(optimizer: torch.optim.Optimizer) -> None:
    """All moments are zero. They are made here, as the first step would make them: one that found_inf cancels would
    leave SGD's uninitialised, and what a checkpoint holds is known before there is one.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        names = (
            ["momentum_buffer"]
            if group.get("momentum")
            else ["exp_avg", "exp_avg_sq"]
            if "betas" in group
            else []
        )
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in names}
            if "betas" in group:
                moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter].update(moments)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def _groups(cfg: OptimizerConfig, model: nn.Module) -> list[dict]:
    """Weights, and biases with norms: the second may learn at another rate and without decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    decay = cfg.weight_decay if cfg.decay_biases else 0.0
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay, "lr_factor": 1.0},
        {"params": vectors, "weight_decay": decay, "lr_factor": cfg.bias_lr_factor},
    ]
    return [g for g in groups if g["params"]]


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> State:
    """The optimizer's tensors as "momentum_buffer/features.0.weight" -> tensor: no pickle, no parameter numbers."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{key}/{name}"] = value
    return found


def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: State) -> None:
    """The inverse of state_by_name. Hyperparameters stay what the configuration says."""
    reset(optimizer)
    parameters = dict(model.named_parameters())
    for entry, value in state.items():
        key, name = entry.split("/", 1)
        parameter = parameters[name]
        # With the strides of the parameter: fused kernels walk both as flat memory, and files know no channels_last.
        copy = torch.empty_like(parameter if value.dim() else value, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][key] = copy


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

    rate = eta |w| / (|g| + wd |w|), or 1 where a norm is 0;  v = momentum v + lr rate (g + wd w);  w -= v.
    The rate lies within v, as in the paper: libraries that multiply v by it differ where the rate changes.

    A group has `weight_decay` and `adapts`: where that is false its rate is 1. Like torch's fused optimizers it looks
    at `found_inf` on the device, applies nothing where that is not 0, and waits for nothing. It uses the gradients up.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets found_inf, and leaves it to us

    def __init__(
        self, groups: list[dict], lr: float, momentum: float, eta: float, global_norms: WholeNorms
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eta": eta})
        self._whole_norms = global_norms  # called once a step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert getattr(self, "grad_scale", None) is None, (
            "unscale the gradients first: their norms count here"
        )
        owners = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        parameters = [p for p, _ in owners]
        here = torch.stack([norms(parameters), norms([p.grad for p in parameters])])
        whole = self._whole_norms(here, parameters)
        for (parameter, group), w, g in zip(owners, *whole.unbind()):
            self._update(parameter, group, w, g)

    def _update(self, parameter: nn.Parameter, group: dict, w: Tensor, g: Tensor) -> None:
        """w, g: norms of the whole weight and gradient, scalars on the device."""
        decay, lr = group["weight_decay"], torch.full_like(w, group["lr"])
        if group["adapts"]:
            lr *= torch.where((w > 0) & (g > 0), group["eta"] * w / (g + decay * w), 1.0)
        if decay:
            parameter.grad.add_(parameter, alpha=decay)
        sgd(  # torch's kernel, with a loss scale of 1 / lr and a rate of 1, has lr within v; and it knows found_inf
            *([parameter], [parameter.grad], [self.state[parameter]["momentum_buffer"]]),
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
    """[n]. Row by row on the CPU: there, in one piece, torch's sum of 38 million fp32 squares is off by 0.4 %."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors))
    norm = torch.linalg.vector_norm
    return torch.stack(
        [norm(norm(t.flatten(1), dim=1)) if t.dim() > 1 else norm(t) for t in tensors]
    )
