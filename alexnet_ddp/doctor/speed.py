"""How fast this rank computes, and how fast its images come, each alone and for a few seconds."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from alexnet_ddp.doctor.facts import Facts
from alexnet_ddp.doctor.findings import Finding, Level, size
from alexnet_ddp.runtime.errors import DataError

_SLOW = "were not there within"
STEP_S, LOADER_S = 3.0, 3.0

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """What a rank found out about the run's model and images by using them. None: it could not."""

    computes: float | None = None  # images a second, forward and backward
    loads: float | None = None  # images a second
    peak_memory: int = 0  # bytes
    gradient_bytes: int = 0
    checkpoint_bytes: int = 0
    can_split: bool = True  # a hybrid pays
    images: str | None = None  # names the training images
    error: str = ""


def images_per_s(one_pass: Callable[[int], object], most: int, device: torch.device) -> float:
    """one_pass(n): n images forward and backward. A GPU takes `most` at once, a CPU what takes it a second or two."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(n: int) -> float:
        began = time.perf_counter()
        one_pass(n)
        finish()
        return time.perf_counter() - began

    n = most if device.type == "cuda" else min(4, most)
    timed(n)  # makes the gradients, and chooses kernels
    while timed(n) < STEP_S / 2 and n < most:
        n = min(2 * n, most)
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < STEP_S:
        timed(n)
        count += n
    return count / (time.perf_counter() - began)


def loaded_per_s(batches: Iterator[Tensor]) -> float:
    """Labels of batches as they come. What was filled ahead before the first one is there does not count."""
    next(batches)
    began, count = time.perf_counter(), 0
    for labels in batches:
        count += len(labels)
        if time.perf_counter() - began > LOADER_S:
            break
    return count / (time.perf_counter() - began)


def within(limit_s: float, act: Callable[[], T]) -> T:
    """act(), in a thread that is left behind where it takes longer. Raises DataError then, and what act raises."""
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
        raise DataError(f"the images {_SLOW} {limit_s:.0f} s") from error


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slowest(trials: list[Trial], what: str) -> float | None:
    """The least images a second of a rank; None where no rank knows."""
    return min((getattr(trial, what) for trial in trials if getattr(trial, what)), default=None)


def judge(trials: list[Trial], everyone: list[Facts]) -> list[Finding]:
    """All ranks' trials and facts, in the order of the ranks."""
    found = [
        judge_errors(
            [f"{one.who}: {trial.error}" for one, trial in zip(everyone, trials) if trial.error]
        )
    ]
    if found[0].verdict is Level.ok and len({trial.images for trial in trials}) > 1:
        remedy = "copy data.root anew, or use one shared folder"
        found = [
            Finding(
                "step", "ranks see different ones", "the same on every rank", Level.fail, remedy
            )
        ]
    found.append(
        judge_loader(
            slowest(trials, "loads"), slowest(trials, "computes"), everyone[0].device == "cpu"
        )
    )
    starts = [one.rank for one in everyone if one.is_leader]
    memory = []
    for start, end in pairwise([*starts, len(everyone)]):
        needed = sum(trial.peak_memory for trial in trials[start:end])
        copy = (
            trials[0].checkpoint_bytes if start == 0 else 0
        )  # a save copies the state before it is written
        memory.append(judge_memory(everyone[start].memory, needed + copy, everyone[start].host))
    return [*found, *([bad for bad in memory if bad.verdict is not Level.ok][:4] or memory[:1])]


def judge_errors(errors: list[str]) -> Finding:
    """What kept ranks from using the images or the model."""
    needed = "a model and images that a step can use"
    if not errors:
        return Finding("step", "found, and the model takes them", needed)
    if all(_SLOW in error for error in errors):
        return Finding(
            "step",
            errors[0],
            needed,
            Level.warn,
            "the first start waits for them; later ones do not",
        )
    return Finding("step", errors[0], needed, Level.fail, "the message says what to change")


def judge_loader(loads: float | None, computes: float | None, shares_cores: bool) -> Finding:
    """Images a second of the slowest rank. shares_cores: the step is computed by the cores that load."""
    if loads is None or computes is None:
        return Finding("loader", "not timed, see step", "as many images/s as the step takes")
    found = f"{loads:,.0f} images/s a rank" + (
        f"; loading takes {100 / loads / (1 / loads + 1 / computes):.0f} % of the cores"
        if shares_cores
        else ""
    )
    remedy = "pack the images (alexnet_ddp.prepare, shorter_side=256 or encoding=raw), or give a rank more cores"
    bad = Finding(
        "loader", found, f"{computes:,.0f} images/s, what a step computes", Level.warn, remedy
    )
    return bad.unless(loads >= computes)


def judge_memory(free: int, needed: int, host: str) -> Finding:
    """Of one node. needed: what its ranks held at most in the trial, and the copy of a checkpoint."""
    remedy = "fewer processes on that node, or a smaller trainer.micro_batch_size"
    bad = Finding(
        "memory",
        f"{size(free)} free on {host}",
        f"{size(needed)} for its ranks",
        Level.warn,
        remedy,
    )
    return bad.unless(free >= needed)
