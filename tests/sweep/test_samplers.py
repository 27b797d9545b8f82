"""The values of trials: functions of the seed, the number and the trials before."""

import sys

import pytest

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.space import first_point, read_space
from alexnet_ddp.runtime.sweep_record import Evaluation, State, Trial
from alexnet_ddp.sweep.samplers import Draws, build_sampler

SPACE = ["optimizer.lr=tag(log,interval(1e-4,1))", "trainer.epochs=interval(1,3)", "seed=1,2"]


def sampler_of(*overrides: str) -> Draws:
    return build_sampler(compose("sweep", first_point([*overrides])), read_space([*overrides]))


def drawn(sampler: Draws) -> list[dict[str, str]]:
    """All values, if the metric of a trial is its learning rate, and every third one is pruned."""
    trials = list[Trial]()
    for number in range(sampler.num_trials):
        values = sampler.draw(trials)
        metric = Evaluation(1, float(values.get("optimizer.lr", "0")))
        state = State.pruned if number % 3 == 1 else State.complete
        trials.append(Trial(number, values, state, evaluations=[metric]))
    return [trial.values for trial in trials]


def test_a_grid_has_every_combination_in_the_given_order():
    found = drawn(sampler_of("seed=2,1", "model=alexnet,alexnet_bn"))
    assert [tuple(one.values()) for one in found] == [
        ("2", "alexnet"),
        ("2", "alexnet_bn"),
        ("1", "alexnet"),
        ("1", "alexnet_bn"),
    ]
    shuffled = [one["seed"] for one in drawn(sampler_of("seed=shuffle(range(1,9))"))]
    assert sorted(shuffled) == [str(n) for n in range(1, 9)] != shuffled
    again = drawn(sampler_of("seed=shuffle(range(1,9))", "sweep.seed=5"))
    assert [one["seed"] for one in again] != shuffled


def test_random_values_are_spread_and_come_again_with_the_same_seed():
    given = [*SPACE, "sweep.sampler=random", "sweep.trials=200"]
    found = drawn(sampler_of(*given))
    assert found == drawn(sampler_of(*given))
    assert found != drawn(sampler_of(*given, "sweep.seed=1"))
    rates = [float(one["optimizer.lr"]) for one in found]
    assert 1e-4 <= min(rates) < 2e-4
    assert 0.5 < max(rates) <= 1
    assert 60 < sum(rate < 1e-2 for rate in rates) < 140  # half of them, by the logarithm
    epochs = [one["trainer.epochs"] for one in found]
    assert all(45 < epochs.count(n) < 90 for n in "123")
    shorter = drawn(sampler_of(*SPACE, "sweep.sampler=random", "sweep.trials=5"))
    assert shorter == found[:5]  # a larger number of trials continues the sweep


def test_no_combination_is_drawn_twice():
    found = drawn(sampler_of("seed=range(0,6)", "sweep.sampler=random", "sweep.trials=6"))
    assert sorted(one["seed"] for one in found) == list("012345")
    given = ["seed=interval(1,3)", "trainer.epochs=2,4", "sweep.sampler=random", "sweep.trials=6"]
    assert len({tuple(one.values()) for one in drawn(sampler_of(*given))}) == 6


def test_tpe_learns_and_a_draw_is_a_function_of_the_trials_before():
    given = [*SPACE, "sweep.sampler=tpe", "sweep.trials=25"]
    found = drawn(sampler_of(*given))
    rates = [float(one["optimizer.lr"]) for one in found]
    assert sum(rates[-10:]) / 10 > 2 * sum(rates[:10]) / 10
    assert all(1 <= int(one["trainer.epochs"]) <= 3 for one in found)
    before = [Trial(0, found[0], State.complete, evaluations=[Evaluation(1, rates[0])])]
    assert sampler_of(*given).draw(before) == found[1]  # as after a restart
    infinite = [Trial(0, found[0], State.complete, evaluations=[Evaluation(1, float("inf"))])]
    assert sampler_of(*given, "sweep.metric=val/loss").draw(infinite * 12).keys() == found[0].keys()
    running = [*before, Trial(1, found[1]), Trial(2, found[2], State.failed, 70)]
    assert sampler_of(*given, "sweep.metric=val/loss").draw(running).keys() == found[0].keys()


WRONG = {
    "optimizer.lr=interval(0.1,1)": "optimizer.lr (interval(0.1,1)) is an interval, of which a grid",
    "seed=1,2 sweep.seed=3": "sweep.seed (3) would be ignored: a grid without shuffle() draws nothing",
    "seed=shuffle(1,2) sweep.sampler=random": "seed (shuffle(1,2)): shuffle() would be ignored with",
    "seed=1,2 sweep.sampler=random": "sweep.trials (20) is more than the 2 combinations of the values",
    "trainer.epochs=interval(1,2) seed=3,4 sweep.sampler=random": "sweep.trials (20) is more than the 4 combinations of the values; give at most sweep.trials=4",
    "seed=interval(1,9) sweep.sampler=tpe": "sweep.trials (20) is more than the 9 combinations of the v",
    "seed=interval(1,9)": "seed (interval(1,9)) is an interval, of which a grid cannot have every value",
    "optimizer.lr=interval(0.1,0.1000011) sweep.sampler=random": "sweep.trials (20) is more than the combinations that were found (2): numbers of an interval have six",
    "seed=range(0,200) trainer.epochs=range(1,201)": "the grid has 40,000 combinations, of at most 10,000",
    "seed=1,2 sweep.trials=2": "sweep.trials (2) would be ignored: a grid has all combinations",
    "seed=1,2 sweep.name=a/b": "sweep.name ('a/b') must name one directory below run.root (runs)",
    "seed=1,2 sweep.metric=val/f1": "sweep.metric (val/f1) must be one of val/top1, val/top5, val/l",
}  # fmt: skip


@pytest.mark.parametrize("given", WRONG)
def test_what_a_sampler_cannot_search_is_refused(given):
    with pytest.raises(ConfigError) as error:
        sampler_of(*given.split(" "))
    assert str(error.value).startswith(WRONG[given])


def test_without_optuna_tpe_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'alexnet-ddp\[sweep\]'$"):
        sampler_of("seed=range(0,9)", "sweep.sampler=tpe", "sweep.trials=3")
    assert sampler_of("seed=1,2").num_trials == 2
