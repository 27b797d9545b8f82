"""The process that writes a run's checkpoints while the run goes on: python -m alexnet_ddp.checkpoint.writer

It maps the memory whose descriptor is its argument, reads one Order a line, as JSON, and answers each with one Reply.
It needs no torch, so it starts in a tenth of a second. When its run has ended, by whatever means, it finishes what it
has begun and ends: a checkpoint that was taken is not lost with the process that took it.
"""

import json
import logging
import mmap
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from alexnet_ddp.atomic import write_json
from alexnet_ddp.checkpoint import files, remote
from alexnet_ddp.checkpoint.files import Rejected

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
    warning: str = ""  # it is there, but old ones are too, or its copy is not
    seconds: float = 0.0


def obey(order: Order, memory: memoryview) -> Reply:
    """Write, verify, copy, verify the copy, and only then drop what is not kept."""
    began, directory = time.monotonic(), Path(order.directory)
    contents = {f"{stem}.safetensors": memory[start:end] for stem, (start, end) in order.places.items()}
    try:
        written = files.write(directory, order.step, {**contents, "state.json": _json(order.state)})
    except (OSError, Rejected) as error:
        return Reply(order.step, error=str(error))
    warning = ""
    try:
        if order.best:
            best = {**order.best, "checkpoint": f"step-{order.best['step']:08d}"}
            write_json(directory.parent / "best.json", best)
        if order.copy_to:
            remote.copy(written, order.copy_to)
        if os.getppid() == _RUN:  # else the run may go on in another process, which knows better what is old
            kept = _drop_old(directory, order)
            if order.copy_to:
                remote.keep_only(kept, order.copy_to)
    except Exception as error:  # of any store: a saved step stays saved
        warning = " ".join(f"{type(error).__name__}: {error}".split())
    return Reply(order.step, warning=warning, seconds=time.monotonic() - began)


def _drop_old(directory: Path, order: Order) -> set[str]:
    """Names of the checkpoints that stay. Those of later steps go too: they were rejected when this run resumed."""
    found = files.listed(directory)
    kept = [d for d in found if files.step_of(d) <= order.step][-order.keep_last :]
    for checkpoint in found:
        step = files.step_of(checkpoint)
        is_due = order.keep_every_steps is not None and step % order.keep_every_steps == 0 and step <= order.step
        if checkpoint in kept or step == order.best.get("step") or is_due:
            kept.append(checkpoint)
        else:
            files.remove(checkpoint)
    return {checkpoint.name for checkpoint in kept}


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=1).encode()


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they mean the run, which says here what it wants
    os.nice(10)
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as memory:
        for line in sys.stdin:
            reply = obey(Order(**json.loads(line)), memory)
            try:
                print(json.dumps(asdict(reply)), flush=True)
            except BrokenPipeError:  # the run is gone, its checkpoint is not
                os._exit(0)


if __name__ == "__main__":
    logging.disable()
    main(int(sys.argv[1]))
