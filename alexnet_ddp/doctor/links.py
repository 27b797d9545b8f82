"""Links, sums and clocks between the nodes, measured with the messages that a training sends.

Talks to torch.distributed itself: distributed.py has what a training needs, and a training times no messages. Every
measurement stops by itself, whatever the link: what would take too long is not sent, and said to be missing.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from alexnet_ddp.doctor.findings import Finding, Level, seconds, shortened, size
from alexnet_ddp.runtime.distributed import World, any_rank, gather_objects

SIZES = (4_000, 64_000, 1_000_000, 16_000_000, 64_000_000, 256_000_000)  # bytes of an all-reduce
_SUM_S = 5.0  # no all-reduce that would take longer
_LINKS_S = 8.0  # all pairs together,
_MOST_LINKS_S = 15.0  # and with the connections that they open; then the rest is left out
_LARGEST = 64_000_000  # bytes of a message between two nodes
_MOST_SKEW_S = 1.0


@dataclass(frozen=True)
class Sum:
    """An all-reduce."""

    num_bytes: int
    seconds: float  # of the slowest rank, median

    def bus_rate(self, world_size: int) -> float:
        """Bytes a second that each rank's link carries, each way, in a ring: 2(K-1)/K of the message (NCCL tests)."""
        return 2 * (world_size - 1) / world_size * self.num_bytes / self.seconds


@dataclass(frozen=True)
class Link:
    """Between two nodes, given by the ranks that speak for them."""

    first: int
    second: int
    latency_s: float  # one way
    bytes_per_s: float  # one way, one stream


