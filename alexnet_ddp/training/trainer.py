"""The training loop: steps, and what is due between two steps.

Read `train`, then `Trainer.run`. A step is in step.py; what the run is made of is in setup.py and
parts.py.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from alexnet_ddp.checkpoint.manager import RunState
from alexnet_ddp.config import Config, OnNan
from alexnet_ddp.config.compose import to_plain, to_yaml
from alexnet_ddp.config.schema import choices_of
from alexnet_ddp.data.quarantine import Quarantine
from alexnet_ddp.data.sampler import describe_batch, evaluation_batches, index_hash, rank_slice
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.plugins import Callbacks
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.deadline import Deadline
from alexnet_ddp.runtime.errors import (
    Preempted,
    RunError,
    StoppedByService,
    is_rank_zero,
    was_asked_to_stop,
    write_start_step,
)
from alexnet_ddp.runtime.files import lock_run
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.startup import before_exit
from alexnet_ddp.runtime.watchdog import WAITING, Watchdog
from alexnet_ddp.tracking import (
    RunInfo,
    RunStatus,
    Tracker,
    best_text,
    build_tracker,
    check_wandb,
    headline,
    make_run_dir,
    run_status,
)
from alexnet_ddp.tracking.report_process import write_report
from alexnet_ddp.training.efficiency import EnergyMeter
from alexnet_ddp.training.evaluation import evaluate
from alexnet_ddp.training.faults import Guard
from alexnet_ddp.training.first_batch import write_first_batch
from alexnet_ddp.training.histograms import histograms
from alexnet_ddp.training.last_evaluation import LastEvaluation
from alexnet_ddp.training.metrics import Throughput, train_row
from alexnet_ddp.training.parts import TrainingParts, build_train_loader
from alexnet_ddp.training.profiler import StepProfiler
from alexnet_ddp.training.replicas import Replicas
from alexnet_ddp.training.schedule import count_warmup_steps
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.step import StepOutcome, StepStatus, TrainStep
from alexnet_ddp.training.stragglers import Stragglers
from alexnet_ddp.training.vote import StepVote

log = logging.getLogger(__name__)


def train(cfg: Config, overrides: list[str]) -> None:
    """Train the run that `cfg` describes, or resume it. overrides: recorded with the run.

    With logger.report, rank 0 then writes the report of the complete run.
    """
    check_wandb(cfg.logger)
    is_trained = _train(cfg, overrides)
    if is_trained and cfg.logger.report and is_rank_zero():
        write_report(cfg.run_dir, cfg.plugins)


def _train(cfg: Config, overrides: list[str]) -> bool:
    """False if the run was complete already."""
    with (
        distributed.session(cfg.device, cfg.trainer.tf32) as world,
        run_status(cfg.run_dir, world.is_main) as status,
    ):
        distributed.from_main(lambda: make_run_dir(cfg.run_dir), world)
        lock = distributed.on_all(lambda: lock_run(cfg.run_dir), world, takes_part=world.is_main)
        timeout_s = cfg.trainer.hang_timeout_s
        watchdog = Watchdog(timeout_s, cfg.run_dir, world, cfg.trainer.compile)
        with lock or nullcontext(), watchdog, before_exit(lambda: watchdog.phase("end")):
            setup = RunSetup(cfg, world)
            status.running(setup.state.step)
            if setup.is_complete:
                done = setup.state.step
                again = "choose another run.name for a new training"
                log.info(
                    "run %s is complete after %d steps: %s; %s",
                    *(cfg.run.name, done, cfg.run_dir, again),
                )
                return False
            parts = TrainingParts(setup, on_phase=watchdog.phase)
            watchdog.phase("start")
            stop = StopSignal()  # until here a stop signal ends the process at once
            with _lost_peers_explained(stop, setup.state):
                trainer = Trainer(setup, parts, overrides, watchdog, status, stop)
                with trainer.tracker, closing(setup.checkpoints), closing(trainer.profiler):
                    try:
                        trainer.run()
                    finally:
                        watchdog.phase("checkpoint")
            parts.close()
    return True


@contextmanager
def _lost_peers_explained(stop: StopSignal, state: RunState) -> Iterator[None]:
    """Raise Preempted if a peer is lost in the first step after a stop signal.

    That peer received the signal a moment earlier and ended before its first step.
    """
    start = state.step
    try:
        yield
    except Exception as error:
        is_first = state.step == start and was_asked_to_stop()
        if stop.received and is_first and distributed.lost_peer(error) is not None:
            message = "stopped while it started; nothing is lost: start the same command again"
            raise Preempted(message) from error
        raise


@dataclass(frozen=True)
class Due:
    """What is due after a step. The same on all ranks."""

    log: bool = False
    evaluate: bool = False
    save: bool = False
    stop: bool = False
    unfreeze: bool = False
    histograms: bool = False


class Trainer:
    """Runs the steps of a run to its end, or to a stop. Collective: every public method.

    overrides: recorded in run.json. watchdog: gets every phase. status: the run's
    status.json. stop: set by a signal or by Slurm's time limit.
    """

    def __init__(
        self,
        setup: RunSetup,
        parts: TrainingParts,
        overrides: list[str],
        watchdog: Watchdog,
        status: RunStatus,
        stop: StopSignal,
    ) -> None:
        cfg, world, data, state = setup.cfg, setup.world, setup.data, setup.state
        self.setup = setup
        self.cfg, self.world, self.data, self.state = cfg, world, data, state
        self.parts = parts
        self.sampler, self.budget, self.lr = setup.sampler, setup.budget, setup.lr
        self.checkpoints, self.watchdog = setup.checkpoints, watchdog
        self.status, self.stop = status, stop
        self.profiler = self._build_profiler()
        self.checkpoints.prepare(parts.state_dict())
        names, run_dir = cfg.trainer.callbacks, cfg.run_dir
        self.callbacks = distributed.on_all(lambda: Callbacks(names, run_dir, world.is_main), world)
        self.tracker = self._build_tracker(overrides)
        if world.is_main and state.step == 0:
            self._show_first_batch(setup)
        Deadline(stop, lambda: self.checkpoints.longest_write_s).watch(world.is_main)
        batch = partial(describe_batch, self.sampler, data.train)
        self.guard = Guard(cfg.trainer, state.bad_steps, batch, cfg.run_dir / "replay.json", world)
        self.replicas = Replicas(cfg.trainer.check_every_steps, world)
        self.stragglers = Stragglers(world)
        sets = {"train": data.train, "val": data.val}
        max_bad = cfg.data.max_bad_images or 0
        self.quarantine = Quarantine(cfg.run_dir, sets, max_bad, state.step, world)
        self.throughput = Throughput()
        self.energy = EnergyMeter(world)
        self.batches = parts.batches(state.step)
        self.outcome: StepOutcome | None = None  # of the last step
        self.saved_at = time.monotonic()
        self.began_at = self.saved_at - state.trained_s  # as if all starts had been one
        self.save_error: RunError | None = None  # rank 0's, until the next vote shares it

    def run(self) -> None:
        """Train until the last step. Raises Preempted after a stop, RunError if the run fails."""
        write_start_step(self.state.step)
        due = Due(evaluate=self._evaluation_is_due())  # one that a stop interrupted
        while True:
            self._perform(due)
            if self.setup.is_over:
                self._explain_end()
                self.callbacks.on_run_end()
                return
            due = self.advance()

    def advance(self) -> Due:
        """Train one step and handle its faults. Return what is due after it."""
        step = self.state.step
        indices = self.sampler.batch(step)
        mine = rank_slice(len(indices), self.world.rank, self.world.world_size)
        self.watchdog.begin_step(step, (indices[mine][:16] % len(self.data.train)).tolist())
        with self.profiler.step(step):
            outcome = self.train_step(self.batches, step, self.lr(step), len(indices), self._vote())
        self.state.step, self.outcome = step + 1, outcome
        self.state.trained_s = outcome.votes.trained_s
        self.save_error = self.checkpoints.poll() or self.save_error
        self.guard.watch(step, outcome.votes.loss)
        for nonfinite in outcome.votes.nonfinite_steps(step):
            self._handle_nonfinite(nonfinite)
        is_retried = self.state.step != step + 1  # _handle_nonfinite moved the clock back
        due = self._due(outcome, is_retried)
        if outcome.votes.num_images < len(indices):
            self._quarantine("train", outcome.skipped_images)
        if not is_retried:
            if outcome.votes.is_empty:
                self._handle_empty(step)
            self.throughput.add(len(indices), outcome.votes.num_images)
            self.tracker.advance(self.state.step)
        if outcome.status is StepStatus.applied:
            row = {"train/loss": outcome.votes.loss, "train/lr": self.lr(step)}
            self.callbacks.on_step_end(self.state.step, row)
        return due

    @property
    def train_step(self) -> TrainStep:
        """The step of the current phase: see TrainingParts.unfreeze."""
        return self.parts.train_step

    def _vote(self) -> StepVote:
        """What this rank requests at the coming step."""
        minutes = self.cfg.checkpoint.save_every_minutes
        now = time.monotonic()
        save = minutes is not None and now - self.saved_at > 60 * minutes
        trained_s = now - self.began_at if self.world.is_main else 0.0
        return StepVote(self.stop.received, save, self.save_error, trained_s)

    def _due(self, outcome: StepOutcome, is_retried: bool) -> Due:
        """Collective. What is due now. A save and a stop wait until the replicas are equal."""
        step, budget, is_over = self.state.step, self.budget, self.setup.is_over
        due = Due(
            log=(budget.log_due(step) or is_over) and not is_retried,
            evaluate=self._evaluation_is_due(),
            save=outcome.votes.save or budget.save_due(step),
            stop=outcome.votes.stop,
            unfreeze=self.parts.unfreeze_due(step) and not budget.is_end(step),
            histograms=self._histograms_are_due(outcome),
        )
        planned = self.replicas.due(step) or budget.eval_due(step) or budget.save_due(step)
        if self._sync_replicas(planned or is_over):
            return due
        return replace(due, save=False, stop=False)

    def _perform(self, due: Due) -> None:
        """Everything between two steps, in one order on all ranks."""
        self.replicas.check(self.state.step, self.parts.replica_tensors)
        if due.histograms:
            with self._not_training():
                found = histograms(self.parts.parallel_model, self.world)
                self.tracker.histograms(self.state.step, found)
        if due != Due() and self.train_step.poll_nonfinite():
            self._handle_nonfinite(self.state.step - 1)
        if due.log:
            self._log_row()
        if self.profiler.is_due(self.state.step):
            with self._not_training():
                self.profiler.write()
        if due.evaluate:
            with self._not_training():
                due = self._evaluate(due)
        if due.save or due.stop:
            with self._not_training():
                self._save(is_last=due.stop)
        self.callbacks.on_checkpoint(self.checkpoints.last_saved)
        if due.stop:
            self.stop.ignore()
            raise self._stopped()
        if due.unfreeze:
            self.watchdog.phase("start")  # it may compile
            with self._not_training():
                self.parts.unfreeze()

    def _stopped(self) -> RunError:
        """Collective. The error that a stop ends the run with."""
        done = f"stopped at step {self.state.step} of {self.budget.total_steps} and saved"
        again = "start the same command again to resume"
        if distributed.any_rank(self.stop.for_good, self.world):
            return StoppedByService(f"{done}, as wandb asked; {again}")
        return Preempted(f"{done}; {again}")

    def _evaluation_is_due(self) -> bool:
        step = self.state.step
        is_due = self.budget.eval_due(step) or (self.setup.is_over and step > 0)
        return is_due and self.state.evaluated_at != step

    def _histograms_are_due(self, outcome: StepOutcome) -> bool:
        every = self.cfg.logger.histograms_every_steps
        is_step = every is not None and self.state.step % every == 0
        return is_step and outcome.status is StepStatus.applied

    def _explain_end(self) -> None:
        """Print the best evaluation, and first that the run ends early, if it does."""
        state, total = self.state, self.budget.total_steps
        if not self.budget.is_end(state.step):
            hours = f"{state.trained_s / 3600:.3g} hours of training"
            log.info("the run ends after step %d of %d, after %s", state.step, total, hours)
        best = best_text(state.best)
        if best:
            self.tracker.say(best)

    def _sync_replicas(self, planned: bool) -> bool:
        """Collective. True if the ranks are equal. See TrainingParts.sync_replicas."""
        progress = partial(self.watchdog.phase, WAITING)
        return self.parts.sync_replicas(self.state.step, planned, progress)

    # --- faults -----------------------------------------------------------------------------------

    def _handle_nonfinite(self, step: int) -> None:
        """Collective. Step `step` was not finite and not applied: end, skip it, or roll back.

        This is the only place that moves the clock back.
        """
        error = self.guard.bad(step)
        if error is not None:
            self._sync_replicas(planned=True)
            self.state.step = step
            self._save(is_last=True)
            raise error
        if self.cfg.trainer.on_nan is OnNan.rollback:
            self.watchdog.phase("checkpoint")
            self.watchdog.pause()
            self.state.step = step + 1
            checkpoint_step = self.parts.roll_back(self.state.step)
            self.batches = self.parts.batches(self.state.step)
            self.guard.rolled_back(step, checkpoint_step)

    def _handle_empty(self, step: int) -> None:
        """No rank could read an image of step `step`.

        Raises DataError if that holds for a whole epoch, or for the whole run.
        """
        budget, limit = self.budget, None
        if self.state.step % budget.steps_per_epoch == 0:
            limit = budget.steps_per_epoch
        elif budget.is_end(self.state.step):
            limit = budget.total_steps
        error = self.guard.empty(step, limit)
        if error is not None:
            raise error

    def _quarantine(self, split: str, skipped: list[Skipped]) -> None:
        """Collective. Record the images that this rank could not read."""
        step = self.state.step
        self.quarantine.note(split, skipped, step, self.budget.epoch(step))

    # --- rows, evaluations, checkpoints -----------------------------------------------------------

    @property
    def _epoch(self) -> int:
        """The epoch (0-based) of the last step."""
        return max(0, self.state.step - 1) // self.budget.steps_per_epoch

    def _log_row(self) -> None:
        """Collective. Write a row of training metrics. Waits for the device."""
        meter, stopwatch = self.train_step.meter, self.train_step.stopwatch
        row = train_row(meter.read()) | {"train/lr": self.lr(self.state.step - 1)}
        meter.reset()
        if self.outcome is not None and self.outcome.grad_norm is not None:
            row |= {"train/grad_norm": self.outcome.grad_norm.item()}
        steps = self.throughput.steps
        throughput = self.throughput.row(self.parts.train_loader.waited_s)
        images_per_s = throughput["train/images_per_sec"]
        seconds = throughput["time/step_s"] * steps
        row |= throughput | self.guard.row() | self.checkpoints.row()
        row |= self.stragglers.row(stopwatch.read(), steps, seconds)
        row |= self.parts.model_flops.row(images_per_s, self._epoch)
        row |= self.energy.row(images_per_s * seconds)
        self._log(row)

    def _evaluate(self, due: Due) -> Due:
        """Collective. Evaluate and log. Return `due` with what follows from it: a save, or a stop.

        If bad data or a metric ends the evaluation, the training is saved first.
        """
        began = time.monotonic()
        cfg, world = self.cfg.trainer, self.world
        work = evaluation_batches(
            len(self.data.val), cfg.eval_batch_size, world.rank, world.world_size
        )
        batches = self.watchdog.evaluating(self.parts.val_loader.batches(work))
        num_classes = len(self.data.train.classes)
        details = self._details()
        observe = details.add if details else None
        try:
            with self.parts.evaluation_model() as model:
                result = evaluate(
                    model, batches, cfg, num_classes, world, self.stop, observe=observe
                )
            if result is None:  # stopped: it is repeated when the run resumes
                return replace(due, stop=True)
            num_bad = len(self.data.val) - int(result.row["val/num_images"])
            if num_bad:
                self._quarantine("val", result.skipped)
        except RunError:  # raised on all ranks together
            self._save(is_last=True)
            raise
        row = result.row
        self.state.note_evaluation(row, self.cfg.checkpoint.best)
        self.callbacks.on_evaluation(self.state.step, result.row)
        if details and self.setup.is_over:
            details.show(self.tracker, self.state.step, result.per_class)
        seconds = time.monotonic() - began
        self.stragglers.pause("evaluation", seconds)
        found = {"val/num_bad_images": num_bad} if num_bad else {}
        self._log(result.row | found | {"time/evaluation_s": seconds})
        return replace(due, save=True)

    def _details(self) -> LastEvaluation | None:
        """Collective. What collects classes and images of an evaluation that may be the last."""
        may_be_last = self.setup.is_over or self.cfg.trainer.patience is not None
        if may_be_last and distributed.any_rank(self.tracker.shows_classes, self.world):
            return LastEvaluation(self.cfg.data, self.data, self.world)
        return None

    def _save(self, is_last: bool) -> None:
        """Collective. Save a checkpoint. If the last one fails, the run ends; see checkpoint/."""
        began = time.monotonic()
        is_last = is_last or self.setup.is_over
        self.watchdog.phase(WAITING)
        self.state.sums = self.train_step.meter.read()
        self.state.scaler = self.train_step.scaler.state_dict()
        self.watchdog.phase("checkpoint")
        tensors = self.parts.state_dict()
        self.save_error = self.checkpoints.save(self.state, tensors, is_last) or self.save_error
        if is_last or self.state.best.get("step") == self.state.step:
            # Rank 0 waits for the disk in these saves, so all ranks wait here. When rank 0 has
            # finished writing, the normal step timeout applies to the others again.
            if self.world.is_main:
                self.watchdog.phase(WAITING)
            distributed.raise_together(self.save_error if is_last else None, self.world)
        self.saved_at = time.monotonic()
        self.status.saved(self.state.step, self.saved_at - began)
        self.stragglers.pause("checkpoint", self.saved_at - began)
        self.watchdog.phase(WAITING)
        self.stragglers.write(self.cfg.run_dir / "rank_times.json", self.throughput.steps)
        self.watchdog.phase("checkpoint")  # callbacks may follow

    def _log(self, row: Mapping[str, float | str]) -> None:
        """Write a row, with a hash that identifies the images of the last step."""
        images = index_hash(self.sampler.batch(self.state.step - 1))
        metrics = {**row, "data/index_hash": images}
        self.tracker.log(self.state.step, self.budget.epoch(self.state.step), metrics)

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Keep the time of an evaluation or a checkpoint out of images/s and of step times."""
        began = time.monotonic()
        self.watchdog.pause()
        self.energy.pause()
        yield
        self.energy.resume()
        self.throughput.pause(time.monotonic() - began)

    def _show_first_batch(self, setup: RunSetup) -> None:
        with closing(build_train_loader(setup)) as loader:
            names = self.data.class_names
            picture = write_first_batch(self.cfg.run_dir, loader, self.sampler, names)
        if picture is not None:
            self.tracker.image("batch", picture)

    def _build_profiler(self) -> StepProfiler:
        """The profiler. Raises ConfigError if its steps or ranks do not exist."""
        steps, ranks = self.cfg.trainer.profiled_steps, self.cfg.trainer.profile_ranks
        start, total = self.state.step, self.budget.total_steps
        return StepProfiler(steps, ranks, start, total, self.cfg.run_dir / "profile", self.world)

    def _build_tracker(self, overrides: list[str]) -> Tracker:
        """Collective. The tracker, after it got the run's configuration, facts and headline."""
        cfg, world, data = self.cfg, self.world, self.data
        budget, step = self.budget, self.state.step
        total, per_epoch = budget.total_steps, budget.steps_per_epoch
        info = RunInfo(
            world.is_main,
            step,
            total,
            per_epoch,
            to_plain(cfg),
            to_yaml(cfg),
            {"world_size": world.world_size, "num_parameters": self.parts.num_parameters},
        )
        stop = self.stop
        tracker = build_tracker(
            cfg.logger, cfg.run_dir, info, stop.stop_for_good, stop.is_from_outside
        )
        # So that other commands use these numbers, whatever data they read.
        found = [f"data.mean={cfg.data.mean}", f"data.std={cfg.data.std}"]
        recorded = overrides if data.normalisation is None else [*overrides, *found]
        facts = {"world_size": world.world_size, "overrides": recorded, "start_step": step}
        num_nodes = sum(distributed.all_gather_objects([world.local_rank == 0]))
        facts |= {"local_world_size": world.local_world_size, "num_nodes": num_nodes}
        facts |= {"choices": choices_of(cfg), **self.parts.model_flops.facts}
        tracker.record(to_yaml(cfg), facts, {"ids": data.train.classes, "names": data.class_names})
        tracker.say(
            headline(
                cfg,
                world,
                self.parts.num_parameters,
                (len(data.train), len(data.val), len(data.class_names)),
                count_warmup_steps(cfg.scheduler, budget),
                f"step {step} of {total} ({per_epoch} an epoch)",
            )
        )
        return tracker
