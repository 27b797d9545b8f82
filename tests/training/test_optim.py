"""Optimizers do what their papers say, group by group, and go on from their tensors bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from alexnet_ddp.config import (
    AdamWConfig,
    Device,
    LARSConfig,
    LARSVariant,
    OptimizerConfig,
    SGDConfig,
)
from alexnet_ddp.config.recipe import AdamConfig
from alexnet_ddp.runtime import distributed
from alexnet_ddp.training.optim import build_optimizer, load_state_by_name, set_lr, state_by_name
from tests.ranks import run_ranks

RATES = (0.1, 0.05, 0.2, 0.1, 0.02)


def net() -> nn.Module:
    """A matrix, a kernel, a norm and biases, in float64, so that a formula can be compared closely."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 5)
    ).double()


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype).contiguous()
        for p in model.parameters()
    ]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for p, g in zip(model.parameters(), gradients(model, step)):
            p.grad = torch.empty_like(p).copy_(
                g
            )  # with the strides of the weight, as backward leaves it
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
    assert_equals_formula(
        SGDConfig(lr=1, momentum=0.9, weight_decay=0.03, nesterov=nesterov, **knobs), update
    )


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
    assert_equals_formula(
        AdamWConfig(lr=1, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3, **knobs), update
    )


@pytest.mark.parametrize(("decay_biases", "bias_lr_factor"), [(True, 1.0), (False, 2.0)])
def test_adam_equals_its_formula_over_five_steps(decay_biases, bias_lr_factor):
    def update(p, g, lr, wd, memory, t):
        g = g + wd * p
        m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
        v = memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g * g
        return p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    knobs = {"decay_biases": decay_biases, "bias_lr_factor": bias_lr_factor}
    assert_equals_formula(AdamConfig(weight_decay=0.3, **knobs), update)


def test_adam_has_the_values_of_its_article():
    cfg = AdamConfig()
    assert (cfg.lr, cfg.beta1, cfg.beta2, cfg.eps) == (1e-3, 0.9, 0.999, 1e-8)


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


GOES_ON = [
    SGDConfig(lr=0.1, weight_decay=1e-3),
    AdamWConfig(lr=0.1, weight_decay=0.1),
    LARSConfig(lr=0.1, weight_decay=1e-3),
]


@pytest.mark.parametrize("cfg", GOES_ON, ids=lambda cfg: type(cfg).__name__)
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
    assert (
        fresh.state[kernel]["momentum_buffer"].stride() == kernel.stride()
    )  # fused kernels walk both alike


def test_loading_keeps_the_hyperparameters_of_the_configuration():
    model = net()
    learn(model, (old := build_optimizer(SGDConfig(lr=0.1, momentum=0.9), model)), range(2))
    new = build_optimizer(SGDConfig(lr=0.7, momentum=0.5, weight_decay=0.01), model)
    load_state_by_name(new, model, state_by_name(old, model))
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in new.param_groups] == [
        (0.7, 0.5, 0.01)
    ] * 2


def test_state_is_named_by_kind_and_parameter():
    model = net()
    sgd, adamw = (
        build_optimizer(SGDConfig(lr=0.1), model),
        build_optimizer(AdamWConfig(lr=0.1), model),
    )
    assert not any(moment.any() for moment in state_by_name(sgd, model).values())
    learn(model, sgd, range(1))
    learn(model, adamw, range(1))
    names = [name for name, _ in model.named_parameters()]
    assert sorted(state_by_name(sgd, model)) == sorted(f"momentum_buffer/{n}" for n in names)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert sorted(state_by_name(adamw, model)) == sorted(
        f"{kind}/{n}" for kind in kinds for n in names
    )


def test_loading_copies_so_that_the_source_stays_what_it_was():
    model = net()
    learn(model, (old := build_optimizer(AdamWConfig(lr=0.1), model)), range(2))
    saved = {name: t.clone() for name, t in state_by_name(old, model).items()}
    before = {name: t.clone() for name, t in saved.items()}
    load_state_by_name(new := build_optimizer(AdamWConfig(lr=0.1), model), model, saved)
    learn(model, new, range(2, 4))
    assert all(torch.equal(t, before[name]) for name, t in saved.items())


