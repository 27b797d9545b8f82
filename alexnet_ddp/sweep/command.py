"""Train once for each of several values of options, and compare the trials.

alexnet-ddp sweep optimizer.lr=0.01,0.1 'trainer.label_smoothing=interval(0,0.2)' [sweep.name=X ...]
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.space import Space, read_space
from alexnet_ddp.config.sweep import Sampler, SweepConfig
from alexnet_ddp.runtime.environment import read_ranks
from alexnet_ddp.runtime.errors import MachineError, TrialsFailed
from alexnet_ddp.runtime.files import lock_file
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.sweep_record import State, SweepRecord, Trial, is_sweep
from alexnet_ddp.sweep.array import LINES, train_in_array
from alexnet_ddp.sweep.record import open_record
from alexnet_ddp.sweep.samplers import Draws, build_sampler
from alexnet_ddp.sweep.schedule import Schedule
from alexnet_ddp.sweep.slots import Slot, check_promotion, divide
from alexnet_ddp.sweep.table import show_results

log = logging.getLogger(__name__)

_LOCK = ".lock"


def main(cfg: SweepConfig, overrides: list[str]) -> None:
    """Run the sweep that `overrides` describe, or continue it. cfg: of its first combination.

    Raises ConfigError, Preempted after a stop, MachineError if the disk fails, and TrialsFailed if
    no trial has a result.
    """
    if read_ranks(os.environ).world_size > 1:
        rule = "a sweep starts the processes of its trials itself"
        raise ConfigError(f"{rule}; start it without torchrun, with NPROC=2 for 2 ranks a trial")
    space = read_space(overrides)
    sampler = build_sampler(cfg, space)
    slots = [] if cfg.sweep.sbatch is not None else _slots(cfg)
    directory = Path(cfg.run.root) / cfg.sweep_name
    if cfg.sweep.sampler is Sampler.grid:
        _check_grid(sampler, space)
    try:
        with _locked(directory):
            record = open_record(directory, cfg, space)
            _announce(record, sampler, cfg.sweep.parallel)
            if slots:
                Schedule(cfg, space, record, sampler, slots, StopSignal()).run()
            else:
                train_in_array(cfg, space, record, sampler)
            show_results(record, space)
            if cfg.logger.report and all(trial.is_over for trial in record.trials):
                _write_report(record, cfg)
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise MachineError(
            f"{directory} {rule}; free some space, then start the same command again"
        ) from error
    failed = [trial for trial in record.trials if trial.state is State.failed]
    if len(failed) == len(record.trials):
        first = failed[0]
        raise TrialsFailed(
            first.exit_code or 1,
            f"all {len(failed)} trials failed; trial {first.name}: {first.message}",
        )


def _slots(cfg: SweepConfig) -> list[Slot]:
    slots = divide(cfg.sweep.parallel, cfg.device, os.environ)
    if cfg.sweep.promote:
        check_promotion(cfg, slots[0], os.environ)
    return slots


def _write_report(record: SweepRecord, cfg: SweepConfig) -> None:
    from alexnet_ddp.tracking.report_process import write_report  # the package imports torch

    write_report(record.directory, cfg.plugins)


def _check_grid(sampler: Draws, space: Space) -> None:
    """Raise ConfigError if a combination is no valid configuration. No trial has started."""
    for values in _points(sampler):
        try:
            cli.compose(space.overrides(values))
        except ConfigError as error:
            point = " ".join(f"{key}={value}" for key, value in values.items())
            raise ConfigError(f"{error} (with {point})") from error


def _points(sampler: Draws) -> Iterator[dict[str, str]]:
    earlier = list[Trial]()
    for number in range(sampler.num_trials):
        values = sampler.draw(earlier)
        earlier.append(Trial(number, values))
        yield values


def _announce(record: SweepRecord, sampler: Draws, num_slots: int) -> None:
    num_over = sum(trial.is_over for trial in record.trials)
    known = f", {num_over} of them over" if record.trials else ""
    at_once = f", {num_slots} at the same time" if num_slots > 1 else ""
    say(f"sweep {record.directory}: {sampler.num_trials} trials{at_once}{known}")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of the sweep. Raises ConfigError if another process holds it.

    If the block raises ConfigError and has recorded no sweep, a new directory is removed.
    """
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / _LOCK).open("a")
    except OSError as error:
        rule = f"cannot be written to ({error.strerror}); choose another"
        raise ConfigError(f"run.root ({directory.parent}) {rule}") from error
    with file:
        try:
            is_mine = lock_file(file)
        except OSError as error:
            is_mine = True
            rule = "do not start the same sweep twice"
            log.warning("%s cannot be locked (%s): %s", directory, error.strerror, rule)
        if not is_mine:
            rule = "is run by another process"
            raise ConfigError(
                f"sweep.name ({directory.name}) {rule}; wait for it, end it, or give another name"
            )
        try:
            yield
        except ConfigError:
            if is_new and not is_sweep(directory):
                with suppress(OSError):  # NFS keeps a file that is open
                    for name in (_LOCK, LINES):
                        (directory / name).unlink(missing_ok=True)
                    directory.rmdir()
            raise
