"""Stop signals: the handler notes that one came, and the run looks at the note where it can act on it."""

import os
import signal
import time
from types import FrameType

from alexnet_ddp.runtime import startup
from alexnet_ddp.runtime.errors import Preempted, write_exit_code
from alexnet_ddp.runtime.startup import STOP_SIGNALS

_SAME_EVENT_S = 5.0  # a launcher and a scheduler both pass on one signal; later ones mean it


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a stop at the next step that leaves the ranks equal.

    Another, seconds later, exits at once.
    """

    def __init__(self) -> None:
        self.received = (
            False  # resilience/deadline.py sets it too, which no signal is a repetition of
        )
        self._first_at: float | None = None
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self._on_signal)

    def ignore(self) -> None:
        """The run is saved and about to leave: a launcher's next signal must not cut its last words short."""
        startup.ignore_stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is not None and now - self._first_at > _SAME_EVENT_S:
            write_exit_code(Preempted.exit_code)
            os._exit(
                Preempted.exit_code
            )  # checkpoints are committed by rename: nothing can be torn
        if self._first_at is None:
            self.received, self._first_at = True, now