# --- LARS -------------------------------------------------------------------------------------------------------

WEIGHTS_ONLY = {"variant": LARSVariant.weights_only, "decay_biases": False}


def test_lars_takes_the_steps_of_the_formula_worked_out_on_paper():
    """|w| = 5 and |g| = 10; eta 0.1 and wd 0.5: rate = 0.1 * 5 / (10 + 2.5) = 0.04. With lr 2 and momentum 0.9:

    v1 = 2 * 0.04 * (g + w / 2) = 0.08 * (6 + 1.5, 8 + 2) = (0.6, 0.8);       w1 = (3, 4) - v1 = (2.4, 3.2), of norm 4
    g2 = -g = (-6, -8), lr 1: rate = 0.1 * 4 / (10 + 2) = 1 / 30; (g2 + w1 / 2) / 30 = (-0.16, -0.64 / 3)
    v2 = 0.9 * v1 + that = (0.54 - 0.16, 0.72 - 0.64 / 3) = (0.38, 1.52 / 3);       w2 = (2.02, 8.08 / 3)
    """
    w = nn.Parameter(torch.tensor([[3.0], [4.0]]))
    optimizer = build_optimizer(LARSConfig(lr=1, eta=0.1, weight_decay=0.5), nn.ParameterList([w]))
    for lr, g, expected in (
        (2.0, [[6.0], [8.0]], [[2.4], [3.2]]),
        (1.0, [[-6.0], [-8.0]], [[2.02], [8.08 / 3]]),
    ):
        w.grad = torch.tensor(g)
        set_lr(optimizer, lr)
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "knobs", [{}, {"decay_biases": False}, WEIGHTS_ONLY], ids=["authors", "no decay", "weights"]
)
def test_lars_equals_its_formula_over_five_steps(knobs):
    cfg = LARSConfig(lr=1, eta=0.02, weight_decay=0.03, bias_lr_factor=2, **knobs)

    def update(p, g, lr, wd, memory, t):
        rate = 0.02 * p.norm() / (g.norm() + wd * p.norm()) if p.norm() > 0 else 1.0
        if p.dim() == 1 and cfg.variant is LARSVariant.weights_only:
            rate = 1.0
        v = memory["v"] = 0.9 * memory.get("v", 0) + lr * rate * (g + wd * p)
        return p - v

    model = net().float()  # norms have biases that are 0 at first: there the rate is 1
    mine = [p.detach().double().clone() for p in model.parameters()]
    memory: list[dict] = [{} for _ in mine]
    learn(model, build_optimizer(cfg, model), range(5))
    for step in range(5):
        for k, g in enumerate(gradients(model, step)):
            is_bias = mine[k].dim() <= 1
            lr = RATES[step] * (2 if is_bias else 1)
            wd = 0.0 if is_bias and not cfg.decay_biases else 0.03
            mine[k] = update(mine[k], g.double(), lr, wd, memory[k], step + 1)
    for (name, p), expected in zip(model.named_parameters(), mine):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("always_adapt", [True, False])
