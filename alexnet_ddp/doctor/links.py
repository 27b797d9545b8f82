"""Measures links, all-reduces and clocks between the nodes, with the messages of a training.

It uses torch.distributed directly, since runtime/distributed.py only has what a training needs.
Every measurement has a time limit: messages that would take too long are left out.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from alexnet_ddp.doctor.findings import Finding, Level, format_bytes, format_seconds, shorten
from alexnet_ddp.runtime.distributed import World, all_gather_objects, any_rank

SIZES = (4_000, 64_000, 1_000_000, 16_000_000, 64_000_000, 256_000_000)  # bytes of an all-reduce
_ALL_REDUCE_S = 5.0  # skip an all-reduce that would take longer
_LINKS_S = 8.0  # for the messages of all pairs together
_MAX_LINKS_S = 15.0  # including the time to open connections; skip the remaining pairs after it
_MAX_MESSAGE = 64_000_000  # bytes
_MAX_CLOCK_OFFSET_S = 1.0


@dataclass(frozen=True)
class AllReduce:
    """A measured all-reduce."""

    num_bytes: int
    seconds: float  # of the slowest rank, median

    def bus_rate(self, world_size: int) -> float:
        """Return the bytes per second on each link in a ring of K ranks, as NCCL tests define it.

        Each rank sends 2 (K - 1) / K of the message.
        """
        return 2 * (world_size - 1) / world_size * self.num_bytes / self.seconds


@dataclass(frozen=True)
class Link:
    """A measured link between two nodes, named by their first ranks."""

    first: int
    second: int
    latency_s: float  # one way
    bytes_per_s: float  # one way, one stream


def time_all_reduce(world: World) -> list[AllReduce]:
    """Collective. Measure all-reduces of SIZES, except those that would take more than 5 s."""
    found: list[AllReduce] = []
    for num_bytes in SIZES if world.world_size > 1 else ():
        if found and found[-1].seconds * num_bytes / found[-1].num_bytes > _ALL_REDUCE_S:
            break
        x = torch.zeros(num_bytes // 4, device=world.device)
        dist.all_reduce(x)  # warm-up: opens connections and allocates buffers
        times = [_slowest(_timed(partial(dist.all_reduce, x), world), world)]
        while len(times) < 5 and sum(times) < 0.5:
            times.append(_slowest(_timed(partial(dist.all_reduce, x), world), world))
        found.append(AllReduce(num_bytes, statistics.median(times)))
    return found


def interpolate_seconds(num_bytes: float, sums: list[AllReduce]) -> float:
    """Estimate the seconds of an all-reduce: linear between measurements, then at the last rate."""
    if num_bytes >= sums[-1].num_bytes:
        return sums[-1].seconds * num_bytes / sums[-1].num_bytes
    low, high = next(
        (a, b)
        for a, b in zip([AllReduce(0, sums[0].seconds), *sums], sums)
        if num_bytes <= b.num_bytes
    )
    share = (num_bytes - low.num_bytes) / (high.num_bytes - low.num_bytes)
    return low.seconds + share * (high.seconds - low.seconds)


def time_links(world: World, leaders: list[int]) -> list[Link]:
    """Collective. Measure the link of every pair of `leaders`, one rank per node.

    Disjoint pairs are measured at the same time.
    """
    rounds, began = round_robin(leaders), time.monotonic()
    found = []
    for pairs in rounds:
        budget_s = _LINKS_S / len(rounds)
        for first, second in pairs:
            if world.rank == first:
                found.append(_measure_link(first, second, world, budget_s))
            elif world.rank == second:
                _echo(first, world)
        if any_rank(time.monotonic() - began > _MAX_LINKS_S, world):
            break
    return all_gather_objects(found)


def round_robin(ranks: list[int]) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs that contain every pair of `ranks` once (circle method)."""
    circle = [*ranks, *([-1] if len(ranks) % 2 else [])]  # a rank paired with -1 is idle
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]))
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def measure_clock_offsets(world: World, leaders: list[int]) -> dict[int, float]:
    """Collective. Return {leader: seconds that its clock is ahead of rank 0's}, on rank 0.

    The error is at most half a round trip.
    """
    offsets = {}
    for leader in leaders[1:]:
        clock = torch.zeros(1, dtype=torch.float64, device=world.device)
        best = float("inf")
        for _ in range(5 if world.rank in (0, leader) else 0):
            if world.rank == leader:
                dist.recv(clock, 0)
                clock.fill_(time.time())
                dist.send(clock, 0)
                continue
            began = time.time()
            dist.send(clock, leader)
            dist.recv(clock, leader)
            theirs, ended = clock.item(), time.time()
            if ended - began < best:
                best = ended - began
                offsets[leader] = theirs - (began + ended) / 2
    dist.barrier()
    return offsets


def check_links(links: list[Link], host_of: Callable[[int], str]) -> Finding:
    """Check that no link is slower than half the median over the nodes of their fastest link."""
    if not links:
        return Finding("links", "one node", "none")
    best: dict[int, float] = {}
    for link in links:
        for end in (link.first, link.second):
            best[end] = max(best.get(end, 0.0), link.bytes_per_s)
    usual = statistics.median(best.values())
    slow = [link for link in links if link.bytes_per_s < usual / 2]
    found = _describe_link(min(links, key=lambda link: link.bytes_per_s), host_of)
    found += (
        f", the slowest of {len(links)}; usual {format_bytes(usual)}/s" if len(links) > 1 else ""
    )
    nodes = shorten(_common_nodes(slow, host_of))
    remedy = f"check the cable, port and load of {nodes}, or leave it out"
    bad = Finding("links", found, "none at less than half the usual speed", Level.warn, remedy)
    return bad.ok_if(not slow)


