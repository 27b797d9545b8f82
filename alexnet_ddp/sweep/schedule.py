"""Which trial starts, ends or is stopped next."""

import os
import time
from dataclasses import dataclass
from functools import partial

from alexnet_ddp.config.space import Space
from alexnet_ddp.config.sweep import SweepConfig
from alexnet_ddp.runtime.errors import Preempted
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.sweep_record import Evaluation, State, SweepRecord, Trial
from alexnet_ddp.sweep.pruners import Decision, Progress, decide, score
from alexnet_ddp.sweep.results import TrialRuns
from alexnet_ddp.sweep.samplers import Draws
from alexnet_ddp.sweep.slots import Slot, check_promotion, merged
from alexnet_ddp.sweep.trial import TrialProcess

_POLL_S = 0.2
_MAX_SHOWN = 4  # trials at the same time whose evaluations are printed
_MIN_GAIN = 2.0  # a restart must save so many times what the last start of the trial took


@dataclass
class Active:
    """A trial whose process is running, and its devices.

    is_promoted: it was stopped to start again with more slots.
    """

    trial: Trial
    process: TrialProcess
    slots: list[Slot]
    is_promoted: bool = False

    @property
    def may_grow(self) -> bool:
        """True unless it is about to end."""
        return not self.trial.is_over and not self.is_promoted


