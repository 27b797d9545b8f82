"""Decides about faulty steps: counts them, records them for a replay, and ends the run if it must.

All ranks decide from the same facts, so they decide alike. Rank 0 writes the record.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

from alexnet_ddp.config import OnNan, TrainerConfig
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import DataError, Diverged
from alexnet_ddp.runtime.files import write_json

log = logging.getLogger(__name__)

_MAX_IN_A_ROW = 10  # consecutive skipped steps; rollbacks to the same checkpoint
_REMEDY = "lower optimizer.lr, or set trainer.clip_grad_norm"
_HISTORY, _ENOUGH = 100, 10  # most and fewest recent losses that a spike is compared with
_LOW = 0.1  # least median: one mislabelled image in a small batch is not a spike


class Guard:
    """Counts non-finite, empty and spiking steps, and decides whether the run ends.

    counts: bad-step counters. Updated in place; save them with the checkpoint.
    describe(step): the batch of a step (0-based) as JSON, for the record at `path`.
    """

    def __init__(
        self,
        cfg: TrainerConfig,
        counts: dict[str, int],
        describe: Callable[[int], dict],
        path: Path,
        world: World,
    ) -> None:
        self._cfg, self._counts, self._world = cfg, counts, world
        self._describe, self._path = describe, path
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._in_spike = self._warned_empty = False
        self._loss_of: dict[int, float] = {}  # of the last two steps

    def bad(self, step: int) -> Diverged | None:
        """Count step `step` (0-based), whose loss or gradient is not finite and was not applied.

        Return the error that the run must end with, or None.
        """
        loss = self._loss_of[step]
        what = "gradient" if math.isfinite(loss) else "loss"
        fact = f"the {what} of step {step + 1} is not finite; nothing of that step was applied"
        self._record(step, f"{what} not finite", loss)
        if self._cfg.on_nan is OnNan.stop:
            return Diverged(f"{fact}; {_REMEDY}, or continue with trainer.on_nan=skip or rollback")
        if self._cfg.on_nan is OnNan.skip:
            in_a_row = 1 + (
                self._counts.get("in_a_row", 0) if self._counts.get("last") == step - 1 else 0
            )
            self._counts.update(
                last=step, in_a_row=in_a_row, skipped=self._counts.get("skipped", 0) + 1
            )
            if in_a_row >= _MAX_IN_A_ROW:
                return Diverged(f"{fact}, nor of the {in_a_row - 1} before it; {_REMEDY}")
        log.warning("%s (trainer.on_nan=%s)", fact, self._cfg.on_nan.value)
        return None

    def rolled_back(self, step: int, to: int) -> None:
        """Count a rollback from step `step` (0-based) to the checkpoint of step `to`.

        Raises Diverged if the run was rolled back to that checkpoint too often.
        """
        times = 1 + (self._counts.get("rollbacks_to", 0) if self._counts.get("to") == to else 0)
        self._counts.update(
            to=to, rollbacks_to=times, rollbacks=self._counts.get("rollbacks", 0) + 1
        )
        if times >= _MAX_IN_A_ROW:
            raise Diverged(
                f"step {step + 1} led back to the checkpoint of step {to} for the {times}th time; "
                f"{_REMEDY}"
            )
        log.warning(
            "the weights are those of step %d again; the data continues with step %d", to, step + 2
        )

    def empty(self, step: int, limit: int | None) -> DataError | None:
        """Count step `step` (0-based), of which no rank could read an image.

        limit: number of consecutive empty steps that ends the run; None: this step ends no epoch.
        Return the error that the run must end with, or None.
        """
        counts = self._counts
        in_a_row = 1 + (
            counts.get("empty_in_a_row", 0) if counts.get("empty_last") == step - 1 else 0
        )
        counts.update(
            empty_last=step, empty_in_a_row=in_a_row, skipped=counts.get("skipped", 0) + 1
        )
        listed = self._path.with_name("quarantine.jsonl")
        if limit is not None and in_a_row >= limit:
            remedy = (
                f"fix or replace the files that {listed} lists, and start the same command again"
            )
            return DataError(f"no image of the last {limit} step(s) could be read; {remedy}")
        if not self._warned_empty:
            self._warned_empty = True
            fact = f"no image of step {step + 1} could be read, so the step was skipped"
            log.warning(
                "%s; train/num_skipped_steps counts further ones, and %s lists the images",
                fact,
                listed,
            )
        return None

    def watch(self, step: int, loss: float) -> None:
        """Warn if `loss`, the mean over the global batch of step `step` (0-based), is a spike."""
        self._loss_of = {step - 1: self._loss_of.get(step - 1, math.nan), step: loss}
        factor = self._cfg.spike_factor
        if factor is None or not math.isfinite(loss):
            return
        usual = (
            max(_LOW, statistics.median(self._losses)) if len(self._losses) >= _ENOUGH else math.inf
        )
        spikes = loss > factor * usual
        if spikes and not self._in_spike:  # one that lasts is reported once
            self._record(step, "loss spike", loss)
            rule = f"more than trainer.spike_factor ({factor:g}) times the usual {usual:.4g}"
            log.warning(
                "the loss of step %d is %.4g, %s; its images are in replay.json",
                step + 1,
                loss,
                rule,
            )
        self._in_spike = spikes
        self._losses.append(loss)

    def row(self) -> dict[str, int]:
        """Return the counters of bad steps for a row of metrics; empty if there were none."""
        names = {"skipped": "train/num_skipped_steps", "rollbacks": "train/num_rollbacks"}
        return {name: self._counts[key] for key, name in names.items() if key in self._counts}

    def _record(self, step: int, reason: str, loss: float) -> None:
        if not self._world.is_main:
            return
        try:
            record = {
                "reason": reason,
                "loss": loss,
                "world_size": self._world.world_size,
                **self._describe(step),
            }
            write_json(self._path, record)
        except OSError as error:
            log.warning("%s could not be written: %s", self._path, error)
