"""The process that writes a run's checkpoints while the run goes on: python -m alexnet_ddp.checkpoint.writer

It maps the memory whose descriptor is its argument, reads one Order a line, as JSON, and answers each with one Reply.
It needs no torch, so it starts in a tenth of a second. When its run has ended, by whatever means, it finishes what it
has begun and ends: a checkpoint that was taken is not lost with the process that took it.
"""

import json
import logging
import mmap
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from alexnet_ddp.checkpoint import format as files
from alexnet_ddp.checkpoint import remote
from alexnet_ddp.checkpoint.format import Rejected
from alexnet_ddp.runtime.files import write_json

_RUN = os.getppid()  # the process that trains, while it lives


@dataclass(frozen=True)
class Order:
    """One checkpoint to write, and what may go once it is there."""

    directory: str  # of the checkpoints
    step: int
    places: dict[str, tuple[int, int]]  # file stem -> where its bytes lie in the memory
    state: dict  # for state.json
    best: dict  # step and val/top1 of the best evaluation; empty before there is one
    keep_last: int
    keep_every_steps: int | None
    copy_to: str | None  # URL


@dataclass(frozen=True)
class Reply:
    step: int
    error: str = ""  # why there is no such checkpoint
    not_finite: bool = False  # that is why: its weights are not finite
    warning: str = ""  # it is there, but old ones are too, or its copy is not
    seconds: float = 0.0


def obey(order: Order, memory: memoryview, copier: "Copier") -> Reply:
    """Write, verify, and only then drop what is not kept. Copies are made afterwards, while the next one may come."""
    began, directory = time.monotonic(), Path(order.directory)
    contents = {
        f"{stem}.safetensors": memory[start:end] for stem, (start, end) in order.places.items()
    }
    try:
        written = files.write(directory, order.step, {**contents, "state.json": _json(order.state)})
    except (OSError, Rejected) as error:
        return Reply(order.step, error=str(error), not_finite=isinstance(error, files.NotFinite))
    warnings = [copier.warning()]
    copier.offer(order, written)
    if (
        os.getppid() == _RUN
    ):  # else the run may go on in another process, which knows better what is old
        warnings += [_attempt(lambda: _drop_old(directory, order, copier.held()))]
    if order.best:
        best = {**order.best, "checkpoint": f"step-{order.best['step']:08d}"}
        warnings += [_attempt(lambda: write_json(directory.parent / "best.json", best))]
    return Reply(
        order.step, warning="; ".join(filter(None, warnings)), seconds=time.monotonic() - began
    )


def _attempt(action: Callable[[], object]) -> str:
    """What went wrong, in a line; empty where nothing did. Of a saved step, nothing that follows can unsave it."""
    try:
        action()
        return ""
    except Exception as error:  # of any store
        return " ".join(f"{type(error).__name__}: {error}".split())


def to_keep(steps: list[int], order: Order) -> set[int]:
    """Of these, in order. Later ones than the order's go: they were rejected when this run resumed."""
    past = [step for step in steps if step <= order.step]
    every = order.keep_every_steps
    due = [step for step in past if every is not None and step % every == 0]
    return {*past[-order.keep_last :], *due, order.best.get("step", -1)}


def _drop_old(directory: Path, order: Order, held: set[int]) -> None:
    found = files.listed(directory)
    kept = to_keep([files.step_of(checkpoint) for checkpoint in found], order) | held
    for checkpoint in found:
        if files.step_of(checkpoint) not in kept:
            files.remove(checkpoint)


class Copier:
    """Copies the newest checkpoint that it was offered, in a thread: a slow store delays neither saves nor a stop."""

    def __init__(self) -> None:
        self._offers: queue.SimpleQueue[tuple[Order, Path] | None] = queue.SimpleQueue()
        self._held: list[int] = []  # steps that are being copied, or wait for it
        self._warning = ""
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def offer(self, order: Order, checkpoint: Path) -> None:
        if order.copy_to:
            self._held.append(order.step)
            self._offers.put((order, checkpoint))

    def held(self) -> set[int]:
        """Those that must stay until they are copied: the one in work and the newest; a store that is away holds 2."""
        return {*self._held[:1], *self._held[-1:]}

    def warning(self) -> str:
        found, self._warning = self._warning, ""
        return found

    def finish(self) -> None:
        """Wait for the last copy."""
        self._offers.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (offer := self._offers.get()) is not None:
            order, checkpoint = offer
            if order.step == self._held[-1]:  # else a newer one waits
                self._warning = _attempt(
                    lambda order=order, checkpoint=checkpoint: self._copy(order, checkpoint)
                )
            self._held.pop(0)

    @staticmethod
    def _copy(order: Order, checkpoint: Path) -> None:
        remote.copy(checkpoint, order.copy_to)
        if os.getppid() == _RUN:
            remote.keep_only(lambda steps: to_keep(steps, order), order.copy_to)


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=1).encode()


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they mean the run, which says here what it wants
    os.nice(10)
    copier = Copier()
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as memory:
        for line in sys.stdin:
            order = Order(**json.loads(line))
            _say(obey(order, memory, copier))
    copier.finish()
    warning = copier.warning()
    if warning:
        _say(Reply(order.step, warning=warning))


def _say(reply: Reply) -> None:
    with suppress(BrokenPipeError):  # the run is gone, its checkpoint is not
        print(json.dumps(asdict(reply)), flush=True)


if __name__ == "__main__":
    logging.disable()
    main(int(sys.argv[1]))
