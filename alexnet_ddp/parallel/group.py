"""The ranks that share one network, and what travels between them: rows of activations, and partial sums."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alexnet_ddp.runtime.distributed import TIMEOUT, World
from alexnet_ddp.runtime.errors import ConfigError

# torch 2.14 renamed them, and a later version removes the old names.
if hasattr(dist, "all_gather_single"):
    _all_gather, _reduce_scatter = dist.all_gather_single, dist.reduce_scatter_single
else:
    _all_gather, _reduce_scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def require_divisor(knob: str, size: int, world: World) -> None:
    """Raises ConfigError where the ranks cannot form groups of `size`."""
    if world.world_size % size:
        fitting = [g for g in range(1, world.world_size + 1) if world.world_size % g == 0]
        below, above = [g for g in fitting if g < size][-1:], [g for g in fitting if g > size][:1]
        nearest = " or ".join(map(str, below + above))
        raise ConfigError(
            f"{knob} ({size}) must divide the number of processes ({world.world_size}); nearest: {nearest}"
        )


@dataclass
class Group:
    """`size` ranks that hold a part each of the split layers; this one is the `rank`-th of them.

    Where the world has more ranks than one group, `copies` are the ranks, one of each group, that hold the same part.
    """

    size: int
    rank: int
    world_size: int
    members: dist.ProcessGroup
    copies: dist.ProcessGroup | None
    wire_dtype: torch.dtype = torch.float32
    count: int = 1  # images that this rank has in the coming forward pass
    slots: int = 1  # rows that each rank has in it; those beyond its images are zero
    waiting: Callable[[], AbstractContextManager] = (
        nullcontext  # around the wait for the members in a forward pass
    )

    @classmethod
    def of(cls, world: World, size: int, wire_dtype: torch.dtype) -> "Group":
        """Collective. Neighbouring ranks are a group: with as many as a node has, its traffic stays inside the node."""
        num_groups = world.world_size // size
        members = copies = None
        for first in range(
            0, world.world_size, size
        ):  # every rank must take part in the making of every group
            made = dist.new_group(list(range(first, first + size)), timeout=TIMEOUT)
            members = made if first <= world.rank < first + size else members
        for position in range(size if num_groups > 1 else 0):
            made = dist.new_group(list(range(position, world.world_size, size)), timeout=TIMEOUT)
            copies = made if world.rank % size == position else copies
        return cls(size, world.rank % size, world.world_size, members, copies, wire_dtype)

    def gather(self, x: Tensor) -> Tensor:
        """Collective. x: [n, ...], alike on all members -> [size, n, ...]."""
        return self.start_gather(x)()

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Collective. As gather(); the returned function waits for it."""
        sent = self._to_wire(x).contiguous()
        found = sent.new_empty(self.size, *sent.shape)
        work = _all_gather(found, sent[None], group=self.members, async_op=True)

        def finish(kept: Tensor = sent) -> Tensor:  # what is sent must live until it has arrived
            work.wait()
            return found.to(x.dtype)

        return finish

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Collective. x: [size, n, ...], one block for each member -> [n, ...], the sum of the blocks for this one."""
        return self.start_scatter_sum(x)()

    def start_scatter_sum(self, x: Tensor) -> Callable[[], Tensor]:
        """Collective. As scatter_sum(); the returned function waits for it."""
        sent = self._to_wire(x).contiguous()
        if sent.is_cuda:
            mine = torch.empty_like(sent[0])
            work = _reduce_scatter(mine, sent, group=self.members, async_op=True)
        else:  # gloo's own reduce-scatter sends twice as many bytes
            blocks = torch.empty_like(sent)
            work = dist.all_to_all_single(blocks, sent, group=self.members, async_op=True)

        def finish(kept: Tensor = sent) -> Tensor:
            work.wait()
            return mine.to(x.dtype) if sent.is_cuda else blocks.to(x.dtype).sum(0)

        return finish

    def padded(self, x: Tensor) -> Tensor:
        """[n, ...], n <= slots -> [slots, ...]: zeros behind."""
        missing = self.slots - len(x)
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x

    def _to_wire(self, x: Tensor) -> Tensor:
        narrower = x.is_floating_point() and self.wire_dtype.itemsize < x.dtype.itemsize
        return x.to(self.wire_dtype) if narrower else x


@dataclass(frozen=True)
class Part:
    """Which slice of a tensor each member holds: parts along `dim` whose sizes differ by at most one."""

    dim: int
    shape: torch.Size  # of the whole tensor
    group: Group

    def sizes(self) -> list[int]:
        size, rest = divmod(self.shape[self.dim], self.group.size)
        return [size + (k < rest) for k in range(self.group.size)]

    def start(self) -> int:
        """Index of the first row, or column, of this member's part."""
        return sum(self.sizes()[: self.group.rank])

    def of(self, whole: Tensor) -> Tensor:
        """This member's part of `whole`, a copy."""
        return whole.split(self.sizes(), self.dim)[self.group.rank].clone(
            memory_format=torch.contiguous_format
        )

    def whole(self, part: Tensor) -> Tensor:
        """Collective. The whole tensor, on every member."""
        largest = self.sizes()[0]
        rows = part.detach().movedim(self.dim, 0)
        exact = replace(self.group, wire_dtype=torch.float32)
        parts = exact.gather(F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, largest - len(rows))))
        return (
            torch.cat([p[:n] for p, n in zip(parts, self.sizes())])
            .movedim(0, self.dim)
            .contiguous()
        )


@dataclass(frozen=True)
class SplitTensor:
    """A tensor of which each member of a group holds a part, where a checkpoint expects a whole one."""

    local: Tensor
    part: Part

    @property
    def shape(self) -> torch.Size:
        return self.part.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.local.element_size()

    def element_size(self) -> int:
        return self.local.element_size()

    def is_floating_point(self) -> bool:
        return self.local.is_floating_point()

    def collect(self, there: Tensor | None) -> None:
        """Collective, of rank 0's group; others do nothing. Rank 0 copies the parts into `there`, on the CPU, one after
        the other: it never holds more than one of them beside its own.
        """
        group, sizes = self.part.group, self.part.sizes()
        members = dist.get_process_group_ranks(group.members)
        if members[0] != 0:
            return
        if group.rank > 0:
            dist.send(self.local.detach().contiguous(), dst=0, group=group.members)
            return
        for member, block in zip(members, there.split(sizes, self.part.dim)):
            part = self.local.detach()
            if member != 0:
                part = torch.empty(block.shape, dtype=self.dtype, device=self.local.device)
                dist.recv(part, src=member, group=group.members)
            block.copy_(part)
