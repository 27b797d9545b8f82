"""Measures for a few seconds how fast this rank computes, and how fast it loads images."""

import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from alexnet_ddp.doctor.facts import Facts
from alexnet_ddp.doctor.findings import Finding, Level, format_bytes
from alexnet_ddp.runtime.errors import DataError

_TOO_SLOW = "were not opened within"
STEP_S, LOADER_S = 3.0, 3.0  # duration of each measurement

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """What a rank measured with the run's model and images. None: it could not be measured."""

    train_images_per_s: float | None = None  # forward and backward
    load_images_per_s: float | None = None
    peak_memory: int = 0  # bytes
    gradient_bytes: int = 0
    checkpoint_bytes: int = 0
    can_split: bool = True  # hybrid parallelism has layers to split
    images: str | None = None  # fingerprint of the training images
    error: str = ""


def measure_step(one_pass: Callable[[int], object], max_images: int, device: torch.device) -> float:
    """Return the images per second of one_pass(n), a forward and backward pass over n images.

    n is `max_images` on a GPU. On a CPU it is a number that takes a second or two.
    """

    def timed(n: int) -> float:
        began = time.perf_counter()
        one_pass(n)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    n = max_images if device.type == "cuda" else min(4, max_images)
    timed(n)  # allocates the gradients and selects kernels
    while timed(n) < STEP_S / 2 and n < max_images:
        n = min(2 * n, max_images)
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < STEP_S:
        timed(n)
        count += n
    return count / (time.perf_counter() - began)


def measure_loader(batches: Iterator[Tensor]) -> float:
    """Return the images per second of an iterator over labels, after its first batch."""
    next(batches)
    began, count = time.perf_counter(), 0
    for labels in batches:
        count += len(labels)
        if time.perf_counter() - began > LOADER_S:
            break
    return count / (time.perf_counter() - began)


def with_timeout(limit_s: float, act: Callable[[], T]) -> T:
    """Return act(), which runs in a thread that is abandoned after `limit_s`.

    Raises DataError then, and what act() raises.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(limit_s)
    except TimeoutError as error:
        raise DataError(f"the images {_TOO_SLOW} {limit_s:.0f} s") from error


def peak_memory() -> int:
    """Return the maximum resident set size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slowest(rates: Iterable[float | None]) -> float | None:
    """Return the lowest rate that was measured; None if no rank measured one."""
    return min((rate for rate in rates if rate), default=None)


def check_ranks(measured: list[Measurement], all_facts: list[Facts]) -> list[Finding]:
    """Check the measurements of all ranks; both lists are in the order of the ranks."""
    step = check_errors(
        [f"{one.name}: {m.error}" for one, m in zip(all_facts, measured) if m.error]
    )
    if step.level is Level.ok and len({m.images for m in measured}) > 1:
        step = Finding(
            "step",
            "ranks have different training images",
            "the same on every rank",
            Level.fail,
            "copy data.root again, or use one shared folder",
        )
    loader = check_loader(
        slowest(m.load_images_per_s for m in measured),
        slowest(m.train_images_per_s for m in measured),
        all_facts[0].device == "cpu",
    )
    return [step, loader, *_check_memory_of_nodes(measured, all_facts)]


def _check_memory_of_nodes(measured: list[Measurement], all_facts: list[Facts]) -> list[Finding]:
    """Return the first bad findings of the nodes, or one good finding."""
    starts = [one.rank for one in all_facts if one.is_leader]
    memory = []
    for start, end in pairwise([*starts, len(all_facts)]):
        needed = sum(m.peak_memory for m in measured[start:end])
        if start == 0:  # a save copies the state before it is written
            needed += measured[0].checkpoint_bytes
        memory.append(check_memory(all_facts[start].memory, needed, all_facts[start].host))
    return [bad for bad in memory if bad.level is not Level.ok][:4] or memory[:1]


def check_errors(errors: list[str]) -> Finding:
    """Report the first error that prevented a rank from using the images or the model."""
    needed = "a model and images that a step can use"
    if not errors:
        return Finding("step", "the model accepts the images", needed)
    if all(_TOO_SLOW in error for error in errors):
        remedy = "the first start waits for them; later ones do not"
        return Finding("step", errors[0], needed, Level.warn, remedy)
    return Finding("step", errors[0], needed, Level.fail, "the message names what to change")


def check_loader(
    load_images_per_s: float | None, train_images_per_s: float | None, shares_cores: bool
) -> Finding:
    """Compare loading with training on the slowest ranks.

    shares_cores: the step is computed on the CPU, by the cores that load the images.
    """
    if load_images_per_s is None or train_images_per_s is None:
        return Finding("loader", "not measured, see step", "the images per second of a step")
    found = f"{load_images_per_s:,.0f} images/s per rank"
    if shares_cores:
        share = train_images_per_s / (load_images_per_s + train_images_per_s)
        found += f"; loading takes {100 * share:.0f} % of the cores"
    bad = Finding(
        "loader",
        found,
        f"{train_images_per_s:,.0f} images/s, the rate of a step",
        Level.warn,
        "pack the images (alexnet_ddp.prepare, shorter_side=256 or encoding=raw), or give each "
        "rank more cores",
    )
    return bad.ok_if(load_images_per_s >= train_images_per_s)


def check_memory(free: int, needed: int, host: str) -> Finding:
    """Check one node. needed: peak bytes of its ranks, and the copy of a checkpoint."""
    bad = Finding(
        "memory",
        f"{format_bytes(free)} free on {host}",
        f"{format_bytes(needed)} for its ranks",
        Level.warn,
        "fewer processes on that node, or a smaller trainer.micro_batch_size",
    )
    return bad.ok_if(free >= needed)
