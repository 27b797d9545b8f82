"""The process group of a run (World, session) and its collective operations.

Only this module, parallel/ and doctor's link checks use torch.distributed. A single process is a
process group of size 1, so no caller needs to ask whether the run is distributed. The docstring of
a function that all ranks must call begins with "Collective."
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast, overload

import torch
import torch.distributed as dist

from alexnet_ddp.config import Device
from alexnet_ddp.runtime.environment import num_usable_cores, read_ranks, refuse_lone_tasks
from alexnet_ddp.runtime.errors import ConfigError, PeerFailed, PeerLost, RunError

T = TypeVar("T")

# Errors of gloo, NCCL and the store if a peer does not answer. gloo raises plain RuntimeErrors.
_LOST = re.compile(
    r"^Dist(Backend|Network|Store)Error|gloo/|Connection (closed|reset)|Broken pipe", re.MULTILINE
)

# Of a collective. A node's other ranks wait while one scans ImageNet on a slow disk.
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
    """Join the process group that torchrun describes; without torchrun, create a group of size 1.

    Args:
        device: cpu, cuda or auto.
        tf32: compute fp32 matrix products and convolutions on GPUs with TF32.
        store: the store of an earlier rendezvous. Default: make a new rendezvous.
        timeout: of the rendezvous and of each collective.

    Raises:
        ConfigError: the device does not exist, or the ranks contradict each other.
        PeerLost: another rank was lost inside the block.
    """
    ranks = read_ranks(os.environ)
    refuse_lone_tasks(os.environ)
    world = World(
        ranks.rank,
        ranks.local_rank,
        ranks.world_size,
        ranks.local_world_size,
        choose_device(device, ranks.local_rank),
    )
    torch.set_num_threads(world.num_cores)  # torchrun's OMP_NUM_THREADS=1 would leave cores idle
    options: dict[str, Any] = {"backend": "gloo", "timeout": timeout}
    if world.device.type == "cuda":
        # Before the group is created: NCCL binds to the current device.
        torch.cuda.set_device(world.device)
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
        # gloo's threads must end before the interpreter. More ranks would wait for lost ones.
        if world.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def lost_peer(error: BaseException) -> PeerLost | None:
    """Return the error to end with if `error` means that another rank was lost, else None."""
    if not isinstance(error, dist.DistError | RuntimeError):
        return None
    if not _LOST.search(f"{type(error).__name__}: {error}"):
        return None
    reason = str(error).splitlines()[0].partition(". ")[0][-120:]
    return PeerLost(
        f"a rank, or the connection to it, is lost ({reason}); start the same command again"
    )


def choose_device(choice: Device, local_rank: int) -> torch.device:
    """Return this rank's device. auto: its GPU if the machine has GPUs, else the CPU.

    Raises ConfigError if there are fewer GPUs than ranks.
    """
    if choice is Device.cpu or (choice is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        remedy = f"start at most {count} processes on this node" if count else "use device=cpu"
        error = ConfigError(
            f"device={choice.value} needs a GPU for local rank {local_rank}, found {count}; "
            f"{remedy}"
        )
        # Only the first rank without a GPU prints the error; there is no process group yet.
        error.only_here = local_rank == count
        raise error
    return torch.device("cuda", local_rank)


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Collective. Sum `x` over all ranks, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def start_sum(x: torch.Tensor) -> Callable[[], object]:
    """Collective. Start to sum `x` over all ranks, in place; call the result to wait for it."""
    work = dist.all_reduce(x, op=dist.ReduceOp.SUM, async_op=True)
    assert work is not None  # because of async_op
    return work.wait


def average(tensors: list[torch.Tensor], world: World) -> None:
    """Collective. Replace floating-point tensors with their mean over the ranks, in one message."""
    if world.world_size == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat /= world.world_size
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(mean.view_as(tensor))


def any_rank(flag: bool, world: World) -> bool:
    """Collective. Return True on every rank if `flag` is true on any rank."""
    x = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return bool(x.item())


def all_equal(x: torch.Tensor) -> bool:
    """Collective. Return on every rank whether the integer tensor `x` is the same on all ranks."""
    highest = torch.cat([x, ~x])
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)  # ~x reverses the order without overflow
    return torch.equal(highest[: len(x)], ~highest[len(x) :])


def all_gather(x: torch.Tensor, world: World) -> torch.Tensor:
    """Collective. Return the tensors `x` of all ranks, stacked: [world_size, *x.shape]."""
    received = [torch.empty_like(x) for _ in range(world.world_size)]
    dist.all_gather(received, x)
    return torch.stack(received)


def broadcast(value: T) -> T:
    """Collective. Return rank 0's value, a small picklable object, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_objects(items: list[T]) -> list[T]:
    """Collective. Return the items of all ranks, small picklable objects, ordered by rank."""
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for received in lists for item in received]


