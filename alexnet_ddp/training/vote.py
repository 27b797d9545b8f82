"""The one small all-reduce that every step carries: the vote of each rank on the step.

A stop signal or a fault reaches a single rank. The vote makes it known to all ranks, so that they
act on it in the same step. StepSnapshot undoes a step that the ranks decide not to apply.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch

from alexnet_ddp.runtime.distributed import World, start_sum
from alexnet_ddp.runtime.errors import RunError


@dataclass(frozen=True)
class StepVote:
    """What this rank requests at a step."""

    stop: bool = False
    save: bool = False
    error: RunError | None = None
    trained_s: float = 0.0  # rank 0's: seconds of training


@dataclass(frozen=True)
class VoteResult:
    """The votes of all ranks, and their sums. The same on every rank."""

    stop: bool  # a rank was asked to stop
    save: bool  # a checkpoint is due by time
    failed: bool  # a rank has an error
    nonfinite_loss: bool  # a rank's loss of this step is not finite
    nonfinite_previous: bool  # the previous step's gradient was not finite and was not applied
    num_images: int  # images of the global batch that could be read
    loss: float  # weighted mean over these images; NaN if there are none
    weight: float  # sum of their weights in the loss; num_images without class weights
    trained_s: float  # rank 0's seconds of training

    @property
    def is_empty(self) -> bool:
        """No rank could read an image of this step."""
        return self.num_images == 0 and not self.nonfinite_loss

    def nonfinite_steps(self, step: int) -> list[int]:
        """The steps (0-based) that this vote of `step` reveals as not finite, in order."""
        return [step - 1] * self.nonfinite_previous + [step] * self.nonfinite_loss


class _At(IntEnum):
    """The position of a value in the message of a vote. The first ones are flags."""

    stop = 0
    save = 1
    failed = 2
    nonfinite_loss = 3
    nonfinite_previous = 4
    num_images = 5
    loss_sum = 6
    weight = 7
    trained_s = 8


class VoteExchange:
    """Sums the votes of a step over the ranks while the backward pass runs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._wait: Callable[[], object] = lambda: None
        on_gpu = world.device.type == "cuda"
        self._mine, self._host = (
            torch.zeros(len(_At), dtype=torch.float64, pin_memory=on_gpu) for _ in range(2)
        )
        self._sum = torch.zeros_like(self._mine, device=world.device)
        self._ready = torch.cuda.Event() if on_gpu else None

    def start(
        self,
        loss_sum: torch.Tensor,
        num_images: int,
        vote: StepVote,
        nonfinite_previous: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Collective. Call it before the backward pass that synchronises gradients.

        loss_sum: of this rank's images. nonfinite_previous: 1 if the previous step's gradient was
        not finite, else 0. weight: sum of the images' weights; None if each counts 1. The three
        are scalars on the device.
        """
        mine = {
            _At.stop: vote.stop,
            _At.save: vote.save,
            _At.failed: vote.error is not None,
            _At.num_images: num_images,
            _At.weight: num_images,
            _At.trained_s: vote.trained_s,
        }
        values = [float(mine.get(at, 0)) for at in _At]
        self._mine.copy_(torch.tensor(values, dtype=torch.float64))
        self._sum.copy_(self._mine, non_blocking=True)  # from pinned memory: no host wait
        self._sum[_At.nonfinite_loss] = ~torch.isfinite(loss_sum)
        self._sum[_At.nonfinite_previous] = nonfinite_previous
        self._sum[_At.loss_sum] = loss_sum
        if weight is not None:
            self._sum[_At.weight] = weight
        self._wait = start_sum(self._sum)
        if self._ready is not None:
            self._wait()  # on a GPU this orders streams and does not block the host
            self._host.copy_(self._sum, non_blocking=True)
            self._ready.record()

    def finish(self) -> VoteResult:
        """Return the result. Waits for the all-reduce, not for the backward pass."""
        if self._ready is not None:
            self._ready.synchronize()
        else:
            self._wait()
            self._host.copy_(self._sum)
        total = self._host.tolist()
        num_images, weight = round(total[_At.num_images]), total[_At.weight]
        return VoteResult(
            stop=total[_At.stop] > 0,
            save=total[_At.save] > 0,
            failed=total[_At.failed] > 0,
            nonfinite_loss=total[_At.nonfinite_loss] > 0,
            nonfinite_previous=total[_At.nonfinite_previous] > 0,
            num_images=num_images,
            loss=total[_At.loss_sum] / weight if num_images else math.nan,
            weight=weight,
            trained_s=total[_At.trained_s],
        )


class StepSnapshot:
    """Restores tensors that a forward pass changes: running statistics and the sums of metrics."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        dtypes = {t.dtype for t in tensors}
        self._groups = [[t for t in tensors if t.dtype == dtype] for dtype in dtypes]
        self._kept = [_flat(group) for group in self._groups]

    def snapshot(self) -> None:
        """Remember the present values."""
        self._kept = [_flat(group) for group in self._groups]

    def restore(self, condition: torch.Tensor) -> None:
        """Restore the values if `condition`, a scalar on the device, is not 0. No host wait."""
        for group, kept in zip(self._groups, self._kept):
            values = torch.where(condition != 0, kept, _flat(group))
            pieces = values.split([t.numel() for t in group])
            torch._foreach_copy_(group, [piece.view_as(t) for piece, t in zip(pieces, group)])


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])
