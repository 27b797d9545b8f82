"""The world of a run: who am I, how many are we, and how do we agree.

With parallel/, and with the links that doctor examines, the only room that talks to torch.distributed. A single process
is a world of one, so nothing downstream asks "are we distributed?". A function that all ranks must call begins with
"Collective."
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from alexnet_ddp.config import Device
from alexnet_ddp.runtime.environment import num_usable_cores, read_ranks, refuse_lone_tasks
from alexnet_ddp.runtime.errors import ConfigError, PeerFailed, PeerLost, RunError

T = TypeVar("T")

# How gloo, NCCL and the store say that the other end does not answer; gloo raises plain RuntimeErrors.
_LOST = re.compile(
    r"^Dist(Backend|Network|Store)Error|gloo/|Connection (closed|reset)|Broken pipe", re.MULTILINE
)

# Of a collective: long enough for a first scan of ImageNet on a slow disk, which the node's other ranks wait for.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    rank: int  # 0 .. world_size - 1, unique in the job
    local_rank: int  # 0 .. local_world_size - 1, unique on this node
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_cores(self) -> int:
        """This rank's share of the node's cores, at least 1."""
        return max(1, num_usable_cores() // self.local_world_size)


@contextmanager
def session(
    device: Device, tf32: bool = True, store: dist.Store | None = None, timeout: timedelta = TIMEOUT
) -> Iterator[World]:
    """Join the process group that torchrun describes, or form a world of one without torchrun.

    tf32: fp32 products on GPUs by TF32. store: where the ranks have met already. timeout: for the others to join, and
    for each collective. Raises ConfigError where a device is asked for that is not there.
    """
    ranks = read_ranks(os.environ)
    refuse_lone_tasks(os.environ)
    device = choose_device(device, ranks.local_rank)
    world = World(ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size, device)
    torch.set_num_threads(world.num_cores)  # torchrun's OMP_NUM_THREADS=1 would leave cores idle
    options: dict[str, Any] = {"backend": "gloo", "timeout": timeout}
    if world.device.type == "cuda":
        torch.cuda.set_device(
            world.device
        )  # before the group exists: NCCL binds to the current device
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        options |= {"backend": "nccl", "device_id": world.device}
    if "RANK" not in os.environ:
        store = store or dist.HashStore()
    if store is not None:
        options |= {"store": store, "rank": world.rank, "world_size": world.world_size}
    dist.init_process_group(**options)
    try:
        yield world
    except BaseException as error:
        if (lost := lost_peer(error)) is not None:
            raise lost from error
        if world.world_size == 1:  # more would wait for ranks that are gone
            dist.destroy_process_group()  # gloo's threads must not meet the end of the interpreter
        raise
    dist.destroy_process_group()


def lost_peer(error: BaseException) -> PeerLost | None:
    """What to end with where `error` is a collective's that another rank has left without a word."""
    if not isinstance(error, dist.DistError | RuntimeError) or not _LOST.search(
        f"{type(error).__name__}: {error}"
    ):
        return None
    reason = str(error).splitlines()[0].partition(". ")[0][-120:]
    return PeerLost(f"a rank is lost, or the way to it ({reason}); start the same command again")


def choose_device(choice: Device, local_rank: int) -> torch.device:
    """auto: this rank's GPU where there is one. Raises ConfigError where cuda was asked for and is not there."""
    if choice is Device.cpu or (choice is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        remedy = f"start at most {count} processes on this node" if count else "use device=cpu"
        error = ConfigError(
            f"device={choice.value} needs a GPU for local rank {local_rank}, found {count}; {remedy}"
        )
        error.only_here = (
            local_rank == count
        )  # the first one without speaks: no process group exists yet
        raise error
    return torch.device("cuda", local_rank)


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Collective. Sum `x` over all ranks, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def start_sum(x: torch.Tensor) -> Callable[[], None]:
    """Collective. Begin to sum `x` over all ranks, in place; the returned function waits for the result."""
    return dist.all_reduce(x, op=dist.ReduceOp.SUM, async_op=True).wait


def average(tensors: list[torch.Tensor], world: World) -> None:
    """Collective. Replace floating tensors by their mean over the ranks, in one message."""
    if world.world_size == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat /= world.world_size
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(mean.view_as(tensor))


def any_rank(flag: bool, world: World) -> bool:
    """Collective. True on every rank if it is true on one."""
    x = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return bool(x.item())


def all_equal(x: torch.Tensor) -> bool:
    """Collective. True on every rank if `x`, of integers, is the same on all of them."""
    highest = torch.cat([x, ~x])
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)  # ~ turns the order round, without an overflow
    return torch.equal(highest[: len(x)], ~highest[len(x) :])


def gather(x: torch.Tensor, world: World) -> torch.Tensor:
    """Collective. The ranks' `x`, stacked: [world_size, ...], on every rank."""
    parts = [torch.empty_like(x) for _ in range(world.world_size)]
    dist.all_gather(parts, x)
    return torch.stack(parts)


def broadcast(value: T) -> T:
    """Collective. Rank 0's value, a small plain object, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(items: list[T]) -> list[T]:
    """Collective. The items of all ranks, small plain objects, on every rank, in the order of the ranks."""
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast_tensors(tensors: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Collective. Rank 0's tensors, on every rank's device. The other ranks pass an empty dict."""
    shapes = broadcast({name: (t.shape, t.dtype) for name, t in tensors.items()})
    received = {}
    for name, (shape, dtype) in shapes.items():
        x = (
            tensors[name].to(world.device)
            if world.is_main
            else torch.empty(shape, dtype=dtype, device=world.device)
        )
        dist.broadcast(x, src=0)
        received[name] = x
    return received


def raise_together(error: RunError | None, world: World) -> None:
    """Collective. If any rank has an error all ranks raise: the lowest such rank its own, the others PeerFailed."""
    first = torch.tensor(world.rank if error else world.world_size, device=world.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    source = int(first.item())
    if source == world.world_size:
        return
    box = [(error.exit_code, str(error))] if world.rank == source else [None]
    dist.broadcast_object_list(box, src=source)
    if world.rank == source:
        error.only_here = True
        raise error
    raise PeerFailed(*box[0])


def from_main(build: Callable[[], T], world: World) -> T:
    """Collective. What build() returns on rank 0, a small plain object, on every rank."""
    return broadcast(on_all(build, world, takes_part=world.is_main))


def on_all(build: Callable[[], T], world: World, takes_part: bool = True) -> T | None:
    """Collective. build() on every rank that takes part; an error on one of them is raised on all."""
    result, error = None, None
    if takes_part:
        try:
            result = build()
        except RunError as e:
            error = e
    raise_together(error, world)
    return result


def first_on_node(build: Callable[[], T], world: World) -> T:
    """Collective. build() on local rank 0 of each node (it may write files and caches), then on the node's others."""
    first = on_all(build, world, takes_part=world.local_rank == 0)
    other = on_all(build, world, takes_part=world.local_rank != 0)
    return first if world.local_rank == 0 else other


def require_same(facts: dict[str, object], world: World) -> None:
    """Collective. Raises ConfigError on all ranks where a rank's facts, small and plain, are not rank 0's."""
    main = broadcast(facts)
    changed = [key for key in main if facts.get(key) != main[key]]
    error = None
    if changed:
        shown = ", ".join(f"{key}={facts.get(key)} (rank 0: {main[key]})" for key in changed[:4])
        error = ConfigError(
            f"rank {world.rank} was started as another run than rank 0: {shown}; start all alike"
        )
    raise_together(error, world)
