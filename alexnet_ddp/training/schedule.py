"""All arithmetic about time: images -> steps -> learning rate. Pure Python, no torch.

`step` is the only clock of a run. Everything here is a function of it, so that resuming a run means
restoring one integer.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from alexnet_ddp.config import (
    ConstantConfig,
    CosineConfig,
    PolyConfig,
    SchedulerConfig,
    StepDecayConfig,
    TrainerConfig,
)

_WARMUP_SHARE = 0.05  # of all epochs, if scheduler.warmup_epochs is null


@dataclass(frozen=True)
class Budget:
    """How long a run is, and when something is due. `step` counts the steps that are done."""

    steps_per_epoch: int
    total_steps: int  # the run ends after this many
    planned_steps: int  # of all epochs; the learning rate follows it, whatever trainer.max_steps is
    eval_every_steps: int
    log_every_steps: int
    save_every_steps: int | None = None  # in addition to the ends of the epochs

    @classmethod
    def plan(
        cls, cfg: TrainerConfig, steps_per_epoch: int, save_every_steps: int | None = None
    ) -> "Budget":
        """Return the budget of a run of `steps_per_epoch` steps an epoch."""
        planned = cfg.epochs * steps_per_epoch
        return cls(
            steps_per_epoch,
            total_steps=min(planned, cfg.max_steps or planned),
            planned_steps=planned,
            eval_every_steps=cfg.eval_every_steps or cfg.eval_every_epochs * steps_per_epoch,
            log_every_steps=cfg.log_every_steps,
            save_every_steps=save_every_steps,
        )

    def epoch(self, step: int) -> float:
        """Epochs that are done after `step` steps."""
        return step / self.steps_per_epoch

    def is_end(self, step: int) -> bool:
        return step >= self.total_steps

    def eval_due(self, step: int) -> bool:
        return step > 0 and (step % self.eval_every_steps == 0 or self.is_end(step))

    def log_due(self, step: int) -> bool:
        return step % self.log_every_steps == 0 or self.is_end(step)

    def save_due(self, step: int) -> bool:
        every = self.save_every_steps
        return (
            step % self.steps_per_epoch == 0
            or self.is_end(step)
            or (every is not None and step % every == 0)
        )


def build_lr_schedule(
    cfg: SchedulerConfig, base_lr: float, budget: Budget
) -> Callable[[int], float]:
    """Return lr(step) for step in [0, budget.planned_steps).

    Warm-up rises linearly and reaches `base_lr` at its last step.
    """
    warmup_steps = count_warmup_steps(cfg, budget)
    decay = _decay(cfg, warmup_steps, budget)

    def lr(step: int) -> float:
        if step < warmup_steps:
            return base_lr * (step + 1) / warmup_steps
        return base_lr * decay(step)

    return lr


def count_warmup_steps(cfg: SchedulerConfig, budget: Budget) -> int:
    """Return the steps of the linear warm-up: as configured, or a fixed share of all epochs."""
    if cfg.warmup_epochs is None:
        return cfg.warmup_steps or round(_WARMUP_SHARE * budget.planned_steps)
    return cfg.warmup_steps or round(cfg.warmup_epochs * budget.steps_per_epoch)


def _decay(cfg: SchedulerConfig, warmup_steps: int, budget: Budget) -> Callable[[int], float]:
    span = max(1, budget.planned_steps - warmup_steps)
    match cfg:
        case ConstantConfig():
            return lambda step: 1.0
        case StepDecayConfig():
            milestones = [round(e * budget.steps_per_epoch) for e in cfg.milestones_epochs]
            return lambda step: cfg.gamma ** bisect_right(milestones, step)
        case CosineConfig():
            low = cfg.min_lr_ratio
            return lambda step: (
                low + (1 - low) * (1 + math.cos(math.pi * (step - warmup_steps) / span)) / 2
            )
        case PolyConfig():
            return lambda step: (1 - (step - warmup_steps) / span) ** cfg.power
    raise TypeError(f"no learning-rate schedule for {type(cfg).__name__}")
