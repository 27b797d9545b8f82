"""Stop signals: the handler notes that one came, and the run looks at the note where it can act on it."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from alexnet_ddp.errors import Preempted, leave_code

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SAME_EVENT_S = 5.0  # a launcher and a scheduler both pass on one signal; later ones mean it


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a stop at the next step that leaves the ranks equal.

    Another, seconds later, exits at once.
    """

    def __init__(self) -> None:
        self.received = False  # resilience/deadline.py sets it too, which no signal is a repetition of
        self._first_at: float | None = None
        for number in _STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()

    def ignore(self) -> None:
        """The run is saved and about to leave: a launcher's next signal must not cut its last words short."""
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is not None and now - self._first_at > _SAME_EVENT_S:
            leave_code(Preempted.exit_code)
            os._exit(Preempted.exit_code)  # checkpoints are committed by rename: nothing can be torn
        if self._first_at is None:
            self.received, self._first_at = True, now


def end_with_parent() -> None:
    """From here on the kernel sends SIGTERM when the process that started this one is gone (Linux only).

    A launcher that is killed cannot end what it started.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
