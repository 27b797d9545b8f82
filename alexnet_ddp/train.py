"""Train an image classifier with DistributedDataParallel.

    torchrun --nproc_per_node=8 -m alexnet_ddp.train experiment=alexnet data.root=/data/imagenet

Read it top to bottom: config, world, data, budget, resume, model, parallel, optimizer, steps, evaluation.
"""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from alexnet_ddp import cli, distributed
from alexnet_ddp.checkpoint.find import load_weights
from alexnet_ddp.checkpoint.identity import identity
from alexnet_ddp.checkpoint.store import Checkpoints
from alexnet_ddp.config import AlexNet2012AugmentConfig, Config, OnNan
from alexnet_ddp.config.door import to_plain, to_yaml
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import Batch, build_loader
from alexnet_ddp.data.sampler import build_sampler, describe_batch, evaluation_work, index_hash, rank_slice
from alexnet_ddp.data.sets import open_data
from alexnet_ddp.distributed import World
from alexnet_ddp.engine import TrainStep, check_precision, evaluate
from alexnet_ddp.errors import Preempted, RunError, leave_start
from alexnet_ddp.metrics import Pace, train_row
from alexnet_ddp.model import build_model, check_image_size
from alexnet_ddp.optim import build_optimizer, load_state_by_name, state_by_name, state_to_come
from alexnet_ddp.parallel import build_parallel
from alexnet_ddp.replay import replay
from alexnet_ddp.resilience.deadline import Deadline
from alexnet_ddp.resilience.guard import Guard
from alexnet_ddp.resilience.health import Wish
from alexnet_ddp.resilience.lock import lock_run
from alexnet_ddp.resilience.replicas import Replicas
from alexnet_ddp.resilience.signals import StopSignal
from alexnet_ddp.resilience.stragglers import Stragglers
from alexnet_ddp.resilience.watchdog import Watchdog
from alexnet_ddp.schedule import Budget, build_lr_schedule
from alexnet_ddp.tracking import RunInfo, RunStatus, build_tracker, headline, make_run_dir, run_status

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here


def train(cfg: Config, overrides: list[str]) -> None:
    """Run, or go on with, the training that `cfg` describes."""
    if cfg.replay is not None:
        replay(cfg, overrides, Run)
        return
    stop = StopSignal()
    tf32 = cfg.trainer.tf32
    with distributed.session(cfg.device, tf32) as world, run_status(cfg.run_dir, world.is_main) as status:
        distributed.from_main(lambda: make_run_dir(cfg.run_dir), world)
        lock = distributed.on_all(lambda: lock_run(cfg.run_dir), world, takes_part=world.is_main)
        watchdog = Watchdog(cfg.trainer.hang_timeout_s, cfg.run_dir, world, cfg.trainer.compile)
        with lock or nullcontext(), watchdog:
            run = Run(cfg, world, status, stop, watchdog)
            if run.is_complete:
                log.info("run %s is complete after %d steps: %s", cfg.run.name, run.state.step, cfg.run_dir)
            else:
                run.prepare(overrides)
                with run.tracker, closing(run.checkpoints):
                    run.go()
                run.train_loader.close()
                run.val_loader.close()


