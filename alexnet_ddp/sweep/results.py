"""The runs of a sweep's trials: their command lines, what they have recorded, how they ended."""

from collections.abc import Callable, Iterator
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.config import Config, ConfigError
from alexnet_ddp.config.space import Space
from alexnet_ddp.config.sweep import SweepConfig
from alexnet_ddp.runtime.accuracy import interval_text
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.runtime.sweep_record import Evaluation, State, SweepRecord, Trial
from alexnet_ddp.sweep.trial import LOG, Evaluations


class TrialRuns:
    """Reads the runs of trials, and records and prints how each of them ended.

    check: raises ConfigError for a trial that the sweep cannot train.
    """

    def __init__(
        self,
        cfg: SweepConfig,
        space: Space,
        record: SweepRecord,
        check: Callable[[Config], None] | None = None,
    ) -> None:
        self._space, self._record, self._check = space, record, check
        self._has_report = cfg.logger.report
        self._readers: dict[int, Evaluations] = {}  # of trials that are not over

    @property
    def unfinished(self) -> Iterator[Trial]:
        return (trial for trial in self._record.trials if not trial.is_over)

    def directory(self, trial: Trial) -> Path:
        return self._record.directory / trial.name

    def record_of(self, trial: Trial) -> RunRecord:
        return RunRecord(self.directory(trial), trial.name)

    def overrides(self, trial: Trial) -> list[str]:
        """The command line of the trial's training."""
        given = [f"run.root={self._record.directory}", f"run.name={trial.name}"]
        if self._has_report:
            given.append(
                "logger.report=false"
            )  # the page of the sweep has the curves of all trials
        return [*self._space.overrides(trial.values), *given]

    def reader(self, trial: Trial) -> Evaluations | None:
        """What reads the evaluations of a trial. None, and the trial is over, if it is invalid."""
        if trial.number not in self._readers:
            try:
                cfg = cli.compose(self.overrides(trial))
                if self._check is not None:
                    self._check(cfg)
            except ConfigError as error:
                self.finish(trial, State.failed, [], error.exit_code, str(error))
                return None
            reader = Evaluations(self.directory(trial), self._record.metric, cfg)
            self._readers[trial.number] = reader
        return self._readers[trial.number]

    def end(self, trial: Trial, found: list[Evaluation], code: int) -> None:
        """Record that the run of a trial has ended with an exit code."""
        if code == 0:
            self.finish(trial, State.complete, found, code)
            return
        message = self.record_of(trial).message or f"see {self.directory(trial) / LOG}"
        self.finish(trial, State.failed, found, code, message)

    def finish(
        self,
        trial: Trial,
        state: State,
        evaluations: list[Evaluation],
        code: int | None = None,
        message: str = "",
    ) -> None:
        """Record that a trial is over. evaluations: those that count."""
        trial.state, trial.exit_code, trial.message = state, code, message
        trial.evaluations, trial.hours = evaluations, self.record_of(trial).hours
        self._readers.pop(trial.number, None)
        self._record.write()
        best = trial.best(self._record.is_minimised)
        result = "" if best is None else f", {self._record.metric} {best.value:.6g}"
        if best is not None and best.interval is not None:
            result += f" (95 % interval {interval_text(best.interval)})"
        failure = f" (exit code {code})" if state is State.failed else ""
        more = f": {message}" if message else ""
        say(redact(f"trial {trial.name} {state}{failure}{result}{more}"))
