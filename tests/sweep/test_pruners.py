"""Which trials are stopped: the rules against optuna's, and that the order of arrival is no matter."""

import itertools
import math
import random

import optuna
import pytest

from alexnet_ddp.config.sweep import Pruner
from alexnet_ddp.sweep.pruners import Decision, Progress, decide, score


def in_turn(pruner: Pruner, curves: list[list[float]]) -> list[int | None]:
    """After how many evaluations each trial is stopped, if each trains after the one before."""
    earlier, found = list[Progress](), list[int | None]()
    for curve in curves:
        decision = decide(pruner, Progress(curve, 0, True, is_final=True), earlier)
        count = decision.num_decided
        found.append(count if decision.is_pruned else None)
        earlier.append(Progress(curve[:count], count, True))
    return found


def test_asha_stops_the_trials_that_optunas_pruner_stops():
    draws = random.Random(3)
    curves = [[draws.random() for _ in range(10)] for _ in range(60)]
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    expected = list[int | None]()
    for curve in curves:
        trial, stopped = study.ask(), None
        for step, value in enumerate(curve, 1):
            trial.report(value, step)
            if step < len(curve) and trial.should_prune():
                stopped = step
                break
        state = optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if stopped else curve[-1], state)
        expected.append(stopped)
    assert in_turn(Pruner.asha, curves) == expected
    assert {None, 1, 3, 9} == set(expected)  # each rung has stopped one


def test_median_compares_the_best_so_far_with_at_least_five_others():
    curves = [[float(k), float(k)] for k in range(5)]
    others = [Progress(curve, 2, True) for curve in curves]
    low = Progress([1.0, 1.5, 9.0], 0, False)
    assert decide(Pruner.median, low, others) == Decision(1, is_pruned=True)
    assert decide(Pruner.median, low, others[:4]) == Decision(3)
    assert decide(Pruner.median, Progress([2.0, 0.0], 0, False), others) == Decision(2)
    assert decide(Pruner.none, low, others) == Decision(3)


def test_the_end_of_a_training_is_not_pruned_and_nan_is():
    best = [Progress([5.0], 1, True)]
    assert decide(Pruner.asha, Progress([1.0], 0, True, is_final=True), best) == Decision(1)
    nan = score(math.nan, is_minimised=False)
    assert decide(Pruner.asha, Progress([nan], 0, False), []) == Decision(1, is_pruned=True)
    assert score(2.0, is_minimised=True) > score(3.0, is_minimised=True) > nan
    assert score(math.inf, is_minimised=True) == score(math.inf, is_minimised=False) == nan


@pytest.mark.parametrize("pruner", [Pruner.asha, Pruner.median])
def test_the_decisions_do_not_depend_on_which_trial_is_faster(pruner):
    """Trials advance at random; each is decided on as soon as it can be, as Schedule does."""
    draws = random.Random(7)
    curves = [[draws.random() for _ in range(5)] for _ in range(12)]
    expected = in_turn(pruner, curves)
    assert None in expected
    assert len(set(expected)) > 1
    for seed in range(20):
        speeds, done = random.Random(seed), [0] * len(curves)
        stopped = dict[int, int | None]()
        while len(stopped) < len(curves):
            for k in speeds.sample(range(len(curves)), 3):  # three advance by an evaluation
                done[k] = min(done[k] + 1, len(curves[k]))
            earlier = list[Progress]()
            for k, curve in enumerate(curves):
                if k not in stopped:
                    scores = curve[: done[k]]
                    is_end = done[k] == len(curve)
                    found = decide(pruner, Progress(scores, 0, False, is_end), earlier)
                    if found.is_pruned or (is_end and found.num_decided == len(curve)):
                        stopped[k] = found.num_decided if found.is_pruned else None
                    else:
                        known = min(len(scores), found.num_decided + 1)
                        earlier.append(Progress(scores, known, False))
                        continue
                count = stopped[k] or len(curve)
                earlier.append(Progress(curve[:count], count, True))
        assert [stopped[k] for k in range(len(curves))] == expected, seed


def test_a_decision_waits_for_a_lower_trial_that_is_behind():
    behind, trial = Progress([], 0, False), Progress([1.0], 0, False)
    assert decide(Pruner.asha, trial, [behind]) == Decision(0)
    gone = Progress([], 0, True)  # it failed before its first evaluation
    assert decide(Pruner.asha, trial, [gone]) == Decision(1)
    rungs = itertools.accumulate([1, 2, 6])  # 1, 3, 9
    trial = Progress([1.0] * 9, 0, False)
    first = [Progress([2.0] * n, n, False) for n in (1, 3)]
    assert [n for n in rungs if n <= 3] == [1, 3]
    assert decide(Pruner.asha, trial, first[1:]) == Decision(1, is_pruned=True)
    equal = Progress([1.0] * 3, 3, False)
    assert decide(Pruner.asha, trial, [equal]) == Decision(8)
