"""Optimizers and their parameter groups."""

import torch
from torch import Tensor, nn

from alexnet_ddp.config import AdamWConfig, OptimizerConfig, SGDConfig

State = dict[str, Tensor]


def build_optimizer(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """One fused pass over the parameters. Groups carry `lr_factor`; set_lr multiplies it."""
    groups = _groups(cfg, model)
    match cfg:
        case SGDConfig():
            optimizer = torch.optim.SGD(groups, cfg.lr, cfg.momentum, nesterov=cfg.nesterov, fused=True)
        case AdamWConfig():
            optimizer = torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, fused=True)
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
        names = ["momentum_buffer"] if group.get("momentum") else ["exp_avg", "exp_avg_sq"] if "betas" in group else []
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
