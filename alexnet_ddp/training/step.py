"""One training step, and one exact evaluation, on sums over images. The place where the rooms meet below train.py."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_ddp.config import OnNan, Precision, TrainerConfig
from alexnet_ddp.data.effects import apply_effects
from alexnet_ddp.data.fill import Skipped
from alexnet_ddp.data.loader import Batch
from alexnet_ddp.data.sampler import micro_batches
from alexnet_ddp.model import set_dropout_keys
from alexnet_ddp.parallel import ParallelModel
from alexnet_ddp.runtime.distributed import World, any_rank, average, raise_together, sum_over_ranks
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.heartbeat import WAITING
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.training.ema import EMA
from alexnet_ddp.training.metrics import Meter, UserMetrics, correct_counts, evaluation_row
from alexnet_ddp.training.optim import apply_step, norms, set_lr
from alexnet_ddp.training.precision import autocast
from alexnet_ddp.training.stragglers import Stopwatch
from alexnet_ddp.training.vote import Health, StepOutcome, StepSnapshot, StepVote

_ROUNDS_BETWEEN_LOOKS = 8  # of an evaluation, between two looks at the stop signal


@dataclass
class TrainStep:
    """One optimizer step over a global batch, cut into slices for the ranks and micro-batches in time.

    The gradient is the mean over the images of the global batch, whatever the cuts. Nothing is applied before all ranks
    know that all is well.
    """

    parallel_model: ParallelModel
    optimizer: torch.optim.Optimizer
    cfg: TrainerConfig
    seed: int
    world: World
    image_size: int
    on_phase: Callable[[str], None] = lambda phase: (
        None
    )  # told what comes next: one of resilience.beacon.PHASES

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(
            self.world.device.type, enabled=self.cfg.precision is Precision.fp16
        )
        self.meter = Meter(self.world.device)
        self.bad: list[Skipped] = []  # images that this rank left out of the last step
        self.grad_norm: Tensor | None = None  # of the last step, before it was clipped
        self.ema: EMA | None = None
        self.stopwatch = Stopwatch(self.world)
        self._health = Health(self.world)
        self._model = self.parallel_model.model
        self._statistics = [b for b in self._model.buffers() if b.is_floating_point()]
        self._before = StepSnapshot([*self._model.buffers(), self.meter.local])
        self._bad = torch.zeros(
            (), device=self.world.device
        )  # 1 where the last step's gradient was not finite
        if (
            not self.scaler.is_enabled()
        ):  # which finds infinities itself. The fused kernels look at it: no rank waits
            self.optimizer.found_inf = self._bad
        self._blank = torch.zeros(1, 3, self.image_size, self.image_size, device=self.world.device)
        self.parallel_model.on_wait(self._waiting)
        with autocast(self.cfg.precision, self.world):
            self.parallel_model.warm_up_buckets(self._blank)

    def __call__(
        self, batches: Iterator[Batch], step: int, lr: float, num_images: int, vote: StepVote
    ) -> StepOutcome:
        """Collective. Step `step` (0-based) over this rank's `batches`, up to the one that says it is the last.

        num_images: of the global batch. Where a loss or a gradient is not finite, nothing of the step is applied. The
        outcome tells of a loss; of a gradient settle() tells, or the next step's outcome, of which then nothing is
        applied either, unless bad steps are skipped. If no image could be read (outcome.is_empty), nothing is applied.
        Raises DataError, or a vote's error; the weights stay as they were.
        """
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self._before.snapshot()
        outcome, error = self._gradients(batches, step, num_images, vote)
        if outcome.failed:
            raise_together(error, self.world)
        if outcome.diverged or (outcome.late and self.cfg.on_nan is not OnNan.skip):
            self._before.restore(torch.ones_like(self._bad))
            self._bad.zero_()
            return outcome
        if outcome.is_empty:
            self._bad.zero_()  # the outcome has reported the step before
            self.grad_norm = None
            return outcome
        self.on_phase("update")
        self._apply(num_images / outcome.num_images)
        self.on_phase(WAITING)
        average(self._statistics, self.world)
        self._before.restore(self._bad)
        return outcome

    def settle(self) -> bool:
        """Collective. True, once, where the last step's gradient was not finite. Waits for the device."""
        late = any_rank(bool(self._bad.item()), self.world)
        self._bad.zero_()
        return late

    def load(self, sums: dict[str, float], scaler: dict[str, float]) -> None:
        """Go on with the row and the loss scale of a checkpoint."""
        if sums:
            self.meter.load(sums)
        if scaler:
            self.scaler.load_state_dict(scaler)

    def extras(self) -> dict[str, float]:
        """What a row carries beside loss and accuracy. Waits for the device."""
        return {} if self.grad_norm is None else {"train/grad_norm": self.grad_norm.item()}

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Within a forward pass: what the other ranks need longer is not this one's time, nor its fault."""
        self.on_phase(WAITING)
        with self.stopwatch.paused():
            yield
        self.on_phase("forward")

    def _gradients(
        self, batches: Iterator[Batch], step: int, num_images: int, vote: StepVote
    ) -> tuple[StepOutcome, Exception | None]:
        """Leave the mean gradient in .grad, assuming that all `num_images` could be read."""
        scale = (
            self.world.world_size / num_images
        )  # DDP divides the sum over the ranks by world_size
        losses, seen, self.bad, is_last, has_data = (
            torch.zeros((), device=self.world.device),
            0,
            [],
            False,
            True,
        )
        passes = micro_batches(num_images, self.world.world_size, self.cfg.micro_batch_size)
        while not is_last:
            slots, batch = (
                passes.pop(0) if passes else 1,
                None,
            )  # a replay makes the passes of all ranks
            is_last = not passes
            self.on_phase("data")
            if has_data:  # without, this rank takes part in the passes that the others still make
                try:
                    with self.stopwatch.data():
                        batch = next(batches)
                    is_last = batch.work.is_last
                except DataError as error:
                    has_data, vote = False, replace(vote, error=error)
            self.on_phase("forward")
            with nullcontext() if is_last else self.parallel_model.no_sync():
                with self.stopwatch.forward():
                    loss = self._loss_sum(batch, step, slots)
                losses += loss.detach()
                if batch is not None:
                    seen, self.bad = seen + len(batch.labels), self.bad + batch.bad
                if is_last or self.parallel_model.is_split:
                    self.on_phase(WAITING)
                if is_last:
                    self._health.begin(losses, seen, vote, self._bad)
                self.scaler.scale(loss * scale).backward()
        self.parallel_model.finish_backward()
        return self._health.finish(), vote.error

    def _loss_sum(self, batch: Batch | None, step: int, slots: int) -> Tensor:
        """The loss summed over the batch's images; a zero that DDP can differentiate where there are none."""
        if batch is None or len(batch.labels) == 0:
            with autocast(self.cfg.precision, self.world):  # what the ranks exchange must be alike
                return self.parallel_model.nothing_to_learn(self._blank, slots)
        set_dropout_keys(self._model, self.seed, step, batch.indices)
        with autocast(self.cfg.precision, self.world):
            logits = self.parallel_model(apply_effects(batch.images, batch.effects), slots)
        loss = cross_entropy(logits.float(), batch, self.cfg.label_smoothing)
        self.meter.add(loss, logits, batch.labels)
        return loss

    def _apply(self, correction: float) -> None:
        """Update the weights, if the gradient is finite. `correction` is not 1 where bad images were skipped.

        The gradient's norm is the same on all ranks (see ParallelModel.global_norms): each decides alike.
        """
        self.scaler.unscale_(self.optimizer)
        self.parallel_model.agree_on_infinities(self.scaler, self.optimizer)
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        if correction != 1:
            torch._foreach_mul_([p.grad for p in parameters], correction)
        whole = self.parallel_model.global_norms(norms([p.grad for p in parameters]), parameters)
        self.grad_norm = torch.linalg.vector_norm(whole)
        if self.cfg.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip_grad_norm, self.grad_norm)
        if not self.scaler.is_enabled():
            self._bad.copy_(~torch.isfinite(self.grad_norm))
        apply_step(self.optimizer, self.scaler, self._bad)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(torch.isfinite(self.grad_norm))