class Schedule:
    """Runs the trials of a sweep to their end, or to a stop."""

    def __init__(
        self,
        cfg: SweepConfig,
        space: Space,
        record: SweepRecord,
        sampler: Draws,
        slots: list[Slot],
        stop: StopSignal,
    ) -> None:
        self._options, self._record = cfg.sweep, record
        self._sampler, self._stop = sampler, stop
        check = partial(check_promotion, slot=slots[0], env=os.environ)
        self._runs = TrialRuns(cfg, space, record, check if cfg.sweep.promote else None)
        self._slots, self._free = tuple(slots), list(slots)
        self._active: list[Active] = []
        self._exit_codes: dict[int, int] = {}  # of trials that ended and are not decided on
        self._scores: dict[int, Progress] = {}
        self._num_shown: dict[int, int] = {}  # evaluations of the trials that started here

    def run(self) -> None:
        """Return when all trials are over. Raises Preempted after a stop; the trials are saved."""
        while True:
            if self._stop.received:
                self._stop_all("stopped")
            self._collect()
            self._judge()
            self._fill()
            self._promote()
            if not self._active and not any(self._runs.unfinished):
                return
            time.sleep(_POLL_S)

    # --- processes --------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Note which processes have ended. Their slots are free."""
        for active in list(self._active):
            code = active.process.exit_code()
            if code is None:
                continue
            self._active.remove(active)
            self._free += active.slots
            if active.trial.is_over:
                continue  # it was pruned
            if code == Preempted.exit_code:
                if active.is_promoted:
                    continue  # _fill starts it again
                self._stop_all(f"trial {active.trial.name} was stopped from outside")
            self._exit_codes[active.trial.number] = code

    def _fill(self) -> None:
        """Start trials in the free slots: first those that were interrupted, then new ones."""
        while self._free:
            busy = {active.trial.number for active in self._active} | self._exit_codes.keys()
            waiting = (one for one in self._runs.unfinished if one.number not in busy)
            trial = next(waiting, None) or self._draw()
            num_slots = self._slots_each()
            if trial is None or len(self._free) < num_slots:
                return
            self._start(trial, num_slots)

    def _slots_each(self) -> int:
        """Slots of a trial: several if sweep.promote is set and no later trial needs them."""
        if not self._options.promote or len(self._record.trials) < self._sampler.num_trials:
            return 1
        num_left = sum(one.number not in self._exit_codes for one in self._runs.unfinished)
        return max(1, len(self._slots) // max(1, num_left))

    def _promote(self) -> None:
        """Stop trials that should continue with more slots, if that saves time.

        A trial at least doubles its slots, so it is stopped at most log2(sweep.parallel) times.
        """
        num_slots = self._slots_each()
        if any(active.trial.is_over for active in self._active):
            return  # their slots are not free yet
        for active in self._active:
            factor = num_slots / len(active.slots)
            if factor >= 2 and active.may_grow and self._saves_time(active, factor):
                active.is_promoted = True
                active.process.stop()
                devices = f"{num_slots} of {len(self._slots)} shares of the devices"
                say(f"trial {active.trial.name} saves, to continue with {devices}")

    def _saves_time(self, active: Active, factor: float) -> bool:
        reader = self._runs.reader(active.trial)
        start_s = active.process.start_s(self._runs.record_of(active.trial))
        if reader is None or start_s is None or reader.left_s is None:
            return False
        return reader.left_s * (1 - 1 / factor) > _MIN_GAIN * start_s

    def _draw(self) -> Trial | None:
        trials = self._record.trials
        if len(trials) >= self._sampler.num_trials:
            return None
        trial = Trial(len(trials), self._sampler.draw(trials))
        trials.append(trial)
        self._record.write()  # before it starts: it is never drawn again
        return trial

    def _start(self, trial: Trial, num_slots: int) -> None:
        reader = self._runs.reader(trial)
        if reader is None:
            return
        self._num_shown.setdefault(trial.number, len(reader.read(at_once=True)))
        slots, self._free = self._free[:num_slots], self._free[num_slots:]
        run_dir, overrides = self._runs.directory(trial), self._runs.overrides(trial)
        process = TrialProcess(run_dir, overrides, merged(slots))
        self._active.append(Active(trial, process, slots))
        total = self._sampler.num_trials
        verb = "continues" if self._runs.record_of(trial).starts else "starts"
        say(f"trial {trial.name} of {total} {verb}: {_values_text(trial)}")

    def _stop_all(self, why: str) -> None:
        """Stop all trials, and wait until they are saved. Raises Preempted."""
        for active in self._active:
            active.process.stop()
        while any(active.process.exit_code() is None for active in self._active):
            time.sleep(_POLL_S)
        num_over = sum(trial.is_over for trial in self._record.trials)
        done = f"{why} with {num_over} of {self._sampler.num_trials} trials over"
        raise Preempted(f"{done}, the others are saved; start the same command again to continue")

    # --- results ----------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Decide on each trial that is not over, in the order of the numbers: see pruners.py."""
        earlier = list[Progress]()
        for trial in self._record.trials:
            if not trial.is_over:
                self._judge_one(trial, earlier)
                if trial.is_over:
                    self._scores.pop(trial.number, None)  # not all of its evaluations count
            earlier.append(self._progress_of(trial))

    def _judge_one(self, trial: Trial, earlier: list[Progress]) -> None:
        reader = self._runs.reader(trial)
        if reader is None:
            return
        code = self._exit_codes.get(trial.number)
        found = reader.read(at_once=code is not None)
        self._show_evaluations(trial, found)
        scores = self._scores_of(found)
        is_final = bool(found) and found[-1].is_final
        decision = decide(self._options.pruner, Progress(scores, 0, False, is_final), earlier)
        num_known = min(len(scores), decision.num_decided + 1)
        self._scores[trial.number] = Progress(scores, num_known, False)
        if decision.is_pruned:
            self._prune(trial, found, decision)
        elif code is not None and decision.num_decided == len(scores):
            self._runs.end(trial, found, code)

    def _show_evaluations(self, trial: Trial, found: list[Evaluation]) -> None:
        """Print the evaluations of a trial that are new since it started. found: all of them."""
        num_shown = self._num_shown.get(trial.number, len(found))
        if len(found) <= num_shown or len(self._slots) > _MAX_SHOWN:
            return
        for one in found[num_shown:]:
            metric = self._options.metric
            say(f"trial {trial.name}: {metric} {one.value:.6g} after step {one.step}")
        self._num_shown[trial.number] = len(found)

    def _prune(self, trial: Trial, found: list[Evaluation], decision: Decision) -> None:
        for active in self._active:
            if active.trial is trial:
                active.process.stop()
        count = decision.num_decided
        message = f"stopped after evaluation {count} of step {found[count - 1].step}"
        self._runs.finish(trial, State.pruned, found[:count], message=message)

    def _progress_of(self, trial: Trial) -> Progress:
        if trial.number not in self._scores:
            scores = self._scores_of(trial.evaluations)
            self._scores[trial.number] = Progress(scores, len(scores), trial.is_over)
        return self._scores[trial.number]

    def _scores_of(self, evaluations: list[Evaluation]) -> list[float]:
        return [score(one.value, self._options.is_minimised) for one in evaluations]


def _values_text(trial: Trial) -> str:
    return " ".join(f"{key}={value}" for key, value in trial.values.items())