def check_gradients(
    sums: list[AllReduce], num_bytes: int, sends_less: str | None, step_s: float | None
) -> Finding:
    """Check that the backward pass is long enough to overlap the all-reduce of the gradients.

    num_bytes: of all gradients. sends_less: an option with which a step sends fewer bytes. step_s:
    duration of a step without communication, of which two thirds are the backward pass.
    """
    if not sums:
        return Finding("gradients", "one process", "no all-reduce")
    all_reduce_s = interpolate_seconds(num_bytes, sums)
    found = f"{format_bytes(num_bytes)} per step, all-reduced in {format_seconds(all_reduce_s)}"
    if sends_less:
        return Finding("gradients", f"{sends_less} sends less than {found}", "not checked")
    if step_s is None:
        return Finding("gradients", found, "not checked: the step could not be measured")
    backward_s = step_s * 2 / 3
    if all_reduce_s > backward_s:
        before, after = format_seconds(step_s), format_seconds(step_s + all_reduce_s - backward_s)
        found += f": a step takes {before}, and at least {after} with it"
    bad = Finding(
        "gradients",
        found,
        f"less than the {format_seconds(backward_s)} of a backward pass",
        Level.warn,
        "a larger trainer.global_batch_size, a faster link, or fewer bytes (parallel=hybrid, "
        "parallel.hook=bf16)",
    )
    return bad.ok_if(all_reduce_s <= backward_s)


def check_clocks(offsets: dict[int, float], host_of: Callable[[int], str]) -> Finding:
    """Check that the clocks agree, so that time stamps of logs and files can be compared."""
    if not offsets:
        return Finding("clock", "one node", "none")
    worst = max(offsets, key=lambda leader: abs(offsets[leader]))
    direction = "ahead" if offsets[worst] > 0 else "behind"
    found = f"{host_of(worst)} is {format_seconds(abs(offsets[worst]))} {direction}"
    bad = Finding(
        "clock",
        found,
        f"within {_MAX_CLOCK_OFFSET_S:.0f} s of rank 0's",
        Level.warn,
        "run chrony or ntpd on it",
    )
    return bad.ok_if(abs(offsets[worst]) <= _MAX_CLOCK_OFFSET_S)


def _describe_link(link: Link, host_of: Callable[[int], str]) -> str:
    rate = f"{format_bytes(link.bytes_per_s)}/s ({link.bytes_per_s * 8 / 1e9:.3g} Gbit/s)"
    return (
        f"{host_of(link.first)} - {host_of(link.second)} {rate}, {format_seconds(link.latency_s)}"
    )


def _common_nodes(slow: list[Link], host_of: Callable[[int], str]) -> list[str]:
    """Return the hosts with the largest number of slow links."""
    count = Counter(end for link in slow for end in (link.first, link.second))
    return [host_of(end) for end in sorted(count) if count[end] == max(count.values())]


def _measure_link(mine: int, peer: int, world: World, budget_s: float) -> Link:
    """Measure round trips with growing messages until a third of `budget_s` is used.

    Each message is preceded by its size, since the peer does not know when this rank will stop.
    """
    head, latency, rate = torch.zeros(1, dtype=torch.int64, device=world.device), float("inf"), 0.0
    num_bytes, began = 4, time.monotonic()
    while num_bytes <= _MAX_MESSAGE and time.monotonic() - began < budget_s / 3:
        x = torch.zeros(num_bytes, dtype=torch.uint8, device=world.device)
        times = []
        for _ in range(21 if num_bytes == 4 else 3):  # the first message opens the connection
            dist.send(head.fill_(num_bytes), peer)
            times.append(_timed(partial(_round_trip, x, peer), world))
            if time.monotonic() - began > budget_s / 3:
                break
        if num_bytes == 4:
            latency = statistics.median(times) / 2
        else:
            # The largest message decides: small ones fit into the sender's buffers.
            rate = 2 * num_bytes / statistics.median(times)
        num_bytes = num_bytes * 8 if num_bytes > 4 else 64_000
    dist.send(head.zero_(), peer)
    return Link(mine, peer, latency, rate or 4 / latency)


def _round_trip(x: torch.Tensor, peer: int) -> None:
    dist.send(x, peer)
    dist.recv(x, peer)


def _echo(peer: int, world: World) -> None:
    """Send every message of _measure_link back, until the size 0."""
    head = torch.zeros(1, dtype=torch.int64, device=world.device)
    while True:
        dist.recv(head, peer)
        num_bytes = int(head.item())
        if num_bytes == 0:
            return
        x = torch.zeros(num_bytes, dtype=torch.uint8, device=world.device)
        dist.recv(x, peer)
        dist.send(x, peer)


def _timed(act: Callable[[], object], world: World) -> float:
    _finish(world)
    began = time.perf_counter()
    act()
    _finish(world)
    return time.perf_counter() - began


def _slowest(s: float, world: World) -> float:
    """Collective. Return the longest time of all ranks; also synchronises them."""
    x = torch.tensor(s, dtype=torch.float64, device=world.device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def _finish(world: World) -> None:
    """Wait for the GPU, on which collectives are asynchronous."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
