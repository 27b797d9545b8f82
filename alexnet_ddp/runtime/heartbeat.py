"""What a rank shows of itself to its watchdog: a few numbers in memory that both see. Needs no torch.

The memory has no name, so nothing is left behind, and looking at it needs nothing of the rank: not even its GIL.
"""

import mmap
import struct
import time
from dataclasses import dataclass
from typing import BinaryIO

from alexnet_ddp.runtime.helper_process import shared_file

WAITING = "wait for the others"  # from the first collective of a step on
PHASES = ("start", "data", "forward", WAITING, "update", "evaluate", "checkpoint", "end")

_FORMAT = struct.Struct("<dddiiq16q")  # see Sighting
_INDICES = 16


@dataclass(frozen=True)
class Sighting:
    """The state of a rank as it last showed it. Times are of time.monotonic(), which is the machine's."""

    progress_at: float
    ticked_at: float  # by a thread of its own: old where the GIL is held, or the process stopped
    limit_s: float  # without progress, before it is taken for hung
    phase: str
    step: int  # steps done
    indices: list[int]  # the first ones of the images in work


class Heartbeat:
    """Written by the rank, read by its watchdog. file: what another Heartbeat has made."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.file = file or shared_file("beacon", _FORMAT.size)
        self._map = mmap.mmap(self.file.fileno(), _FORMAT.size)

    def show(self, limit_s: float, phase: str, step: int, indices: list[int]) -> None:
        """Progress, now."""
        now, first = time.monotonic(), indices[:_INDICES]
        padded = [*first, *[-1] * (_INDICES - len(first))]
        self._map[:] = _FORMAT.pack(
            now, now, limit_s, PHASES.index(phase), len(first), step, *padded
        )

    def tick(self) -> None:
        """Alive, if not further."""
        struct.pack_into("<d", self._map, 8, time.monotonic())

    def see(self) -> Sighting:
        progress_at, ticked_at, limit_s, phase, count, step, *indices = _FORMAT.unpack(self._map[:])
        return Sighting(progress_at, ticked_at, limit_s, PHASES[phase], step, indices[:count])