def cross_entropy(logits: Tensor, batch: Batch, smoothing: float, reduction: str = "sum") -> Tensor:
    """Summed over the images, or "none"; of two labels an image, weighted by their shares, where images are mixed."""
    mixing = batch.effects.mixing
    if mixing is None:
        return F.cross_entropy(logits, batch.labels, reduction=reduction, label_smoothing=smoothing)
    own, other = (
        F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        for labels in (batch.labels, mixing.labels)
    )
    losses = torch.lerp(other, own, mixing.share)
    return losses.sum() if reduction == "sum" else losses


@dataclass(frozen=True)
class Evaluation:
    """Sums over all validation images, the same on every rank; `bad` are the images that this rank left out."""

    row: dict[str, float | int]
    per_class: Tensor  # int64 [num_classes, 3] on the CPU: images, correct at 1, correct at 5
    bad: list[Skipped]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    cfg: TrainerConfig,
    num_classes: int,
    world: World,
    stop: StopSignal,
) -> Evaluation | None:
    """Collective. Every image once, in the same batches for every world size. None if a stop was asked for.

    `batches` has the same length on all ranks; some may be empty. Raises DataError on all ranks.
    """
    model.eval()
    meter, error, bad = Meter(world.device), None, []
    extra = UserMetrics(cfg.metrics, world.device)
    per_class = torch.zeros(num_classes, 3, dtype=torch.int64, device=world.device)
    try:
        for k, batch in enumerate(batches):
            if k % _ROUNDS_BETWEEN_LOOKS == 0 and _must_leave(stop, None, world):
                return None
            bad += batch.bad
            if len(batch.labels):
                with autocast(cfg.precision, world):
                    logits = model(apply_effects(batch.images, batch.effects)).float()
                meter.add(
                    F.cross_entropy(logits, batch.labels, reduction="sum"), logits, batch.labels
                )
                extra.add(logits, batch.labels)
                per_class.index_add_(0, batch.labels, correct_counts(logits, batch.labels))
    except DataError as e:
        error = e
    if _must_leave(stop, error, world):
        return None
    model.train()
    sums = meter.read()
    if sums["images"] == 0:
        raise DataError(f"none of the validation images could be read{_such_as(bad)}")
    row = evaluation_row(sums) | extra.row(int(sums["images"]))
    return Evaluation(row, sum_over_ranks(per_class).cpu(), bad)


def _such_as(bad: list[Skipped]) -> str:
    return f", such as {bad[0].reason}" if bad else ""


def _must_leave(stop: StopSignal, error: DataError | None, world: World) -> bool:
    """Collective. True where a rank was asked to stop; raises where a rank has an error."""
    leave = any_rank(stop.received or error is not None, world)
    if leave:
        raise_together(error, world)
    return leave
