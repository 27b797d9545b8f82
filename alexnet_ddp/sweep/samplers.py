"""The values of the trials of a sweep.

They are functions of sweep.seed, the number of the trial and the trials before it, so a sweep that
is continued draws what it would have drawn.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import count, product
from typing import Any, Protocol

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.space import Dimension, Space
from alexnet_ddp.config.sweep import MAX_TRIALS, Sampler, SweepConfig
from alexnet_ddp.runtime.sweep_record import State, Trial

_DEFAULT_TRIALS = 20
_MAX_ATTEMPTS = 1000  # to draw a new combination, if they cannot be counted


class Draws(Protocol):
    """num_trials: of the whole sweep."""

    num_trials: int

    def draw(self, earlier: Sequence[Trial]) -> dict[str, str]:
        """The values of the trial after the trials `earlier`."""


def build_sampler(cfg: SweepConfig, space: Space) -> Draws:
    """The sampler of a sweep. Raises ConfigError if it cannot search this space."""
    options = cfg.sweep
    shuffled = next((one for one in space.dimensions if one.is_shuffled), None)
    if options.sampler is Sampler.grid:
        if options.seed != 0 and shuffled is None:
            rule = "would be ignored: a grid without shuffle() draws nothing"
            raise ConfigError(f"sweep.seed ({options.seed}) {rule}; leave it out")
        return Grid(space, options.seed)
    if shuffled is not None:
        rule = f"would be ignored with sweep.sampler={options.sampler}, which has no order"
        raise ConfigError(f"{shuffled.key} ({shuffled.text}): shuffle() {rule}; leave it out")
    num_trials, points = options.trials or _DEFAULT_TRIALS, space.num_points
    if points is not None and num_trials > points:
        rule = f"is more than the {points} combinations of the values"
        remedy = f"give at most sweep.trials={points}"
        if all(one.values for one in space.dimensions):
            remedy += ", or use sweep.sampler=grid"
        raise ConfigError(f"sweep.trials ({num_trials}) {rule}; {remedy}")
    if options.sampler is Sampler.random:
        return Random(space, options.seed, num_trials)
    return Tpe(space, options.seed, num_trials, options.is_minimised)


class Grid:
    """Every combination; the values of the last option change first."""

    def __init__(self, space: Space, seed: int) -> None:
        interval = next((one for one in space.dimensions if not one.values), None)
        if interval is not None:
            rule = "is an interval, of which a grid cannot have every value"
            remedy = "give its values, or use sweep.sampler=random"
            raise ConfigError(f"{interval.key} ({interval.text}) {rule}; {remedy}")
        self.num_trials = space.num_points or 0
        if self.num_trials > MAX_TRIALS:
            rule = f"has {self.num_trials:,} combinations, of at most {MAX_TRIALS:,}"
            raise ConfigError(f"the grid {rule}; give fewer values, or use sweep.sampler=random")
        self._keys = [one.key for one in space.dimensions]
        ordered = [_ordered(one, seed, index) for index, one in enumerate(space.dimensions)]
        self._points = list(product(*ordered))

    def draw(self, earlier: Sequence[Trial]) -> dict[str, str]:
        return dict(zip(self._keys, self._points[len(earlier)]))


class Random:
    """Uniformly distributed values, or their logarithms. No combination comes twice."""

    def __init__(self, space: Space, seed: int, num_trials: int) -> None:
        self.num_trials = num_trials
        self._space, self._seed = space, seed
        self._points = self._draw_all()  # before the first trial, so that errors come early

    def draw(self, earlier: Sequence[Trial]) -> dict[str, str]:
        return self._points[len(earlier)]

    def _draw_all(self) -> list[dict[str, str]]:
        # Of finitely many combinations, enough for all trials, each one comes at last.
        limit = _MAX_ATTEMPTS if self._space.num_points is None else None
        points, known = list[dict[str, str]](), set[tuple[str, ...]]()
        while len(points) < self.num_trials:
            attempts = count() if limit is None else range(limit)
            drawn = (self._point(len(points), attempt) for attempt in attempts)
            found = next((one for one in drawn if tuple(one.values()) not in known), None)
            if found is None:
                rule = f"is more than the combinations that were found ({len(points)})"
                why = "numbers of an interval have six digits"
                remedy = f"give a wider interval, or at most sweep.trials={len(points)}"
                raise ConfigError(f"sweep.trials ({self.num_trials}) {rule}: {why}; {remedy}")
            points.append(found)
            known.add(tuple(found.values()))
        return points

    def _point(self, number: int, attempt: int) -> dict[str, str]:
        key, dimensions = rng.fold(self._seed, rng.SWEEP, attempt), self._space.dimensions
        uniforms = rng.uniforms(key, np.array([number]), len(dimensions))[0]
        return {one.key: _at(one, float(u)) for one, u in zip(dimensions, uniforms)}


class Tpe:
    """Optuna's tree-structured Parzen estimator.

    The study is built from the trials for each draw, because optuna's own storage does not contain
    the state of the sampler. So there is one record of a sweep, which is sweep.json.
    """

    def __init__(self, space: Space, seed: int, num_trials: int, is_minimised: bool) -> None:
        self.num_trials = num_trials
        self._space, self._seed, self._is_minimised = space, seed, is_minimised
        self._optuna = _import_optuna()
        self._distributions = {one.key: self._distribution(one) for one in space.dimensions}

    def draw(self, earlier: Sequence[Trial]) -> dict[str, str]:
        optuna, number = self._optuna, len(earlier)
        seed = rng.fold(self._seed, rng.SWEEP, number) % 2**32
        with warnings.catch_warnings():
            # constant_liar: trials that run now count as bad, so their values are not drawn again.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        direction = "minimize" if self._is_minimised else "maximize"
        study = optuna.create_study(direction=direction, sampler=sampler)
        for trial in earlier:
            study.add_trial(self._frozen(trial))
        drawn = study.ask(self._distributions).params
        return {
            one.key: drawn[one.key] if one.values else one.text_of(drawn[one.key])
            for one in self._space.dimensions
        }

    def _frozen(self, trial: Trial) -> Any:
        states, best = self._optuna.trial.TrialState, trial.best(self._is_minimised)
        state = {
            State.running: states.RUNNING,
            State.complete: states.COMPLETE if trial.evaluations else states.FAIL,
            State.pruned: states.PRUNED,
            State.failed: states.FAIL,
        }[trial.state]
        worst = math.inf if self._is_minimised else -math.inf  # of a trial without a finite value
        params = {
            one.key: trial.values[one.key] if one.values else _number(one, trial.values[one.key])
            for one in self._space.dimensions
        }
        return self._optuna.trial.create_trial(
            state=state,
            value=(best.value if best else worst) if state is states.COMPLETE else None,
            params=params,
            distributions=self._distributions,
            intermediate_values={k: one.value for k, one in enumerate(trial.evaluations, 1)},
        )

    def _distribution(self, one: Dimension) -> Any:
        known = self._optuna.distributions
        if one.values:
            return known.CategoricalDistribution(one.values)
        if one.is_int:
            return known.IntDistribution(int(one.low), int(one.high), log=one.is_log)
        return known.FloatDistribution(one.low, one.high, log=one.is_log)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        rule = f"needs optuna ({error})"
        raise ConfigError(f"sweep.sampler=tpe {rule}; pip install 'alexnet-ddp[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _ordered(one: Dimension, seed: int, index: int) -> list[str]:
    if not one.is_shuffled:
        return list(one.values)
    order = rng.permutation(rng.fold(seed, rng.SWEEP, index), len(one.values))
    return [one.values[k] for k in order]


def _at(one: Dimension, u: float) -> str:
    """The value at the share `u`, in [0, 1), of the values or of the interval."""
    if one.values:
        return one.values[int(u * len(one.values))]
    low, high = one.low, one.high + (1 if one.is_int else 0)
    number = low + u * (high - low)
    if one.is_log:
        number = low * math.exp(u * math.log(high / low))
    return one.text_of(math.floor(number) if one.is_int else number)


def _number(one: Dimension, text: str) -> float:
    return int(text) if one.is_int else float(text)
