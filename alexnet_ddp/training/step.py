"""One optimizer step over a global batch: fetch, forward, vote, backward, agree, clip, apply."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_ddp.config import OnNan, Precision, TrainerConfig
from alexnet_ddp.data.loader import Batch
from alexnet_ddp.data.sampler import micro_batch_sizes
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.model import set_dropout_keys
from alexnet_ddp.parallel import ParallelModel
from alexnet_ddp.runtime.distributed import World, any_rank, average, raise_together
from alexnet_ddp.runtime.errors import RunError
from alexnet_ddp.runtime.watchdog import WAITING
from alexnet_ddp.training.adalora import RankAllocation
from alexnet_ddp.training.ema import EMA
from alexnet_ddp.training.loss import CrossEntropy
from alexnet_ddp.training.metrics import Meter
from alexnet_ddp.training.optim import apply_step, norms, reads_found_inf, set_lr
from alexnet_ddp.training.precision import autocast
from alexnet_ddp.training.stragglers import Stopwatch
from alexnet_ddp.training.vote import StepSnapshot, StepVote, VoteExchange, VoteResult


class StepStatus(Enum):
    """What the ranks did with a step."""

    # The update was started. The device cancels it if the gradient is not finite, which the host
    # learns from the next vote, or from poll_nonfinite().
    applied = "applied"
    skipped = "skipped"  # its loss is not finite, or no image could be read
    retry = "retry"  # the previous step's gradient was not finite, and trainer.on_nan decides


@dataclass(frozen=True)
class StepOutcome:
    """The result of one step. All but `skipped_images` is the same on every rank."""

    status: StepStatus
    votes: VoteResult
    skipped_images: list[Skipped]  # images that this rank could not read
    grad_norm: Tensor | None  # scalar on the device, before clipping; None unless applied


class TrainStep:
    """Runs optimizer steps. Each rank computes its slice of the global batch, in micro-batches.

    The gradient is the mean over the images of the global batch, however they are divided. No rank
    applies anything before all ranks know that the step is valid.

    input_shape: of one image, at the largest size that the run uses, or of one image's features.
    class_weights: float32 [classes] on the device; the mean is then weighted, over the global
    batch. allocation: for finetune.method=adalora. stopwatch: of an earlier TrainStep of this run,
    which continues. on_phase: called with the next phase, one of
    runtime.watchdog.PHASES.
    """

    def __init__(
        self,
        parallel_model: ParallelModel,
        optimizer: torch.optim.Optimizer,
        cfg: TrainerConfig,
        seed: int,
        world: World,
        input_shape: tuple[int, ...],
        *,
        ema: EMA | None = None,
        class_weights: Tensor | None = None,
        allocation: RankAllocation | None = None,
        stopwatch: Stopwatch | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.parallel_model, self.optimizer = parallel_model, optimizer
        self.cfg, self.seed, self.world = cfg, seed, world
        self.ema, self.allocation, self._on_phase = ema, allocation, on_phase
        self.loss = CrossEntropy(cfg.label_smoothing, class_weights)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=cfg.precision is Precision.fp16
        )
        self.meter, self.stopwatch = Meter(world.device), stopwatch or Stopwatch(world)
        self._model = parallel_model.model
        self._statistics = [
            buffer
            for module in self._model.modules()
            if module.training  # a frozen BatchNorm keeps its statistics: they are not sent
            for buffer in module.buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        self._before = StepSnapshot([*self._model.buffers(), self.meter.local])
        self._exchange = VoteExchange(world)
        self._nonfinite = torch.zeros(
            (), device=world.device
        )  # 1 if the last gradient was not finite
        if not self.scaler.is_enabled() and reads_found_inf(optimizer):
            # Fused kernels read it on the device: no host wait. torch's GradScaler sets it, too.
            optimizer.found_inf = self._nonfinite  # type: ignore[attr-defined]
        self._blank = torch.zeros(1, *input_shape, device=world.device)
        with autocast(cfg.precision, world):
            last = parallel_model.warm_up_buckets(self._blank)
        parallel_model.on_wait(self._waiting, self.stopwatch.exchange)
        # Not a method of `self`: the hook would keep the parallel model.
        last.register_post_accumulate_grad_hook(self.stopwatch.gradients_ready)

    def __call__(
        self, batches: Iterator[Batch], step: int, lr: float, num_images: int, vote: StepVote
    ) -> StepOutcome:
        """Collective. Train step `step` (0-based) on the next micro-batches of `batches`.

        num_images: size of the global batch. A non-finite loss is reported in this step's outcome.
        A non-finite gradient is detected on the device and reported one step late: by
        poll_nonfinite() or by the next call, which is then not applied either unless
        trainer.on_nan=skip. Raises the error of the data or of a vote on all ranks; weights stay.
        """
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self._before.snapshot()
        votes, skipped_images, error = self._accumulate(batches, step, num_images, vote)
        if votes.failed:
            raise_together(error, self.world)
        status = self._status(votes)
        if votes.nonfinite_loss or status is StepStatus.retry:
            self._before.restore(torch.ones_like(self._nonfinite))
        if status is not StepStatus.applied:
            self._nonfinite.zero_()  # this vote has reported the previous step
            return StepOutcome(status, votes, skipped_images, None)
        self._on_phase("update")
        with self.stopwatch.update():
            grad_norm = self._apply(step, num_images / votes.weight)
        self._on_phase(WAITING)
        with self.stopwatch.exchange():
            average(self._statistics, self.world)
        self._before.restore(self._nonfinite)
        return StepOutcome(status, votes, skipped_images, grad_norm)

    def poll_nonfinite(self) -> bool:
        """Collective. True, once, if the last gradient was not finite. Waits for the device."""
        nonfinite = any_rank(bool(self._nonfinite.item()), self.world)
        self._nonfinite.zero_()
        return nonfinite

    def load_state_dict(self, sums: dict[str, float], scaler: dict[str, Any]) -> None:
        """Restore the sums of the row that was being collected, and the loss scale."""
        if sums:
            self.meter.load(sums)
        if scaler:
            self.scaler.load_state_dict(scaler)

    def _status(self, votes: VoteResult) -> StepStatus:
        if votes.nonfinite_previous and self.cfg.on_nan is not OnNan.skip:
            return StepStatus.retry
        if votes.nonfinite_loss or votes.is_empty:
            return StepStatus.skipped
        return StepStatus.applied

    def _accumulate(
        self, batches: Iterator[Batch], step: int, num_images: int, vote: StepVote
    ) -> tuple[VoteResult, list[Skipped], RunError | None]:
        """Fetch, forward, vote, backward: leave the mean gradient over `num_images` in .grad."""
        scale = self.world.world_size / num_images  # DDP divides the sum over ranks by world_size
        loss_sum, num_read = torch.zeros((), device=self.world.device), 0
        weights: list[Tensor] = []  # of the images that were read, summed by pass
        skipped_images: list[Skipped] = []
        passes = micro_batch_sizes(num_images, self.world.world_size, self.cfg.micro_batch_size)
        is_last, has_data = False, True
        while not is_last:
            max_images = passes.pop(0) if passes else 1  # a replay makes the passes of all ranks
            is_last, batch = not passes, None  # a batch that is fetched knows better
            self._on_phase("data")
            if has_data:
                try:
                    with self.stopwatch.data():
                        batch = next(batches)
                    is_last = batch.micro_batch.is_last
                except RunError as error:
                    # This rank still takes part in the passes that the other ranks make.
                    has_data, vote = False, replace(vote, error=error)
            self._on_phase("forward")
            with nullcontext() if is_last else self.parallel_model.no_sync():
                with self.stopwatch.forward():
                    loss = self._loss_sum(batch, step, max_images)
                loss_sum += loss.detach()
                if batch is not None:
                    num_read += len(batch.labels)
                    if self.loss.is_weighted:
                        weights.append(self.loss.weight(batch))
                    skipped_images += batch.bad
                if is_last or self.parallel_model.is_split:
                    self._on_phase(WAITING)
                if is_last:
                    weight = torch.stack(weights).sum() if weights else None
                    self._exchange.start(loss_sum, num_read, vote, self._nonfinite, weight)
                with self.stopwatch.backward():
                    self.scaler.scale(self.objective(loss, batch) * scale).backward()
        with self.stopwatch.exchange():
            self.parallel_model.finish_backward()
            votes = self._exchange.finish()
        return votes, skipped_images, vote.error

    def _loss_sum(self, batch: Batch | None, step: int, max_images: int) -> Tensor:
        """The loss summed over the images; a zero with a gradient of zeros if there are none."""
        if batch is None or len(batch.labels) == 0:
            with autocast(self.cfg.precision, self.world):  # ranks must exchange equal dtypes
                return self.parallel_model.zero_loss(self._blank, max_images)
        set_dropout_keys(self._model, self.seed, step, batch.indices)
        with autocast(self.cfg.precision, self.world):
            logits = self.parallel_model(batch.inputs(), max_images)
        loss = self.loss(logits.float(), batch)
        weight = self.loss.weight(batch) if self.loss.is_weighted else None
        self.meter.add(loss, logits, batch.labels, weight)
        return loss

    def objective(self, loss: Tensor, batch: Batch | None) -> Tensor:
        """The loss summed over the images of `batch`, with AdaLoRA's penalty for each of them.

        The mean over the global batch is then the mean loss plus the penalty, on any number of
        ranks. loss: of the images, without the penalty.
        """
        if self.allocation is None or batch is None or len(batch.labels) == 0:
            return loss
        weight = self.loss.weight(batch) if self.loss.is_weighted else len(batch.labels)
        return loss + weight * self.allocation.penalty()

    def _apply(self, step: int, correction: float) -> Tensor:
        """Agree, clip, apply. Return the gradient's norm; if it is not finite, nothing is applied.

        correction: planned images / sum of the weights of those that were read, which is their
        number without class weights. Gradients were scaled by the first.
        The norm is the same on all ranks (see ParallelModel.global_norms), so they decide alike.
        """
        self.scaler.unscale_(self.optimizer)
        self.parallel_model.sync_found_inf(self.scaler, self.optimizer)
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if correction != 1:
            torch._foreach_mul_(gradients, correction)
        local_norms = norms(gradients)
        global_norms = self.parallel_model.global_norms(local_norms, parameters)
        grad_norm = torch.linalg.vector_norm(global_norms)
        if self.cfg.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip_grad_norm, grad_norm)
        if not self.scaler.is_enabled():
            self._nonfinite.copy_(~torch.isfinite(grad_norm))
        apply_step(self.optimizer, self.scaler, self._nonfinite)
        self.scaler.update()
        if self.allocation is not None and bool(torch.isfinite(grad_norm)):  # waits for the device
            self.allocation.update(step)
        if self.ema is not None:
            self.ema.update(torch.isfinite(grad_norm))
        return grad_norm

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Within a forward pass, while it waits for slower ranks."""
        self._on_phase(WAITING)
        yield
        self._on_phase("forward")
