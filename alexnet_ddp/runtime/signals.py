"""Stop signals during a run: the handler sets a flag, which the training loop polls."""

import os
import time
from types import FrameType

from alexnet_ddp.runtime import startup
from alexnet_ddp.runtime.errors import (
    Preempted,
    code_for_caller,
    was_asked_to_stop,
    write_exit_code,
)

_SAME_EVENT_S = 5.0  # a launcher and a scheduler both forward one signal within this time


class StopSignal:
    """Requests a stop after a step when SIGTERM, SIGINT, SIGHUP or SIGUSR1 arrives.

    The run stops at the next step after which all replicas are equal. A second signal more than 5
    seconds after the first exits at once with 75.

    Attributes:
        received: a stop was requested. Deadline sets it too; a signal after that still counts as
            the first one.
        for_good: a service requested the stop, and nothing starts the run again by itself.
    """

    def __init__(self) -> None:
        self.received = False
        self.for_good = False
        self._first_at: float | None = None
        startup.handle_stop_signals(self._on_signal)

    def stop_for_good(self) -> None:
        """Request a stop after which nothing starts the run again. Any thread may call it."""
        self.for_good = True
        self.received = True

    def is_from_outside(self) -> bool:
        """Return whether a stop signal arrived, and not only because another rank has failed."""
        return self._first_at is not None and was_asked_to_stop()

    def ignore(self) -> None:
        """Ignore further signals: the run is saved, and its last output must not be cut off."""
        startup.ignore_stop_signals()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self.received = True
            self._first_at = now
        elif now - self._first_at > _SAME_EVENT_S:
            write_exit_code(Preempted.exit_code)
            os._exit(code_for_caller(Preempted.exit_code))  # checkpoints are committed by rename
