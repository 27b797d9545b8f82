"""The run's side of writer.py: hand it a copy of the tensors, and hear later how it went."""

import json
import subprocess
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import wait as poll

from alexnet_ddp.checkpoint.layout import SharedMemory, Tensors
from alexnet_ddp.checkpoint.writer import Order, Reply
from alexnet_ddp.runtime import helper_process

Groups = dict[str, Tensors]  # file stem -> tensors by name


class BackgroundWriter:
    """One writer process, one buffer: an order is taken when the one before is answered, and none waits in a queue."""

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None
        self._process: subprocess.Popen | None = None
        self._step: int | None = None  # of the order that is not answered yet

    @property
    def is_busy(self) -> bool:
        return self._step is not None

    def prepare(self, size: int) -> None:
        """Have `size` bytes and a process ready, so that no step waits for them. Raises OSError."""
        if self._memory is None or self._memory.size < size:
            self.close()
            self._memory = SharedMemory(size)
        if self._process is None:
            file = self._memory.file
            self._process = helper_process.start(
                "checkpoint.writer", str(file.fileno()), [file], stdout=subprocess.PIPE
            )

    def start(self, order: Order, groups: Groups, metadata: dict[str, str]) -> None:
        """Copy the tensors, which may change when this returns, and let them be written. After prepare(), and not while
        it is busy.

        order.places: filled in here. metadata: for the header of each file.
        """
        assert not self.is_busy
        places = self._memory.store(groups, metadata)
        self._step = order.step
        with suppress(BrokenPipeError):  # it is dead: reply() says so
            self._process.stdin.write(
                json.dumps({**asdict(order), "places": places}).encode() + b"\n"
            )
            self._process.stdin.flush()

    def reply(self, wait: bool = False) -> Reply | None:
        """The answer to the last order, once; None while there is none. A writer that died is an answer, too."""
        if not self.is_busy or not (wait or poll([self._process.stdout], 0)):
            return None
        line, step = self._process.stdout.readline(), self._step
        self._step = None
        if line.endswith(b"\n"):
            return Reply(**json.loads(line))
        process, self._process = self._process, None
        return Reply(step, error=f"the process that writes checkpoints ended with {_end(process)}")

    def close(self) -> Reply | None:
        """Wait for what is being written and copied, and let the process go; its last words, if there are some."""
        last = None
        if self._process is not None:
            self.reply(wait=True)
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            line = self._process.stdout.readline()
            last = Reply(**json.loads(line)) if line.endswith(b"\n") else None
            _end(self._process)
        self._process = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        return last


def _end(process: subprocess.Popen) -> int:
    """Its exit code, negative where a signal ended it."""
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    return process.wait()