def time_sums(world: World) -> list[Sum]:
    """Collective. All-reduces of SIZES that take less than 5 s each; the largest ones are left out where they would."""
    found: list[Sum] = []
    for num_bytes in SIZES if world.world_size > 1 else ():
        if found and found[-1].seconds * num_bytes / found[-1].num_bytes > _SUM_S:
            break
        x = torch.zeros(num_bytes // 4, device=world.device)
        dist.all_reduce(x)  # connections, buffers, pages: made by the first one
        times = [_slowest(_timed(lambda x=x: dist.all_reduce(x), world), world)]
        while len(times) < 5 and sum(times) < 0.5:
            times.append(_slowest(_timed(lambda x=x: dist.all_reduce(x), world), world))
        found.append(Sum(num_bytes, statistics.median(times)))
    return found


def seconds_for(num_bytes: float, sums: list[Sum]) -> float:
    """Of an all-reduce of so many bytes: a straight line between the measured ones, and beyond by the last rate."""
    if num_bytes >= sums[-1].num_bytes:
        return sums[-1].seconds * num_bytes / sums[-1].num_bytes
    low, high = next(
        (a, b) for a, b in zip([Sum(0, sums[0].seconds), *sums], sums) if num_bytes <= b.num_bytes
    )
    share = (num_bytes - low.num_bytes) / (high.num_bytes - low.num_bytes)
    return low.seconds + share * (high.seconds - low.seconds)


def time_links(world: World, leaders: list[int]) -> list[Link]:
    """Collective. Every pair of `leaders`, one rank a node, as many pairs at once as there can be."""
    rounds, began = pairings(leaders), time.monotonic()
    found = []
    for pairs in rounds:
        budget_s = _LINKS_S / len(rounds)
        for first, second in pairs:
            if world.rank == first:
                found.append(_probe(first, second, world, budget_s))
            elif world.rank == second:
                _answer(first, world)
        if any_rank(time.monotonic() - began > _MOST_LINKS_S, world):
            break
    return gather_objects(found)


def pairings(players: list[int]) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs, in which everybody meets everybody once: a round-robin tournament, circle method."""
    circle = [*players, *([-1] if len(players) % 2 else [])]  # who meets -1 rests
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]))
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def time_clocks(world: World, leaders: list[int]) -> dict[int, float]:
    """Collective. Leader -> seconds that its clock is ahead of rank 0's; known to half a round trip. For rank 0."""
    skews = {}
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
                best, skews[leader] = ended - began, theirs - (began + ended) / 2
    dist.barrier()
    return skews


def judge_links(links: list[Link], host_of: Callable[[int], str]) -> Finding:
    """No pair of nodes is much slower than usual: the median over the nodes of their fastest link."""
    if not links:
        return Finding("links", "one node", "none")
    best: dict[int, float] = {}
    for link in links:
        for end in (link.first, link.second):
            best[end] = max(best.get(end, 0.0), link.bytes_per_s)
    usual = statistics.median(best.values())
    slow = [link for link in links if link.bytes_per_s < usual / 2]
    found = _told(min(links, key=lambda link: link.bytes_per_s), host_of)
    found += f", the slowest of {len(links)}; usual {size(usual)}/s" if len(links) > 1 else ""
    remedy = f"look at the cable, port and load of {shortened(_suspects(slow, host_of))}, or leave it out"
    bad = Finding("links", found, "none at less than half the usual speed", Level.warn, remedy)
    return bad.unless(not slow)


def judge_sums(
    sums: list[Sum], num_bytes: int, sends_less: str | None, step_s: float | None
) -> Finding:
    """The gradients of a step, `num_bytes`, against the backward pass behind which DDP can hide them.

    step_s: of a step without communication, if it is known; two thirds of it are the backward pass. sends_less: the
    choice that does not send all of them.
    """
    if not sums:
        return Finding("gradients", "one process", "nothing to sum")
    takes = seconds_for(num_bytes, sums)
    found = f"{size(num_bytes)} a step, {seconds(takes)} to sum"
    if sends_less:
        return Finding("gradients", f"{sends_less} sends less than the {found}", "nothing")
    if step_s is None:
        return Finding("gradients", found, "a step was not timed")
    needed = f"less than the {seconds(step_s * 2 / 3)} of a backward pass"
    remedy = "a larger trainer.global_batch_size, a faster link, or fewer bytes (parallel=hybrid, parallel.hook=bf16)"
    lost = max(0.0, takes - step_s * 2 / 3)
    found += (
        f": a step takes {seconds(step_s)}, and at least {seconds(step_s + lost)} with it"
        if lost
        else ""
    )
    return Finding("gradients", found, needed, Level.warn, remedy).unless(takes <= step_s * 2 / 3)


def judge_clocks(skews: dict[int, float], host_of: Callable[[int], str]) -> Finding:
    """Time stamps of logs and files can be compared."""
    if not skews:
        return Finding("clock", "one node", "none")
    worst = max(skews, key=lambda leader: abs(skews[leader]))
    found = f"{host_of(worst)} is {seconds(abs(skews[worst]))} {'ahead' if skews[worst] > 0 else 'behind'}"
    bad = Finding(
        "clock",
        found,
        f"within {_MOST_SKEW_S:.0f} s of rank 0's",
        Level.warn,
        "run chrony or ntpd there",
    )
    return bad.unless(abs(skews[worst]) <= _MOST_SKEW_S)


def _told(link: Link, host_of: Callable[[int], str]) -> str:
    rate = f"{size(link.bytes_per_s)}/s ({link.bytes_per_s * 8 / 1e9:.3g} Gbit/s)"
    return f"{host_of(link.first)} - {host_of(link.second)} {rate}, {seconds(link.latency_s)}"


def _suspects(slow: list[Link], host_of: Callable[[int], str]) -> list[str]:
    """The nodes that have most of the slow links."""
    count = Counter(end for link in slow for end in (link.first, link.second))
    return [host_of(end) for end in sorted(count) if count[end] == max(count.values())]


def _probe(mine: int, peer: int, world: World, budget_s: float) -> Link:
    """Round trips with growing messages until they take a third of the budget; each is announced by its size."""
    head, latency, rate = torch.zeros(1, dtype=torch.int64, device=world.device), float("inf"), 0.0
    num_bytes, began = 4, time.monotonic()
    while num_bytes <= _LARGEST and time.monotonic() - began < budget_s / 3:
        x = torch.zeros(num_bytes, dtype=torch.uint8, device=world.device)
        times = []
        for _ in range(21 if num_bytes == 4 else 3):  # the first one of all opens the connection
            dist.send(head.fill_(num_bytes), peer)
            times.append(_timed(lambda x=x: (dist.send(x, peer), dist.recv(x, peer)), world))
            if time.monotonic() - began > budget_s / 3:
                break
        if num_bytes == 4:
            latency = statistics.median(times) / 2
        else:
            rate = (
                2 * num_bytes / statistics.median(times)
            )  # of the largest one: small ones fit into buffers
        num_bytes = num_bytes * 8 if num_bytes > 4 else 64_000
    dist.send(head.zero_(), peer)
    return Link(mine, peer, latency, rate or 4 / latency)


def _answer(peer: int, world: World) -> None:
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
    """Collective. The longest time of all ranks: they agree on it, and begin the next one together."""
    x = torch.tensor(s, dtype=torch.float64, device=world.device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def _finish(world: World) -> None:
    """Collectives of a GPU return before they are done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