def test_lars_equals_timms_on_random_tensors(always_adapt):
    reason = "another library's LARS to compare with: pip install timm"
    lars = pytest.importorskip("timm.optim.lars", reason=reason).Lars
    knobs = {} if always_adapt else WEIGHTS_ONLY
    ours, theirs = net().float(), net().float()
    optimizer = build_optimizer(LARSConfig(lr=0.1, eta=0.01, weight_decay=5e-4, **knobs), ours)
    split = [
        [p for p in theirs.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False)
    ]
    groups = [
        {"params": ps, "weight_decay": wd}
        for ps, wd in zip(split, (5e-4, 5e-4 if always_adapt else 0.0))
    ]
    reference = lars(
        groups, lr=0.1, momentum=0.9, trust_coeff=0.01, eps=0.0, always_adapt=always_adapt
    )
    for step in range(5):
        for a, b, g in zip(ours.parameters(), theirs.parameters(), gradients(ours, step)):
            a.grad, b.grad = g.clone(), g.clone()
        optimizer.step()  # at a constant rate: timm's lr multiplies v
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def lars_on_half(steps: int) -> list[Tensor]:
    """A layer of which each rank has half of the rows, beside one that every rank has."""
    with distributed.session(Device.cpu) as world:
        model = net().float()
        whole = model[3].weight
        half = slice(world.rank, None, 2) if world.world_size > 1 else slice(None)
        model[3].weight = part = nn.Parameter(whole[half].detach().clone())

        def global_norms(norms: Tensor, parameters: list[nn.Parameter]) -> Tensor:
            is_split = torch.tensor([p is part for p in parameters])
            sums = norms.square()
            torch.distributed.all_reduce(sums)
            return torch.where(is_split, sums.sqrt(), norms)

        optimizer = build_optimizer(
            LARSConfig(lr=0.1, eta=0.02, weight_decay=0.03), model, global_norms
        )
        torch.manual_seed(1)
        for _ in range(steps):
            for p in model.parameters():
                p.grad = (
                    torch.randn(whole.shape)[half].clone() if p is part else torch.randn(p.shape)
                )
            optimizer.step()
        return [p.detach().numpy() for p in model.parameters()]


def test_lars_on_a_split_layer_equals_lars_on_the_whole_one():
    first, second = run_ranks(lars_on_half, 2, 5)
    whole = lars_on_half(5)
    for a, b, expected in zip(first, second, whole):
        if a.shape != expected.shape:
            joined = torch.empty(expected.shape)
            joined[0::2], joined[1::2] = torch.from_numpy(a), torch.from_numpy(b)
            a = b = joined.numpy()
        torch.testing.assert_close(
            torch.from_numpy(a), torch.from_numpy(expected), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            torch.from_numpy(b), torch.from_numpy(expected), rtol=1e-6, atol=1e-6
        )


def test_the_norms_of_a_large_layer_are_exact():
    torch.manual_seed(0)
    w = nn.Parameter(
        torch.randn(1024, 4096)
    )  # torch's own norm, in one piece on a CPU, is off by 0.02 %
    seen = []
    optimizer = build_optimizer(
        LARSConfig(lr=1), nn.ParameterList([w]), lambda n, parameters: seen.append(n) or n
    )
    w.grad = torch.randn(1024, 4096)
    expected = torch.stack([w.detach().double().norm(), w.grad.double().norm()])
    optimizer.step()
    torch.testing.assert_close(seen[0].flatten().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_lars_applies_nothing_of_a_step_that_is_not_finite(bad):
    model = net().float()
    learn(
        model,
        (optimizer := build_optimizer(LARSConfig(lr=0.1, weight_decay=1e-3), model)),
        range(2),
    )
    before = [t.clone() for t in (*model.parameters(), *state_by_name(optimizer, model).values())]
    for p, g in zip(model.parameters(), gradients(model, 2)):
        p.grad = g
    model[3].weight.grad[0, 0] = bad
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [*model.parameters(), *state_by_name(optimizer, model).values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    optimizer.found_inf.zero_()
    learn(model, optimizer, range(2, 3))
    assert not any(torch.equal(a, b) for a, b in zip(after, before))


def test_lars_under_a_loss_scale_takes_the_same_steps_and_skips_those_that_overflow():
    plain, scaled = net().float(), net().float()
    cfg = LARSConfig(lr=0.1, eta=0.02, weight_decay=1e-3)
    one, other = build_optimizer(cfg, plain), build_optimizer(cfg, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    for step, overflows in enumerate((False, True, False)):
        for a, b, g in zip(plain.parameters(), scaled.parameters(), gradients(plain, step)):
            a.grad = g.clone()
            b.grad = g * scaler.scale(torch.ones(()))
        if overflows:
            scaled[3].bias.grad[0] = torch.inf
        else:
            one.step()
        scaler.unscale_(other)
        scaler.step(other)
        scaler.update()
    assert scaler.get_scale() == 512
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters()))
