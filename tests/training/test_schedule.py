"""Time is arithmetic on one integer: when something is due, and how large a step is."""

import math

import pytest

from alexnet_ddp.config import (
    ConstantConfig,
    CosineConfig,
    PolyConfig,
    SchedulerConfig,
    StepDecayConfig,
    TrainerConfig,
)
from alexnet_ddp.training.schedule import Budget, build_lr_schedule, count_warmup_steps

BASE = 0.4
TOTAL = 1000  # 10 epochs of 100 steps


def budget(
    epochs: int = 10, steps_per_epoch: int = 100, save_every_steps: int | None = None, **knobs
) -> Budget:
    return Budget.plan(
        TrainerConfig(epochs=epochs, global_batch_size=1, **knobs),
        steps_per_epoch,
        save_every_steps,
    )


def lr(cfg: SchedulerConfig, **knobs):
    return build_lr_schedule(cfg, BASE, budget(**knobs))


def due(is_due, steps: range) -> list[int]:
    return [step for step in steps if is_due(step)]


# --- learning rate ----------------------------------------------------------------------------------------------


def test_constant_stays_what_it_is():
    rate = lr(ConstantConfig())
    assert {rate(step) for step in (0, 1, 500, 999)} == {BASE}


def test_step_decay_multiplies_by_gamma_at_the_first_step_of_each_milestone():
    rate = lr(StepDecayConfig(milestones_epochs=[3, 7.5], gamma=0.1))
    expected = {
        0: BASE,
        299: BASE,
        300: BASE / 10,
        749: BASE / 10,
        750: BASE / 100,
        999: BASE / 100,
    }
    assert {step: rate(step) for step in expected} == pytest.approx(expected)


def test_cosine_goes_from_one_over_a_half_towards_its_floor():
    rate = lr(CosineConfig())
    assert rate(0) == BASE
    assert rate(250) == pytest.approx(BASE * (1 + math.sqrt(0.5)) / 2)
    assert rate(500) == pytest.approx(BASE / 2)
    assert rate(999) == pytest.approx(0, abs=3e-6 * BASE)
    assert rate(999) > 0
    floored = lr(CosineConfig(min_lr_ratio=0.1))
    assert floored(500) == pytest.approx(BASE * 0.55)
    assert floored(999) == pytest.approx(BASE * 0.1, rel=1e-4)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 5), (3, 15), (90, 450)])
def test_a_warm_up_that_is_null_is_5_percent_of_a_run_of_any_length(epochs, steps):
    budget = Budget.plan(TrainerConfig(epochs=epochs, global_batch_size=64), 100)
    assert count_warmup_steps(CosineConfig(warmup_epochs=None), budget) == steps
    assert count_warmup_steps(CosineConfig(warmup_epochs=None, warmup_steps=7), budget) == 7


def test_poly_falls_with_its_power():
    rate = lr(PolyConfig(power=2))
    assert rate(0) == BASE
    assert rate(500) == pytest.approx(BASE / 4)
    assert rate(999) == pytest.approx(BASE * 1e-6)
    assert lr(PolyConfig(power=1))(750) == pytest.approx(BASE / 4)


@pytest.mark.parametrize(
    "cfg",
    [
        ConstantConfig(warmup_epochs=2),
        CosineConfig(warmup_epochs=2),
        PolyConfig(warmup_epochs=2),
        StepDecayConfig(warmup_epochs=2, milestones_epochs=[5]),
    ],
)
def test_warm_up_rises_linearly_and_reaches_the_base_rate(cfg):
    rate = lr(cfg)
    assert rate(0) == pytest.approx(BASE / 200)  # never 0: the first step learns
    assert [rate(step) for step in range(200)] == pytest.approx(
        [BASE * (step + 1) / 200 for step in range(200)]
    )
    assert rate(199) == rate(200) == BASE
    assert rate(201) <= BASE


@pytest.mark.parametrize("kind", [ConstantConfig, CosineConfig, PolyConfig, StepDecayConfig])
def test_warm_up_may_be_counted_in_steps(kind):
    knobs = {"milestones_epochs": [5]} if kind is StepDecayConfig else {}
    by_steps, by_epochs = lr(kind(warmup_steps=200, **knobs)), lr(kind(warmup_epochs=2, **knobs))
    assert [by_steps(step) for step in range(TOTAL)] == [by_epochs(step) for step in range(TOTAL)]
    assert lr(kind(warmup_steps=4, **knobs))(2) == pytest.approx(BASE * 3 / 4)


