"""Detects replicas that differ: a checksum of each floating-point tensor, compared over the ranks.

The checksum is a sum of (bit pattern * odd weight of the position), over pieces of the tensor. One
flipped bit always changes it. Sums of integers depend neither on the order nor on the machine, but
ranks with CPUs and ranks with GPUs cannot be compared.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from alexnet_ddp import rng
from alexnet_ddp.parallel.group import ShardedTensor
from alexnet_ddp.runtime.distributed import World, all_equal, all_gather
from alexnet_ddp.runtime.errors import Diverged

_PIECE = 1 << 16  # values per kernel: their weights fit into the cache of a core
_PIECE_ON_GPU = 1 << 24  # on a GPU the number of kernels matters


class Replicas:
    """Compares the replicas of a model and of its optimizer state.

    every_steps: steps between two comparisons; None: never.
    """

    def __init__(self, every_steps: int | None, world: World) -> None:
        self._every, self._world = every_steps, world
        self._equal_at: int | None = None  # the step of the last comparison
        on_gpu = world.device.type == "cuda"
        positions = torch.arange(
            _PIECE_ON_GPU if on_gpu else _PIECE, dtype=torch.int32, device=world.device
        )
        self._weights = rng.mix(positions) | 1

    def due(self, step: int) -> bool:
        """True if a comparison is due after `step` steps."""
        return self._every is not None and step % self._every == 0

    def check(
        self, step: int, tensors: Callable[[], dict[str, dict[str, Tensor | ShardedTensor]]]
    ) -> None:
        """Collective. Compare the replicas if that is due after `step` steps, or was never done.

        tensors(): part -> tensors by name. Raises Diverged on all ranks, with the names of the
        tensors that differ and the ranks, if a majority agrees.
        """
        is_due = self.due(step) or (self._every is not None and self._equal_at is None)
        if not is_due or self._world.world_size == 1 or step == self._equal_at:
            return
        groups = tensors().items()  # averages have the names of the weights
        self._compare(
            step,
            {
                ("ema/" if stem == "ema" else "") + n: t
                for stem, ts in groups
                for n, t in ts.items()
            },
        )

    def _compare(self, step: int, tensors: Mapping[str, Tensor | ShardedTensor]) -> None:
        # Integers (BatchNorm's num_batches_tracked) are left out: they differ if a rank had no
        # images in a short batch.
        tensors = {name: t for name, t in tensors.items() if t.is_floating_point()}
        split = [not isinstance(t, Tensor) for t in tensors.values()]
        locals_ = [t if isinstance(t, Tensor) else t.local for t in tensors.values()]
        sums = torch.stack([checksum(t, self._weights).to(self._world.device) for t in locals_])
        if not any(split) and all_equal(sums):
            self._equal_at = step
            return
        found = all_gather(sums, self._world).cpu().numpy()
        if any(split):
            size = next(t.shard.group.size for t in tensors.values() if not isinstance(t, Tensor))
            found[:, split] = differences(found[:, split], size)
            if (found == found[0]).all():
                self._equal_at = step
                return
        cause, remedy = (
            "they were not equal when the run started",
            "look at what is loaded, and start again",
        )
        if self._equal_at is not None:
            cause = f"they were equal at step {self._equal_at}: suspect the memory of that machine"
            remedy = f"remove the checkpoints after step {self._equal_at} and start the "
            remedy += "same command again"
        raise Diverged(
            f"the replicas differ after step {step}: {describe(list(tensors), found)}; "
            f"{cause}; {remedy}"
        )


def differences(sums: np.ndarray, size: int) -> np.ndarray:
    """Compare the checksums of shards with those of the same shard in other groups.

    sums: int64 [ranks, tensors], of tensors that are split over groups of `size` ranks. Returns the
    same shape: 0 if the shard agrees with most of its copies, otherwise the difference.
    """
    copies = sums.reshape(-1, size, sums.shape[1])  # [groups, members, tensors]
    usual = np.sort(copies, axis=0)[len(copies) // 2]  # if most agree, their value is the median
    nobody = np.arange(1, len(copies) + 1)[
        :, None, None
    ]  # without a majority every copy counts as different
    agree = 2 * (copies == usual).sum(axis=0) > len(copies)
    return np.where(agree, copies - usual, nobody).reshape(sums.shape)


def checksum(tensor: Tensor, weights: Tensor) -> Tensor:
    """Return an int64 scalar on the tensor's device. weights: odd int32, cycled."""
    bits = (
        tensor.detach()
        .flatten()
        .view(torch.int32 if tensor.element_size() % 4 == 0 else torch.int16)
    )
    bits, weights = bits.to(torch.int32), weights.to(bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(len(weights)):
        total = total * 0x9E3779B1 + _dot(piece, weights[: len(piece)])
    return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product: modulo 2**32 on CPUs. For integers only they have torch.dot: 20 x faster."""
    return torch.dot(a, b) if a.device.type == "cpu" else (a * b).sum()


def describe(names: list[str], sums: np.ndarray) -> str:
    """Name the tensors that differ, and the ranks if most ranks agree.

    sums: int64 [ranks, tensors].
    """
    differing = [k for k in range(len(names)) if len(set(sums[:, k].tolist())) > 1]
    shown = ", ".join(names[k] for k in differing[:3]) + (" ..." if len(differing) > 3 else "")
    odd = sorted({rank for k in differing for rank in _odd_ranks(sums[:, k].tolist())})
    ranks = (
        f"rank {', '.join(map(str, odd))} of {len(sums)}"
        if odd
        else f"which of the {len(sums)} ranks is unknown"
    )
    return f"{shown} ({ranks})"


def _odd_ranks(sums: list[int]) -> Iterable[int]:
    """Those that are not with the majority; none where there is no majority."""
    value, count = Counter(sums).most_common(1)[0]
    return [rank for rank, s in enumerate(sums) if s != value] if 2 * count > len(sums) else []
