"""Divides the GPUs and cores of this machine between the trials that run at the same time."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alexnet_ddp.config import Config, ConfigError, DDPConfig, Hook
from alexnet_ddp.config.run import Device
from alexnet_ddp.runtime.environment import num_usable_cores

# Like CUDA, stop at the first unknown entry. launch/common.sh reads the variable in the same way.
_KNOWN = re.compile(r"\d+|GPU-.+|MIG-.+")


@dataclass(frozen=True)
class Slot:
    """What a trial may use. cores: empty for all. gpus: the value of CUDA_VISIBLE_DEVICES."""

    cores: tuple[int, ...] = ()
    gpus: str | None = None

    @property
    def env(self) -> dict[str, str]:
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}


def divide(parallel: int, device: Device, env: Mapping[str, str]) -> list[Slot]:
    """`parallel` equal slots. Raises ConfigError if there are too few GPUs or cores for them."""
    if parallel == 1:
        return [Slot()]
    gpus = [] if device is Device.cpu else visible_gpus(env)
    if gpus and len(gpus) % parallel:
        known = [n for n in range(1, len(gpus) + 1) if len(gpus) % n == 0]
        rule = f"must divide the {len(gpus)} GPUs, so that all trials have as many"
        raise ConfigError(f"sweep.parallel ({parallel}) {rule}; possible: {known}")
    num_cores = num_usable_cores()
    if parallel > num_cores:
        rule = f"must be at most the number of cores ({num_cores})"
        raise ConfigError(f"sweep.parallel ({parallel}) {rule}")
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if has_affinity else []
    size, share = num_cores // parallel, len(gpus) // parallel
    return [
        Slot(
            tuple(cores[k * size : (k + 1) * size]),
            ",".join(gpus[k * share : (k + 1) * share]) if gpus else None,
        )
        for k in range(parallel)
    ]


def merged(slots: Sequence[Slot]) -> Slot:
    """One slot with the devices of all `slots`."""
    ordered = sorted(slots, key=lambda one: (one.cores, one.gpus or ""))
    gpus = [one.gpus for one in ordered if one.gpus is not None]
    cores = tuple(core for one in ordered for core in one.cores)
    return Slot(cores, ",".join(gpus) if gpus else None)


def check_promotion(cfg: Config, slot: Slot, env: Mapping[str, str]) -> None:
    """Raise ConfigError if a trial with `cfg` cannot continue with several slots.

    On CPUs it always can: its number of ranks stays the same.
    """
    if slot.gpus is None:
        return
    if "NPROC" in env:
        rule = f"would be ignored with NPROC={env['NPROC']}: every start has so many processes"
        raise ConfigError(f"sweep.promote=true {rule}; unset it")
    hook = cfg.parallel.hook if isinstance(cfg.parallel, DDPConfig) else Hook.none
    if hook in (Hook.powersgd, Hook.post_local_sgd):
        rule = "changes the number of ranks, on which the result depends with"
        remedy = "leave sweep.promote false, or use another hook"
        raise ConfigError(f"sweep.promote=true {rule} parallel.hook={hook.value}; {remedy}")


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """The GPUs that a child process would see, as entries of CUDA_VISIBLE_DEVICES."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    count = len(re.findall(r"^GPU ", done.stdout, re.MULTILINE))
    found = [str(k) for k in range(count)]
    if "CUDA_VISIBLE_DEVICES" in env:
        found = []
        for entry in env["CUDA_VISIBLE_DEVICES"].split(","):
            if not _KNOWN.fullmatch(entry) or len(found) == count:
                break
            found.append(entry)
    return found
