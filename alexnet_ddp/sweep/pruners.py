"""Whether a trial is stopped before its end, after a number of evaluations.

A trial is compared only with trials of lower numbers, after as many evaluations as it has had
itself. So the decision is a function of the metrics: it is the same for any number of trials at the
same time, and after any interruption. If a lower trial is behind, the decision waits and the trial
trains on; later evaluations of a trial that is then stopped do not count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from alexnet_ddp.config.sweep import Pruner

_REDUCTION = 3  # asha: of so many trials one continues
_MIN_OTHERS = 5  # median: trials to compare with


@dataclass(frozen=True)
class Progress:
    """A trial as a pruner sees it.

    scores: after each evaluation; higher is better. num_counted: so many of them may be compared
    with others. is_over: there will be no more of them. is_final: the last score is that of the
    last epoch or step. It is not set if trainer.patience or max_hours ends the training.
    """

    scores: Sequence[float]
    num_counted: int
    is_over: bool
    is_final: bool = False


@dataclass(frozen=True)
class Decision:
    """The first num_decided evaluations are decided on. is_pruned: the last one of them is bad."""

    num_decided: int
    is_pruned: bool = False


def decide(pruner: Pruner, trial: Progress, earlier: Sequence[Progress]) -> Decision:
    """Decide on a trial as far as possible. earlier: all trials of lower numbers.

    A final evaluation is never bad: stopping there would save nothing.
    """
    for count in range(1, len(trial.scores) + 1):
        is_end = trial.is_final and count == len(trial.scores)
        if is_end or not _is_compared(pruner, count):
            continue
        if any(not one.is_over and one.num_counted < count for one in earlier):
            return Decision(count - 1)
        others = [one.scores[:count] for one in earlier if one.num_counted >= count]
        if _is_bad(pruner, trial.scores[:count], others):
            return Decision(count, is_pruned=True)
    return Decision(len(trial.scores))


def score(value: float, is_minimised: bool) -> float:
    """A number that is higher for better values. Values that are not finite are the worst."""
    if not math.isfinite(value):
        return -math.inf
    return -value if is_minimised else value


def _is_compared(pruner: Pruner, count: int) -> bool:
    if pruner is Pruner.asha:
        while count % _REDUCTION == 0:
            count //= _REDUCTION
        return count == 1
    return pruner is Pruner.median


def _is_bad(pruner: Pruner, scores: Sequence[float], others: list[Sequence[float]]) -> bool:
    if pruner is Pruner.median:
        rivals = [max(one) for one in others]
        return len(rivals) >= _MIN_OTHERS and max(scores) < median(rivals)
    rivals = sorted([*(one[-1] for one in others), scores[-1]], reverse=True)
    # Of fewer than _REDUCTION trials, the best one so far continues.
    last = max(len(rivals) // _REDUCTION, 1) - 1
    return scores[-1] == -math.inf or scores[-1] < rivals[last]
