"""Stop together, or not at all: the small all-reduce that every step carries.

A signal or a fault reaches one rank; the decision what to do about it is made by all, at the same step, before anybody
acts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from alexnet_ddp.runtime.distributed import World, start_sum
from alexnet_ddp.runtime.errors import RunError


@dataclass(frozen=True)
class StepVote:
    """What this rank would do at the end of a step, if it were alone."""

    stop: bool = False
    save: bool = False
    error: RunError | None = None


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know about a step before they apply it."""

    stop: bool  # a rank was asked to stop
    diverged: bool  # a rank's loss is not finite
    late: bool  # the gradient of the step before was not finite; the devices have not applied it
    failed: bool  # a rank has an error
    save: bool  # the time for a checkpoint has come
    num_images: int  # that the ranks have really seen
    loss: float  # mean over these images; nan if there are none

    @property
    def is_empty(self) -> bool:
        """No rank could read an image of this step, so there was nothing to learn and nothing was applied."""
        return self.num_images == 0 and not self.diverged

    def bad_steps(self, step: int) -> list[int]:
        """Which steps are known since this outcome, of `step`, to be bad."""
        return [step - 1] * self.late + [step] * self.diverged


class Health:
    """Collects the outcome of a step while its backward pass runs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._wait: Callable[[], None] = lambda: None
        on_gpu = world.device.type == "cuda"
        self._mine, self._host = (
            torch.zeros(7, dtype=torch.float64, pin_memory=on_gpu) for _ in range(2)
        )
        self._ready = torch.cuda.Event() if on_gpu else None

    def begin(
        self, loss_sum: torch.Tensor, num_images: int, vote: StepVote, late: torch.Tensor
    ) -> None:
        """Collective. Before the backward pass that synchronises.

        loss_sum: this rank's; late: 1 where the gradient of the step before was not finite. Scalars on the device.
        """
        mine = [vote.stop, 0, vote.error is not None, vote.save, num_images, 0, 0]
        self._mine.copy_(torch.tensor(mine, dtype=torch.float64))
        vector = torch.empty_like(self._mine, device=self._world.device)
        vector.copy_(self._mine, non_blocking=True)  # from pinned memory: waits for nothing
        vector[1] = ~torch.isfinite(loss_sum)
        vector[5], vector[6] = late, loss_sum
        self._wait = start_sum(vector)
        self._vector = vector
        if self._ready is not None:
            self._wait()  # on a GPU this orders streams, it does not block
            self._host.copy_(vector, non_blocking=True)
            self._ready.record()

    def finish(self) -> StepOutcome:
        """After the backward pass was queued. Waits for the sum, not for the backward pass."""
        if self._ready is not None:
            self._ready.synchronize()
        else:
            self._wait()
            self._host.copy_(self._vector)
        stop, diverged, failed, save, num_images, late, loss_sum = self._host.tolist()
        loss = loss_sum / num_images if num_images else math.nan
        return StepOutcome(
            stop > 0, diverged > 0, late > 0, failed > 0, save > 0, round(num_images), loss
        )


class StepSnapshot:
    """What a forward pass changes by itself, running statistics and sums: taken back where its step is not applied."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        dtypes = {t.dtype for t in tensors}
        self._groups = [[t for t in tensors if t.dtype == dtype] for dtype in dtypes]

    def snapshot(self) -> None:
        self._kept = [_flat(group) for group in self._groups]

    def restore(self, bad: torch.Tensor) -> None:
        """As at the mark, where `bad`, a scalar on the device, is not 0. Waits for nothing."""
        for group, kept in zip(self._groups, self._kept):
            found = torch.where(bad != 0, kept, _flat(group)).split([t.numel() for t in group])
            torch._foreach_copy_(group, [part.view_as(t) for part, t in zip(found, group)])


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])
