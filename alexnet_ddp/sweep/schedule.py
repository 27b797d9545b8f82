"""Which trial starts, ends or is stopped next."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.config import ConfigError, SweepConfig
from alexnet_ddp.config.space import Space
from alexnet_ddp.runtime.errors import Preempted
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.sweep.pruners import Decision, Progress, decide, score
from alexnet_ddp.sweep.record import Evaluation, State, SweepRecord, Trial
from alexnet_ddp.sweep.samplers import Draws
from alexnet_ddp.sweep.slots import Slot
from alexnet_ddp.sweep.trial import LOG, Evaluations, TrialProcess

_POLL_S = 0.2


@dataclass
class Active:
    """A trial whose process is running, and its devices."""

    trial: Trial
    process: TrialProcess
    slot: Slot


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
        self._options, self._space, self._record = cfg.sweep, space, record
        self._sampler, self._stop = sampler, stop
        self._free = list(slots)
        self._active: list[Active] = []
        self._exit_codes: dict[int, int] = {}  # of trials that ended and are not decided on
        self._readers: dict[int, Evaluations] = {}  # of trials that are not over
        self._scores: dict[int, Progress] = {}  # of trials that are over

    def run(self) -> None:
        """Return when all trials are over. Raises Preempted after a stop; the trials are saved."""
        while True:
            if self._stop.received:
                self._stop_all("stopped")
            self._collect()
            self._judge()
            self._fill()
            if not self._active and not any(self._unfinished()):
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
            self._free.append(active.slot)
            if active.trial.is_over:
                continue  # it was pruned
            if code == Preempted.exit_code:
                self._stop_all(f"trial {active.trial.name} was stopped from outside")
            self._exit_codes[active.trial.number] = code

    def _fill(self) -> None:
        """Start a trial in each free slot: first those that were interrupted, then new ones."""
        while self._free:
            busy = {active.trial.number for active in self._active} | self._exit_codes.keys()
            waiting = (one for one in self._unfinished() if one.number not in busy)
            trial = next(waiting, None) or self._draw()
            if trial is None:
                return
            self._start(trial)

    def _draw(self) -> Trial | None:
        trials = self._record.trials
        if len(trials) >= self._sampler.num_trials:
            return None
        trial = Trial(len(trials), self._sampler.draw(trials))
        trials.append(trial)
        self._record.write()  # before it starts: it is never drawn again
        return trial

    def _start(self, trial: Trial) -> None:
        if self._reader(trial) is None:
            return
        slot = self._free.pop(0)
        process = TrialProcess(self._run_dir(trial), self._overrides(trial), slot)
        self._active.append(Active(trial, process, slot))
        total = self._sampler.num_trials
        say(f"trial {trial.name} of {total} starts: {_values_text(trial)}")

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
            earlier.append(self._progress_of(trial))

    def _judge_one(self, trial: Trial, earlier: list[Progress]) -> None:
        reader = self._reader(trial)
        if reader is None:
            return
        code = self._exit_codes.get(trial.number)
        found = reader.read(at_once=code is not None)
        scores = self._scores_of(found)
        is_final = bool(found) and found[-1].is_final
        decision = decide(self._options.pruner, Progress(scores, 0, False, is_final), earlier)
        num_known = min(len(scores), decision.num_decided + 1)
        self._scores[trial.number] = Progress(scores, num_known, False)
        if decision.is_pruned:
            self._prune(trial, found, decision)
        elif code is not None and decision.num_decided == len(scores):
            self._end(trial, found, code)

    def _prune(self, trial: Trial, found: list[Evaluation], decision: Decision) -> None:
        for active in self._active:
            if active.trial is trial:
                active.process.stop()
        count = decision.num_decided
        message = f"stopped after evaluation {count} of step {found[count - 1].step}"
        self._finish(trial, State.pruned, found[:count], message=message)

    def _end(self, trial: Trial, found: list[Evaluation], code: int) -> None:
        if code == 0:
            self._finish(trial, State.complete, found, code)
            return
        message = self._run(trial).message or f"see {self._run_dir(trial) / LOG}"
        self._finish(trial, State.failed, found, code, message)

    def _finish(
        self,
        trial: Trial,
        state: State,
        evaluations: list[Evaluation],
        code: int | None = None,
        message: str = "",
    ) -> None:
        trial.state, trial.exit_code, trial.message = state, code, message
        trial.evaluations, trial.hours = evaluations, self._run(trial).hours
        self._exit_codes.pop(trial.number, None)
        self._readers.pop(trial.number, None)
        self._scores.pop(trial.number, None)
        self._record.write()
        best = trial.best(self._options.is_minimised)
        result = "" if best is None else f", {self._options.metric} {best.value:.6g}"
        failure = f" (exit code {code})" if state is State.failed else ""
        more = f": {message}" if message else ""
        say(redact(f"trial {trial.name} {state}{failure}{result}{more}"))

    def _progress_of(self, trial: Trial) -> Progress:
        if trial.number not in self._scores:
            scores = self._scores_of(trial.evaluations)
            self._scores[trial.number] = Progress(scores, len(scores), trial.is_over)
        return self._scores[trial.number]

    # --- one trial --------------------------------------------------------------------------------

    def _reader(self, trial: Trial) -> Evaluations | None:
        """What reads the evaluations of a trial. None, and the trial is over, if it is invalid."""
        if trial.number not in self._readers:
            try:
                cfg = cli.compose(self._overrides(trial))
            except ConfigError as error:
                self._finish(trial, State.failed, [], error.exit_code, str(error))
                return None
            reader = Evaluations(self._run_dir(trial), self._options.metric, cfg)
            self._readers[trial.number] = reader
        return self._readers[trial.number]

    def _unfinished(self) -> Iterator[Trial]:
        return (trial for trial in self._record.trials if not trial.is_over)

    def _scores_of(self, evaluations: list[Evaluation]) -> list[float]:
        return [score(one.value, self._options.is_minimised) for one in evaluations]

    def _run_dir(self, trial: Trial) -> Path:
        return self._record.directory / trial.name

    def _run(self, trial: Trial) -> RunRecord:
        return RunRecord(self._run_dir(trial), trial.name)

    def _overrides(self, trial: Trial) -> list[str]:
        place = [f"run.root={self._record.directory}", f"run.name={trial.name}"]
        return [*self._space.overrides(trial.values), *place]


def _values_text(trial: Trial) -> str:
    return " ".join(f"{key}={value}" for key, value in trial.values.items())