def broadcast_tensors(tensors: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Collective. Return rank 0's tensors on every rank's device; others pass an empty dict."""
    shapes = broadcast({name: (t.shape, t.dtype) for name, t in tensors.items()})
    received = {}
    for name, (shape, dtype) in shapes.items():
        if world.is_main:
            x = tensors[name].to(world.device)
        else:
            x = torch.empty(shape, dtype=dtype, device=world.device)
        dist.broadcast(x, src=0)
        received[name] = x
    return received


def raise_together(error: RunError | None, world: World) -> None:
    """Collective. Raise on all ranks if any rank has an error.

    The lowest rank with an error raises its own; all others raise PeerFailed.
    """
    first = torch.tensor(world.rank if error else world.world_size, device=world.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    source = int(first.item())
    if source == world.world_size:
        return
    mine = error if world.rank == source else None
    reasons = [(mine.exit_code, str(mine)) if mine else (0, "")]
    dist.broadcast_object_list(reasons, src=source)
    if mine:
        mine.only_here = True
        raise mine
    raise PeerFailed(*reasons[0])


def from_main(build: Callable[[], T], world: World) -> T:
    """Collective. Call build() on rank 0 and return its result, picklable and small, everywhere."""
    built = on_all(build, world, takes_part=world.is_main)
    return cast(T, broadcast(built))  # rank 0's, which took part


@overload
def on_all(build: Callable[[], T], world: World) -> T: ...


@overload
def on_all(build: Callable[[], T], world: World, takes_part: bool) -> T | None: ...


def on_all(build: Callable[[], T], world: World, takes_part: bool = True) -> T | None:
    """Collective. Call build() on the ranks that take part; raise on all if one raises RunError.

    Returns this rank's result, or None if it does not take part.
    """
    result, error = None, None
    if takes_part:
        try:
            result = build()
        except RunError as e:
            error = e
    raise_together(error, world)
    return result


def first_on_node(build: Callable[[], T], world: World) -> T:
    """Collective. Call build() on local rank 0 of each node, then on the node's other ranks.

    The first call may write files and caches that the others read.
    """
    first = on_all(build, world, takes_part=world.local_rank == 0)
    other = on_all(build, world, takes_part=world.local_rank != 0)
    return cast(T, first if world.local_rank == 0 else other)  # this rank took part in it


def require_same(facts: Mapping[str, object], world: World) -> None:
    """Collective. Raise ConfigError on all ranks if a rank's facts differ from rank 0's.

    Args:
        facts: small picklable values by the names that the message shows.
        world: this rank.
    """
    main = broadcast(facts)
    changed = [key for key in main if facts.get(key) != main[key]]
    error = None
    if changed:
        shown = ", ".join(f"{key}={facts.get(key)} (rank 0: {main[key]})" for key in changed[:4])
        error = ConfigError(
            f"rank {world.rank} was started with other settings than rank 0: {shown}; "
            "start all ranks with the same command and data"
        )
    raise_together(error, world)
