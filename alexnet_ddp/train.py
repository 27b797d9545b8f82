"""Train an image classifier with DistributedDataParallel.

    torchrun --nproc_per_node=8 -m alexnet_ddp.train experiment=alexnet data.root=/data/imagenet

Read it top to bottom, and training.py beside it: config, world, data, budget, resume, model, parallel, optimizer there,
steps and evaluation here.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from alexnet_ddp.runtime import startup

    startup.begin("train")

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial

from alexnet_ddp import cli
from alexnet_ddp.checkpoint.store import RunState
from alexnet_ddp.config import Config, OnNan
from alexnet_ddp.config.door import to_plain, to_yaml
from alexnet_ddp.data.fill import Skipped
from alexnet_ddp.data.quarantine import Quarantine
from alexnet_ddp.data.sampler import describe_batch, evaluation_work, index_hash, rank_slice
from alexnet_ddp.plugins import Callbacks
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.deadline import Deadline
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import (
    DataError,
    PeerFailed,
    Preempted,
    RunError,
    was_asked_to_stop,
    write_start_step,
)
from alexnet_ddp.runtime.heartbeat import WAITING
from alexnet_ddp.runtime.lock import lock_run
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.startup import before_exit
from alexnet_ddp.runtime.watchdog import Watchdog
from alexnet_ddp.tracking import (
    RunInfo,
    RunStatus,
    build_tracker,
    headline,
    make_run_dir,
    run_status,
)
from alexnet_ddp.training.build import Training
from alexnet_ddp.training.faults import Guard
from alexnet_ddp.training.metrics import Throughput, train_row
from alexnet_ddp.training.replicas import Replicas
from alexnet_ddp.training.schedule import count_warmup_steps
from alexnet_ddp.training.step import evaluate
from alexnet_ddp.training.stragglers import Stragglers
from alexnet_ddp.training.vote import StepVote

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here


def train(cfg: Config, overrides: list[str]) -> None:
    """Run, or go on with, the training that `cfg` describes."""
    tf32 = cfg.trainer.tf32
    with (
        distributed.session(cfg.device, tf32) as world,
        run_status(cfg.run_dir, world.is_main) as status,
    ):
        distributed.from_main(lambda: make_run_dir(cfg.run_dir), world)
        lock = distributed.on_all(lambda: lock_run(cfg.run_dir), world, takes_part=world.is_main)
        watchdog = Watchdog(cfg.trainer.hang_timeout_s, cfg.run_dir, world, cfg.trainer.compile)
        with lock or nullcontext(), watchdog, before_exit(lambda: watchdog.phase("end")):
            training = Training(cfg, world)
            status.running(training.state.step)
            if training.is_complete:
                log.info(
                    "run %s is complete after %d steps: %s",
                    cfg.run.name,
                    training.state.step,
                    cfg.run_dir,
                )
                return
            training.build()
            stop = StopSignal()  # until here a stop signal ends the process at once
            run = Run(cfg, training, world, status, stop)
            with lost_peers_explained(stop, training.state):
                run.prepare(watchdog, overrides)
                with run.tracker, closing(training.checkpoints):
                    try:
                        run.go()
                    finally:
                        watchdog.phase("checkpoint")
            training.close()


@contextmanager
def lost_peers_explained(stop: StopSignal, state: RunState) -> Iterator[None]:
    """A rank that ends at a stop signal before its first step is not lost: others may have got the signal later."""
    start = state.step
    try:
        yield
    except Exception as error:
        is_first = state.step == start and was_asked_to_stop()
        if stop.received and is_first and distributed.lost_peer(error) is not None:
            raise Preempted(
                "stopped while it started; nothing is lost: start the same command again"
            ) from error
        raise


class Run:
    """A training that goes on to its end: steps, and what is due between two of them."""

    def __init__(
        self, cfg: Config, training: Training, world: World, status: RunStatus, stop: StopSignal
    ) -> None:
        self.cfg, self.training, self.world, self.status, self.stop = (
            cfg,
            training,
            world,
            status,
            stop,
        )
        self.state, self.budget, self.checkpoints = (
            training.state,
            training.budget,
            training.checkpoints,
        )

    def prepare(self, watchdog: Watchdog, overrides: list[str]) -> None:
        """Its record, its guards, its clocks."""
        cfg, world, data = self.cfg, self.world, self.training.data
        self.watchdog, self.training.train_step.on_phase = watchdog, watchdog.phase
        self.checkpoints.prepare(self.training.tensors())
        facts = {
            "world_size": world.world_size,
            "overrides": overrides,
            "start_step": self.state.step,
        }
        classes = {"ids": data.train.classes, "names": data.class_names}
        budget, step = self.budget, self.state.step
        info = RunInfo(
            cfg.run.name,
            world.is_main,
            step,
            budget.total_steps,
            budget.steps_per_epoch,
            to_plain(cfg),
        )
        self.tracker = build_tracker(cfg.logger, cfg.run_dir, info)
        self.tracker.record(to_yaml(cfg), facts, classes)
        self.tracker.say(self._headline())

        Deadline(self.stop, lambda: self.checkpoints.longest_write_s).watch(world.is_main)
        batch = partial(describe_batch, self.training.sampler, data.train)
        self.guard = Guard(
            cfg.trainer, self.state.bad_steps, batch, cfg.run_dir / "replay.json", world
        )
        self.replicas, self.stragglers = (
            Replicas(cfg.trainer.check_every_steps, world),
            Stragglers(world),
        )
        sets = {"train": data.train, "val": data.val}
        self.quarantine = Quarantine(
            cfg.run_dir, sets, cfg.data.max_bad_images or 0, self.state.step, world
        )
        self.throughput, self.saved_at = Throughput(), time.monotonic()
        self.stopping = self.save_due = self.row_due = False
        self.callbacks = Callbacks(cfg.trainer.callbacks, cfg.run_dir, world.is_main)
        self.failure: RunError | None = None  # of rank 0's checkpoints, until all ranks know

    def go(self) -> None:
        """Steps, and what is due between two of them, until the last one or a stop."""
        write_start_step(self.state.step)
        while True:
            self.replicas.check(self.state.step, self.training.tensors)
            eval_due = (
                self.budget.eval_due(self.state.step) and self.state.evaluated_at != self.state.step
            )
            if (
                self.row_due or eval_due or self.save_due or self.stopping
            ) and self.training.train_step.settle():
                self.leave_behind(self.state.step - 1)
            if self.row_due:
                self.log_row()
            if eval_due:
                self._pausing(self.evaluate_or_save)
            if self.save_due or self.stopping:
                self._pausing(self.save)
            self.callbacks.on_checkpoint(self.checkpoints.last_saved)
            if self.stopping:
                self.stop.ignore()
                done = f"stopped at step {self.state.step} of {self.budget.total_steps} and saved"
                raise Preempted(f"{done}; start the same command again to go on")
            if self.budget.is_end(self.state.step):
                self.callbacks.on_run_end()
                return
            self.advance()

    def advance(self) -> None:
        """One optimizer step."""
        step = self.state.step
        batch, world = self.training.sampler.batch(step), self.world
        num_images = len(batch)
        self.watchdog.begin_step(
            step, batch[rank_slice(num_images, world.rank, world.world_size)][:16].tolist()
        )
        minutes = self.cfg.checkpoint.save_every_minutes
        wants_save = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        vote = StepVote(self.stop.received, wants_save, self.failure)
        outcome = self.training.train_step(
            self.training.batches, step, self.training.lr(step), num_images, vote
        )
        self.state.step = step + 1
        self.failure = self.checkpoints.poll() or self.failure
        self.stopping = outcome.stop
        self.guard.watch(step, outcome.loss)
        for bad in outcome.bad_steps(step):
            self.leave_behind(bad)
        self.save_due = outcome.save or self.budget.save_due(self.state.step)
        if not self.meet(
            self.needs_equal_ranks(self.state.step)
        ):  # a stop, or a save by time, waits until the ranks do
            self.stopping = self.save_due = False
        if outcome.num_images < num_images:
            self._set_aside("train", self.training.train_step.bad)
        if outcome.is_empty and self.state.step == step + 1:
            self.skip_empty(step)
        if (
            self.state.step == step + 1
        ):  # else back behind the step before: this one was not applied, and comes again
            self.row_due = self.budget.log_due(self.state.step)
            self.throughput.add(num_images, outcome.num_images)
            self.tracker.advance(self.state.step)
            row = {"train/loss": outcome.loss, "train/lr": self.training.lr(step)}
            self.callbacks.on_step_end(self.state.step, row)

    def needs_equal_ranks(self, step: int) -> bool:
        """By its configuration, whoever interrupts it: it compares, evaluates, saves or ends after `step` steps."""
        budget = self.budget
        return (
            self.replicas.due(step)
            or budget.eval_due(step)
            or budget.save_due(step)
            or budget.is_end(step)
        )

    def meet(self, planned: bool) -> bool:
        """Collective. See Training.meet."""
        return self.training.meet(planned, partial(self.watchdog.phase, WAITING))

    def leave_behind(self, step: int) -> None:
        """Collective. Step `step` was bad and was not applied: end, go on, or go back, as trainer.on_nan says."""
        error = self.guard.bad(step)
        if error is not None:
            self.meet(planned=True)
            self.state.step, self.stopping = step, True
            self.save()
            raise error
        if self.cfg.trainer.on_nan is OnNan.rollback:
            self.watchdog.phase("checkpoint")
            self.watchdog.pause()
            self.guard.rolled_back(step, self.training.roll_back(step + 1))

    def skip_empty(self, step: int) -> None:
        """No rank could read an image of step `step`. Raises DataError if that is true of a whole epoch, or of all."""
        budget, limit = self.budget, None
        if self.state.step % budget.steps_per_epoch == 0:
            limit = budget.steps_per_epoch
        elif budget.is_end(self.state.step):
            limit = budget.total_steps
        error = self.guard.empty(step, limit)
        if error is not None:
            raise error

    def log_row(self) -> None:
        """Collective. The one place that waits for the device."""
        row = train_row(self.training.train_step.meter.read()) | {
            "train/lr": self.training.lr(self.state.step - 1)
        }
        self.training.train_step.meter.reset()
        self.row_due = False
        steps, pace = (
            self.throughput.steps,
            self.throughput.row(self.training.train_loader.waited_s),
        )
        row |= self.training.train_step.extras() | pace | self.guard.row() | self.checkpoints.row()
        row |= self.stragglers.row(
            self.training.train_step.stopwatch.read(), steps, pace["time/step_s"] * steps
        )
        self._log(row)

    def evaluate_or_save(self) -> None:
        """Collective. If the evaluation fails because of bad data, save the training before the run ends."""
        try:
            self.evaluate()
        except (DataError, PeerFailed):  # evaluate() raises on all ranks together
            self.stopping = True  # waits until the checkpoint is complete
            self.save()
            raise

    def evaluate(self) -> None:
        """Collective. Where a stop was asked for, the evaluation is left and made anew when the run goes on."""
        cfg, world = self.cfg.trainer, self.world
        works = evaluation_work(
            len(self.training.data.val), cfg.eval_batch_size, world.rank, world.world_size
        )
        num_classes = len(self.training.data.train.classes)
        batches = self.watchdog.evaluating(self.training.val_loader.batches(works))
        with self.training.as_evaluated() as model:
            result = evaluate(model, batches, cfg, num_classes, world, self.stop)
        if result is None:
            self.stopping = True
            return
        num_bad = len(self.training.data.val) - result.row["val/num_images"]
        if num_bad:
            self._set_aside("val", result.bad)
        self.state.note_evaluation(result.row["val/top1"])
        self.save_due = True
        self.callbacks.on_evaluation(self.state.step, result.row)
        self._log(result.row | ({"val/num_bad_images": num_bad} if num_bad else {}))

    def save(self) -> None:
        """Collective. A last checkpoint that fails ends the run; one on the way is a warning, at first."""
        self.watchdog.phase(WAITING)
        self.state.sums = self.training.train_step.meter.read()
        self.state.scaler = self.training.train_step.scaler.state_dict()
        self.watchdog.phase("checkpoint")
        is_last = self.stopping or self.budget.is_end(self.state.step)
        self.failure = (
            self.checkpoints.save(self.state, self.training.tensors(), is_last) or self.failure
        )
        if (
            is_last or self.state.best.get("step") == self.state.step
        ):  # these wait for the disk: so do all, here
            if (
                self.world.is_main
            ):  # its own wait is over: a rank that is lost is missed as in a step
                self.watchdog.phase(WAITING)
            distributed.raise_together(self.failure if is_last else None, self.world)
        self.save_due, self.saved_at = False, time.monotonic()
        self.status.running(self.state.step)

    def _set_aside(self, split: str, bad: list[Skipped]) -> None:
        """Collective. The images that this rank left out."""
        self.quarantine.note(split, bad, self.state.step, self.budget.epoch(self.state.step))

    def _log(self, row: dict[str, float | int | str]) -> None:
        """Write a row, with a hash that names the images of the last step."""
        images = {"data/index_hash": index_hash(self.training.sampler.batch(self.state.step - 1))}
        self.tracker.log(self.state.step, self.budget.epoch(self.state.step), row | images)

    def _pausing(self, action: Callable[[], None]) -> None:
        """Keep what is no training out of images/s."""
        began = time.monotonic()
        self.watchdog.pause()
        action()
        self.throughput.pause(time.monotonic() - began)

    def _headline(self) -> str:
        data, budget = self.training.data, self.budget
        parameters = self.training.parallel_model.num_parameters
        counts = (len(data.train), len(data.val), len(data.class_names))
        progress = (
            f"step {self.state.step} of {budget.total_steps} ({budget.steps_per_epoch} an epoch)"
        )
        warmup_steps = count_warmup_steps(self.cfg.scheduler, budget)
        return headline(self.cfg, self.world, parameters, counts, warmup_steps, progress)


if __name__ == "__main__":
    cli.run("train", train)
