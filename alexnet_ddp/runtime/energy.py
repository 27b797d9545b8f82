"""Reads counters of energy: NVML's of a GPU, and RAPL's of a machine's CPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Counter:
    """A counter that only rises until it begins again at 0.

    read: returns its state, or raises OSError or ValueError. joules: of one count. limit: counts
    after which it begins again; None if it does not.
    """

    read: Callable[[], int]
    joules: float
    limit: int | None = None
    last: int = 0

    def used(self) -> float:
        """The joules since the last call; the first call returns no useful number.

        Raises what `read` raises.
        """
        now = self.read()
        counts, self.last = now - self.last, now
        if counts < 0 and self.limit is not None:
            counts += self.limit
        return self.joules * counts


def cpu_counters(folder: Path = POWERCAP) -> list[Counter]:
    """The counters of all CPU packages of this machine; empty if one of them cannot be read.

    Other programs on the machine are counted too.
    """
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")):  # AMD's CPUs have the same name
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue  # a part of a package, or the whole platform
            limit = int((zone / "max_energy_range_uj").read_text())
            counter = Counter(partial(_number, zone / "energy_uj"), 1e-6, limit)
            counter.used()
        except (OSError, ValueError):  # only root may read it on most machines
            return []
        found.append(counter)
    return found


def _number(file: Path) -> int:
    return int(file.read_text())


def gpu_counters(device: torch.device) -> list[Counter]:
    """The counter of a GPU; empty without nvidia-ml-py, or if the GPU has none."""
    if find_spec("pynvml") is None:
        return []
    import pynvml

    def read() -> int:
        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except pynvml.NVMLError as error:  # such as GpuIsLost
            raise OSError(f"NVML: {error}") from error

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        counter = Counter(read, 1e-3)
        counter.used()
    except (pynvml.NVMLError, OSError):  # such as NotSupported, before Volta
        return []
    return [counter]