class Run:
    """One rank's part of a training. `state.step` is the only clock: everything else derives from it."""

    def __init__(
        self,
        cfg: Config,
        world: World,
        status: RunStatus,
        stop: StopSignal,
        watchdog: Watchdog,
        up_to: int | None = None,
    ) -> None:
        self.cfg, self.world, self.status, self.stop, self.watchdog = cfg, world, status, stop, watchdog
        check_precision(cfg.trainer.precision, world)
        self.data = distributed.first_on_node(lambda: open_data(cfg.data, may_make=True), world)
        self.sampler = build_sampler(cfg, self.data.train)
        self.budget = Budget.plan(cfg.trainer, self.sampler.steps_per_epoch, cfg.checkpoint.save_every_steps)
        windows = self.sampler.windows.fingerprint() if self.sampler.windows else None
        who = identity(cfg, self.data.train.fingerprint(), windows)
        if isinstance(cfg.augment, AlexNet2012AugmentConfig):
            basis = self.data.colour_basis
            who["augment.colour_basis"] = basis and [part.tolist() for part in basis]
        shape = {"evaluation": self.data.val.fingerprint(), "budget": str(self.budget)}
        shape |= {name: getattr(cfg.trainer, name) for name in ("eval_batch_size", "on_nan", "check_every_steps")}
        distributed.require_same(who | shape, world)
        self.checkpoints = Checkpoints(cfg.run_dir, cfg.checkpoint, who, world, self.sampler.steps_per_epoch)
        self.state, self.saved = self.checkpoints.resume(cfg.run.name, cfg.resume.allow_changes, up_to)
        status.running(self.state.step)

    @property
    def is_complete(self) -> bool:
        return self.budget.is_end(self.state.step) and self.state.evaluated_at == self.state.step

    def build(self) -> None:
        """What a step needs, from the configuration or from the checkpoint."""
        cfg, world, data, saved = self.cfg, self.world, self.data, self.saved
        start = replace(cfg.model, weights=None) if saved else cfg.model  # a checkpoint has all the weights
        num_classes, size = len(data.train.classes), cfg.data.image_size
        self.model = distributed.on_all(lambda: build_model(start, num_classes, size, cfg.seed), world)
        check_image_size(self.model, num_classes, cfg.data.train_image_size(0), "data.start_image_size")
        if saved:
            load_weights(self.model, saved.pop("model"), f"the checkpoint of {cfg.run.name}")
        self.model.to(world.device, memory_format=torch.channels_last)
        if cfg.trainer.compile:
            torch.compiler.config.recompile_limit = 64  # a few a size, where images grow; past 8 it would go eager
            self.model.compile()
        ddp_model = build_parallel(cfg.parallel, self.model, world)
        self.optimizer = build_optimizer(cfg.optimizer, self.model)
        load_state_by_name(self.optimizer, self.model, saved.pop("optimizer", {}))
        self.lr = build_lr_schedule(cfg.scheduler, cfg.optimizer.lr, self.budget)
        self.train_step = TrainStep(ddp_model, self.optimizer, cfg.trainer, cfg.seed, world, cfg.data.image_size)
        self.train_step.on_phase = self.watchdog.phase
        self.train_step.load(self.state.sums, self.state.scaler)

        augment = build_augment(cfg.augment, cfg.seed, cfg.data.image_size, cfg.data.eval_resize, data.colour_basis)
        self.train_loader = build_loader(cfg.data, data.train, augment, world.num_cores, world.device, True)
        self.val_loader = build_loader(cfg.data, data.val, None, world.num_cores, world.device)
        self.batches = self._batches()

    def prepare(self, overrides: list[str]) -> None:
        """What a step needs, and what a run needs beside: its record, its guards, its clocks."""
        self.build()
        cfg, world, data = self.cfg, self.world, self.data
        state = state_by_name(self.optimizer, self.model) or state_to_come(cfg.optimizer, self.model)
        self.checkpoints.prepare({"model": self.model.state_dict(), "optimizer": state})
        facts = {"world_size": world.world_size, "overrides": overrides, "start_step": self.state.step}
        classes = {"ids": data.train.classes, "names": data.class_names}
        budget, step = self.budget, self.state.step
        info = RunInfo(cfg.run.name, world.is_main, step, budget.total_steps, budget.steps_per_epoch, to_plain(cfg))
        self.tracker = build_tracker(cfg.logger, cfg.run_dir, info)
        self.tracker.record(to_yaml(cfg), facts, classes)
        self.tracker.say(self._headline())

        Deadline(self.stop, lambda: self.checkpoints.longest_write_s).watch(world.is_main)
        batch = partial(describe_batch, self.sampler, data.train)
        self.guard = Guard(cfg.trainer, self.state.bad_steps, batch, cfg.run_dir / "replay.json", world)
        self.replicas, self.stragglers = Replicas(cfg.trainer.check_every_steps, world), Stragglers(world)
        self.pace, self.saved_at = Pace(), time.monotonic()
        self.stopping = self.save_due = self.row_due = False
        self.failure: RunError | None = None  # of rank 0's checkpoints, until all ranks know

    def go(self) -> None:
        """Steps, and what is due between two of them, until the last one or a stop."""
        leave_start(self.state.step)
        while True:
            self.replicas.check(self.state.step, self._tensors)
            eval_due = self.budget.eval_due(self.state.step) and self.state.evaluated_at != self.state.step
            if (self.row_due or eval_due or self.save_due or self.stopping) and self.train_step.settle():
                self.leave_behind(self.state.step - 1)
            if self.row_due:
                self.log_row()
            if eval_due:
                self._pausing(self.evaluate)
            if self.save_due or self.stopping:
                self._pausing(self.save)
            if self.stopping:
                self.stop.ignore()
                done = f"stopped at step {self.state.step} of {self.budget.total_steps} and saved"
                raise Preempted(f"{done}; start the same command again to go on")
            if self.budget.is_end(self.state.step):
                return
            self.advance()

    def advance(self) -> None:
        """One optimizer step."""
        step = self.state.step
        batch, world = self.sampler.batch(step), self.world
        num_images = len(batch)
        self.watchdog.begin_step(step, batch[rank_slice(num_images, world.rank, world.world_size)][:16].tolist())
        minutes = self.cfg.checkpoint.save_every_minutes
        wants_save = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        wish = Wish(self.stop.received, wants_save, self.failure)
        verdict = self.train_step(self.batches, step, self.lr(step), num_images, wish)
        self.state.step = step + 1
        self.failure = self.checkpoints.poll() or self.failure
        self.stopping = verdict.stop
        self.guard.watch(step, verdict.loss)
        for bad in verdict.bad_steps(step):
            self.leave_behind(bad)
        self.save_due = verdict.save or self.budget.save_due(self.state.step)
        if self.state.step == step + 1:  # else back behind the step before: this one was not applied, and comes again
            self.row_due = self.budget.log_due(self.state.step)
            self.pace.add(num_images, verdict.num_images)
            self.tracker.advance(self.state.step)

    def leave_behind(self, step: int) -> None:
        """Collective. Step `step` was bad and was not applied: end, go on, or go back, as trainer.on_nan says."""
        error = self.guard.bad(step)
        if error is not None:
            self.state.step, self.stopping = step, True
            self.save()
            raise error
        if self.cfg.trainer.on_nan is OnNan.rollback:
            to, tensors = self.checkpoints.newest()
            self.guard.rolled_back(step, to)
            load_weights(self.model, tensors["model"], f"the checkpoint of step {to}")
            load_state_by_name(self.optimizer, self.model, tensors["optimizer"])
            self.state.step = step + 1
            self.batches = self._batches()

    def log_row(self) -> None:
        """Collective. The one place that waits for the device."""
        row = train_row(self.train_step.meter.read()) | {"train/lr": self.lr(self.state.step - 1)}
        self.train_step.meter.reset()
        self.row_due = False
        steps, pace = self.pace.steps, self.pace.row(self.train_loader.waited_s)
        row |= self.train_step.extras() | pace | self.guard.row() | self.checkpoints.row()
        row |= self.stragglers.row(self.train_step.stopwatch.read(), steps, pace["time/step_s"] * steps)
        self._log(row)

    def evaluate(self) -> None:
        """Collective. Where a stop was asked for, the evaluation is left and made anew when the run goes on."""
        cfg, world = self.cfg.trainer, self.world
        works = evaluation_work(len(self.data.val), cfg.eval_batch_size, world.rank, world.world_size)
        num_classes = len(self.data.train.classes)
        batches = self.watchdog.evaluating(self.val_loader.batches(works))
        result = evaluate(self.model, batches, cfg, num_classes, world, self.stop)
        if result is None:
            self.stopping = True
            return
        self.state.note_evaluation(result.row["val/top1"])
        self.save_due = True
        self._log(result.row)

    def save(self) -> None:
        """Collective. A last checkpoint that fails ends the run; one on the way is a warning, at first."""
        self.watchdog.phase("checkpoint")
        self.state.sums, self.state.scaler = self.train_step.meter.read(), self.train_step.scaler.state_dict()
        is_last = self.stopping or self.budget.is_end(self.state.step)
        self.failure = self.checkpoints.save(self.state, self._tensors(), is_last)
        if is_last:
            distributed.raise_together(self.failure, self.world)
        self.save_due, self.saved_at = False, time.monotonic()
        self.status.running(self.state.step)

    def _batches(self) -> Generator[Batch]:
        steps, world = range(self.state.step, self.budget.total_steps), self.world
        works = self.sampler.work(steps, world.rank, world.world_size, self.cfg.trainer.micro_batch_size)
        return self.train_loader.batches(works)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.model.state_dict(), "optimizer": state_by_name(self.optimizer, self.model)}

    def _log(self, row: dict[str, float | int | str]) -> None:
        """Write a row, with a hash that names the images of the last step."""
        images = {"data/index_hash": index_hash(self.sampler.batch(self.state.step - 1))}
        self.tracker.log(self.state.step, self.budget.epoch(self.state.step), row | images)

    def _pausing(self, action: Callable[[], None]) -> None:
        """Keep what is no training out of images/s."""
        began = time.monotonic()
        self.watchdog.pause()
        action()
        self.pace.pause(time.monotonic() - began)

    def _headline(self) -> str:
        data, budget, parameters = self.data, self.budget, sum(p.numel() for p in self.model.parameters())
        counts = (len(data.train), len(data.val), len(data.class_names))
        progress = f"step {self.state.step} of {budget.total_steps} ({budget.steps_per_epoch} an epoch)"
        return headline(self.cfg, self.world, parameters, counts, progress)


if __name__ == "__main__":
    cli.run("train", train)