def test_cosine_and_poly_span_the_steps_after_warm_up():
    assert lr(CosineConfig(warmup_epochs=2))(600) == pytest.approx(BASE / 2)
    assert lr(PolyConfig(warmup_epochs=2, power=2))(600) == pytest.approx(BASE / 4)


def test_milestones_count_from_the_start_of_the_run_not_from_the_end_of_warm_up():
    rate = lr(StepDecayConfig(warmup_epochs=2, milestones_epochs=[5]))
    assert (rate(499), rate(500)) == (BASE, pytest.approx(BASE / 10))


def test_a_decay_ends_with_the_last_epoch():
    rate = lr(CosineConfig(), epochs=7, steps_per_epoch=50)
    assert rate(175) == pytest.approx(BASE / 2)
    assert 0 < rate(349) < 1e-4 * BASE


@pytest.mark.parametrize(
    "cfg", [CosineConfig(warmup_epochs=3), PolyConfig(warmup_epochs=3, power=0.5)]
)
@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_a_run_shorter_than_its_warm_up_has_a_positive_real_rate(cfg, epochs):
    rate = lr(cfg, epochs=epochs)
    values = [rate(step) for step in range(100 * epochs)]
    assert all(isinstance(v, float) and 0 < v <= BASE for v in values)


@pytest.mark.parametrize(
    "cfg", [CosineConfig(warmup_epochs=None), PolyConfig(warmup_epochs=None, power=2)]
)
def test_max_steps_ends_a_run_and_does_not_change_its_rates(cfg):
    short, whole = lr(cfg, max_steps=250), lr(cfg)
    assert [short(step) for step in range(250)] == [whole(step) for step in range(250)]


def test_a_fractional_warm_up_is_rounded_to_steps():
    rate = lr(ConstantConfig(warmup_epochs=0.025))  # 2.5 steps
    assert [rate(step) for step in range(3)] == [BASE / 2, BASE, BASE]


# --- budget -----------------------------------------------------------------------------------------------------


def test_a_run_lasts_its_epochs_or_max_steps_whichever_is_shorter():
    assert budget().total_steps == TOTAL
    assert budget(max_steps=250).total_steps == 250
    assert budget(max_steps=5000).total_steps == TOTAL


def test_the_epoch_is_a_function_of_the_step():
    assert [budget().epoch(step) for step in (0, 50, 100, 1000)] == [0, 0.5, 1, 10]


def test_the_last_step_is_the_end_and_a_run_may_resume_beyond_it():
    b = budget(max_steps=250)
    assert [b.is_end(step) for step in (0, 249, 250, 251)] == [False, False, True, True]


def test_evaluation_is_due_at_the_end_of_each_epoch():
    b = budget(epochs=3, steps_per_epoch=7)
    assert due(b.eval_due, range(22)) == [7, 14, 21]


def test_evaluation_is_due_at_a_last_step_that_ends_no_epoch():
    b = budget(epochs=3, steps_per_epoch=7, max_steps=10)
    assert due(b.eval_due, range(11)) == [7, 10]


def test_every_second_epoch_is_evaluated_and_the_last_one():
    b = budget(epochs=5, steps_per_epoch=4, eval_every_epochs=2)
    assert due(b.eval_due, range(21)) == [8, 16, 20]


def test_a_checkpoint_is_due_at_the_end_of_each_epoch_and_every_so_many_steps():
    assert due(budget(epochs=3, steps_per_epoch=7).save_due, range(1, 22)) == [7, 14, 21]
    assert due(budget(epochs=2, steps_per_epoch=7, save_every_steps=3).save_due, range(1, 15)) == [
        3,
        6,
        7,
        9,
        12,
        14,
    ]
    assert due(budget(epochs=3, steps_per_epoch=7, max_steps=10).save_due, range(1, 11)) == [7, 10]


def test_a_row_is_due_every_so_many_steps_and_at_the_end():
    assert due(budget(epochs=1, steps_per_epoch=25).log_due, range(1, 26)) == [10, 20, 25]
    assert due(budget(epochs=1, steps_per_epoch=5, log_every_steps=1).log_due, range(1, 6)) == [
        1,
        2,
        3,
        4,
        5,
    ]
