"""Optimizers do what their papers say, group by group, and go on from their tensors bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from alexnet_ddp.config import AdamWConfig, OptimizerConfig, SGDConfig
from alexnet_ddp.optim import build_optimizer, load_state_by_name, set_lr, state_by_name

RATES = (0.1, 0.05, 0.2, 0.1, 0.02)


def net() -> nn.Module:
    """A matrix, a kernel, a norm and biases, in float64, so that a formula can be compared closely."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 5)).double()


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype).contiguous()
        for p in model.parameters()
    ]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for p, g in zip(model.parameters(), gradients(model, step)):
            p.grad = torch.empty_like(p).copy_(g)  # with the strides of the weight, as backward leaves it
        set_lr(optimizer, RATES[step % len(RATES)])
        optimizer.step()


def assert_equals_formula(cfg: OptimizerConfig, update) -> None:
    """update(p, g, lr, wd, memory, t) -> new p, for each parameter by itself."""
    model = net()
    mine = [p.detach().clone() for p in model.parameters()]
    memory: list[dict] = [{} for _ in mine]
    learn(model, build_optimizer(cfg, model), range(5))
    for step in range(5):
        for k, g in enumerate(gradients(model, step)):
            is_bias = mine[k].dim() <= 1
            lr = RATES[step] * (cfg.bias_lr_factor if is_bias else 1)
            wd = 0.0 if is_bias and not cfg.decay_biases else cfg.weight_decay
            mine[k] = update(mine[k], g, lr, wd, memory[k], step + 1)
    for (name, p), expected in zip(model.named_parameters(), mine):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("decay_biases", "bias_lr_factor"), [(True, 1.0), (False, 2.0)])
def test_sgd_equals_its_formula_over_five_steps(nesterov, decay_biases, bias_lr_factor):
    def update(p, g, lr, wd, memory, t):
        g = g + wd * p
        v = memory["v"] = g if t == 1 else 0.9 * memory["v"] + g
        return p - lr * (g + 0.9 * v if nesterov else v)

    knobs = {"decay_biases": decay_biases, "bias_lr_factor": bias_lr_factor}
    assert_equals_formula(SGDConfig(lr=1, momentum=0.9, weight_decay=0.03, nesterov=nesterov, **knobs), update)


def test_sgd_without_momentum_equals_its_formula():
    assert_equals_formula(SGDConfig(lr=1, momentum=0.0), lambda p, g, lr, wd, memory, t: p - lr * g)


@pytest.mark.parametrize(("decay_biases", "bias_lr_factor"), [(True, 1.0), (False, 2.0)])
def test_adamw_equals_its_formula_over_five_steps(decay_biases, bias_lr_factor):
    def update(p, g, lr, wd, memory, t):
        p = p * (1 - lr * wd)  # decoupled: Loshchilov and Hutter 2019
        m = memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
        v = memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g * g
        return p - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)

    knobs = {"decay_biases": decay_biases, "bias_lr_factor": bias_lr_factor}
    assert_equals_formula(AdamWConfig(lr=1, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3, **knobs), update)


def test_biases_and_norms_are_the_group_that_may_learn_otherwise():
    model = net()
    cfg = SGDConfig(lr=0.1, weight_decay=5e-4, decay_biases=False, bias_lr_factor=2)
    optimizer = build_optimizer(cfg, model)
    set_lr(optimizer, 0.3)
    by_parameter = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert len(by_parameter) == 6
    for p in model.parameters():
        is_bias = p.dim() == 1
        assert by_parameter[p]["lr"] == (0.6 if is_bias else 0.3)
        assert by_parameter[p]["weight_decay"] == (0 if is_bias else 5e-4)


def test_frozen_parameters_and_networks_without_biases_are_fine():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.requires_grad_(False)
    groups = build_optimizer(SGDConfig(lr=0.1), model).param_groups
    assert [len(g["params"]) for g in groups] == [1]


@pytest.mark.parametrize("cfg", [SGDConfig(lr=0.1, weight_decay=1e-3), AdamWConfig(lr=0.1, weight_decay=0.1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_fresh_optimizer_goes_on_from_named_tensors_bit_for_bit(cfg, memory_format):
    straight = net().float().to(memory_format=memory_format)
    learn(straight, (optimizer := build_optimizer(cfg, straight)), range(3))

    resumed = net().float().to(memory_format=memory_format)
    resumed.load_state_dict(straight.state_dict())
    saved = {name: t.contiguous().clone() for name, t in state_by_name(optimizer, straight).items()}
    load_state_by_name(fresh := build_optimizer(cfg, resumed), resumed, saved)

    learn(straight, optimizer, range(3, 8))
    learn(resumed, fresh, range(3, 8))
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
    ours, theirs = state_by_name(fresh, resumed), state_by_name(optimizer, straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_loaded_state_has_the_strides_of_its_parameter():
    model = net().float().to(memory_format=torch.channels_last)
    learn(model, (optimizer := build_optimizer(SGDConfig(lr=0.1), model)), range(1))
    saved = {name: t.contiguous().clone() for name, t in state_by_name(optimizer, model).items()}
    load_state_by_name(fresh := build_optimizer(SGDConfig(lr=0.1), model), model, saved)
    kernel = model[0].weight
    assert fresh.state[kernel]["momentum_buffer"].stride() == kernel.stride()  # fused kernels walk both alike


def test_loading_keeps_the_hyperparameters_of_the_configuration():
    model = net()
    learn(model, (old := build_optimizer(SGDConfig(lr=0.1, momentum=0.9), model)), range(2))
    new = build_optimizer(SGDConfig(lr=0.7, momentum=0.5, weight_decay=0.01), model)
    load_state_by_name(new, model, state_by_name(old, model))
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in new.param_groups] == [(0.7, 0.5, 0.01)] * 2


def test_state_is_named_by_kind_and_parameter():
    model = net()
    sgd, adamw = build_optimizer(SGDConfig(lr=0.1), model), build_optimizer(AdamWConfig(lr=0.1), model)
    assert not any(moment.any() for moment in state_by_name(sgd, model).values())
    learn(model, sgd, range(1))
    learn(model, adamw, range(1))
    names = [name for name, _ in model.named_parameters()]
    assert sorted(state_by_name(sgd, model)) == sorted(f"momentum_buffer/{n}" for n in names)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert sorted(state_by_name(adamw, model)) == sorted(f"{kind}/{n}" for kind in kinds for n in names)


def test_loading_copies_so_that_the_source_stays_what_it_was():
    model = net()
    learn(model, (old := build_optimizer(AdamWConfig(lr=0.1), model)), range(2))
    saved = {name: t.clone() for name, t in state_by_name(old, model).items()}
    before = {name: t.clone() for name, t in saved.items()}
    load_state_by_name(new := build_optimizer(AdamWConfig(lr=0.1), model), model, saved)
    learn(model, new, range(2, 4))
    assert all(torch.equal(t, before[name]) for name, t in saved.items())
