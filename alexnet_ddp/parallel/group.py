"""The ranks that share one set of sharded layers: their collectives, and the shards they hold."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alexnet_ddp.runtime.distributed import TIMEOUT, World
from alexnet_ddp.runtime.errors import ConfigError

_Start = Callable[..., dist.Work | None]  # of a collective
_all_gather: _Start
_reduce_scatter: _Start
# torch 2.14 renamed these functions; a later version will remove the old names.
if hasattr(dist, "all_gather_single"):
    _all_gather, _reduce_scatter = dist.all_gather_single, dist.reduce_scatter_single
else:
    _all_gather, _reduce_scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def require_divisor(option: str, size: int, world: World) -> None:
    """Raise ConfigError if the ranks cannot form groups of `size`."""
    if world.world_size % size:
        fitting = [g for g in range(1, world.world_size + 1) if world.world_size % g == 0]
        below, above = [g for g in fitting if g < size][-1:], [g for g in fitting if g > size][:1]
        nearest = " or ".join(map(str, below + above))
        raise ConfigError(
            f"{option} ({size}) must divide the number of processes ({world.world_size}); "
            f"nearest: {nearest}"
        )


@dataclass
class Group:
    """`size` ranks, each of which holds one shard of the sharded layers; this is the `rank`-th.

    If there are several groups, `copies` contains one rank of each group: those with this rank's
    shard.
    """

    size: int
    rank: int
    world_size: int
    members: dist.ProcessGroup
    copies: dist.ProcessGroup | None
    comm_dtype: torch.dtype = torch.float32  # of activations and partial sums that are sent
    num_images: int = 1  # of this rank in the current forward pass
    max_images: int = 1  # the largest num_images of all ranks in that pass
    # See ParallelModel.on_wait.
    wait_context: Callable[[], AbstractContextManager] = nullcontext
    exchange_context: Callable[[], AbstractContextManager] = nullcontext

    @classmethod
    def create(cls, world: World, size: int, comm_dtype: torch.dtype) -> "Group":
        """Collective. Consecutive ranks form a group.

        If a group has as many ranks as a node, its traffic stays within the node.
        """
        # Every rank must call new_group() for every group, in the same order.
        ranks = range(world.world_size)
        groups = [
            dist.new_group(list(ranks[first : first + size]), timeout=TIMEOUT)
            for first in ranks[::size]
        ]
        rank = world.rank % size
        copies = None
        if len(groups) > 1:
            copies = [
                dist.new_group(list(ranks[position::size]), timeout=TIMEOUT)
                for position in range(size)
            ][rank]
        members = groups[world.rank // size]
        # new_group() returns a number to ranks that are not in the group.
        assert isinstance(members, dist.ProcessGroup)
        assert copies is None or isinstance(copies, dist.ProcessGroup)
        return cls(size, rank, world.world_size, members, copies, comm_dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """Collective. x: [n, ...], the same shape on all members -> [size, n, ...]."""
        return self.start_all_gather(x)()

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Collective. Start all_gather(); the returned function waits for the result."""
        sent = self._to_comm_dtype(x).contiguous()
        received = sent.new_empty(self.size, *sent.shape)
        work = _all_gather(received, sent[None], group=self.members, async_op=True)
        assert work is not None  # because of async_op

        def finish(kept: Tensor = sent) -> Tensor:  # `sent` must stay alive until the work is done
            work.wait()
            return received.to(x.dtype)

        return finish

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Collective. x: [size, n, ...], a block per member -> [n, ...], this member's sum."""
        return self.start_reduce_scatter(x)()

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """Collective. Start reduce_scatter(); the returned function waits for the result."""
        sent = self._to_comm_dtype(x).contiguous()
        if sent.is_cuda:
            own = torch.empty_like(sent[0])
            work = _reduce_scatter(own, sent, group=self.members, async_op=True)
        else:  # gloo's reduce-scatter sends twice as many bytes as this all-to-all
            blocks = torch.empty_like(sent)
            work = dist.all_to_all_single(blocks, sent, group=self.members, async_op=True)
        assert work is not None  # because of async_op

        def finish(kept: Tensor = sent) -> Tensor:
            work.wait()
            return own.to(x.dtype) if sent.is_cuda else blocks.to(x.dtype).sum(0)

        return finish

    def pad(self, x: Tensor) -> Tensor:
        """Append zero rows: [n, ...], n <= max_images -> [max_images, ...]."""
        missing = self.max_images - len(x)
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x

    def _to_comm_dtype(self, x: Tensor) -> Tensor:
        narrower = x.is_floating_point() and self.comm_dtype.itemsize < x.dtype.itemsize
        return x.to(self.comm_dtype) if narrower else x


@dataclass(frozen=True)
class Shard:
    """How a tensor is divided over a group: along `dim`, into sizes that differ by at most one."""

    dim: int
    shape: torch.Size  # of the full tensor
    group: Group

    def sizes(self) -> list[int]:
        """The size along `dim` of each member's shard."""
        size, rest = divmod(self.shape[self.dim], self.group.size)
        return [size + (k < rest) for k in range(self.group.size)]

    def start(self) -> int:
        """The index along `dim` at which this member's shard starts."""
        return sum(self.sizes()[: self.group.rank])

    def of(self, full: Tensor) -> Tensor:
        """This member's shard of the tensor `full`, as a contiguous copy."""
        return full.split(self.sizes(), self.dim)[self.group.rank].clone(
            memory_format=torch.contiguous_format
        )

    def full_tensor(self, local: Tensor) -> Tensor:
        """Collective. The members' shards -> the full tensor, on every member, not rounded."""
        sizes = self.sizes()
        rows = local.detach().movedim(self.dim, 0)
        padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, sizes[0] - len(rows)))
        shards = replace(self.group, comm_dtype=torch.float32).all_gather(padded)
        full = torch.cat([shard[:size] for shard, size in zip(shards, sizes)])
        return full.movedim(0, self.dim).contiguous()


@dataclass(frozen=True)
class ShardedTensor:
    """This rank's shard of a tensor, with the shape and size of the full tensor.

    A checkpoint treats it as the full tensor and calls collect() to write it.
    """

    local: Tensor
    shard: Shard

    @property
    def shape(self) -> torch.Size:
        return self.shard.shape

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

    def full_tensor(self) -> Tensor:
        """Collective. The full tensor, on every member."""
        return self.shard.full_tensor(self.local)

    def collect(self, there: Tensor | None) -> None:
        """Collective in rank 0's group: copy the full tensor to `there`, on the CPU of rank 0.

        Rank 0 receives one shard at a time, so it needs memory for one more shard only. The other
        ranks pass None; in other groups the call does nothing.
        """
        group, sizes = self.shard.group, self.shard.sizes()
        members = dist.get_process_group_ranks(group.members)
        if members[0] != 0:
            return
        if group.rank > 0:
            dist.send(self.local.detach().contiguous(), dst=0, group=group.members)
            return
        assert there is not None, "rank 0 must pass a tensor"
        for member, block in zip(members, there.split(sizes, self.shard.dim)):
            shard = self.local.detach()
            if member != 0:
                shard = torch.empty(block.shape, dtype=self.dtype, device=self.local.device)
                dist.recv(shard, src=member, group=group.members)
            block.copy_(shard)
