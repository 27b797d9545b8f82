"""How well the devices are used: the share of their peak, and the energy of an image."""

import logging
import math

import torch
from torch import nn

from alexnet_ddp.config import Config
from alexnet_ddp.cost_model.machine import peak_flops
from alexnet_ddp.cost_model.network import read_network
from alexnet_ddp.runtime.distributed import World, all_gather_objects, any_rank, sum_over_ranks
from alexnet_ddp.runtime.energy import Counter, cpu_counters, gpu_counters

log = logging.getLogger(__name__)


class ModelFlops:
    """FLOPs of training on an image, and the peak of all ranks' GPUs together.

    facts: for the record of the run; empty if a peak is not known, as for CPUs, or if a part of the
    network is frozen.

    Collective. model: the full network. It is not changed.
    """

    def __init__(self, cfg: Config, model: nn.Module, world: World) -> None:
        self._cfg = cfg
        self._of_size: dict[int, float] = {}  # image size -> FLOPs
        self.facts: dict[str, object] = {}
        is_gpu = world.device.type == "cuda"
        name = torch.cuda.get_device_name(world.device) if is_gpu else ""
        precision, tf32 = cfg.trainer.precision, cfg.trainer.tf32
        peaks = all_gather_objects([peak_flops(name, precision, tf32) if is_gpu else None])
        known = [peak for peak in peaks if peak is not None]
        if len(known) < len(peaks) or cfg.finetune.freezes:
            return
        sizes = {cfg.data.train_image_size(epoch) for epoch in range(cfg.trainer.epochs + 1)}
        try:
            self._of_size = {size: read_network(model, size).train_flops for size in sizes}
        except Exception as error:  # a network of a plugin that does not run on the meta device
            log.info("train/mfu is not logged: %s: %s", type(error).__name__, error)
            return
        self._peak = sum(flops for flops, _ in known)
        self.facts = {"gpu": name, "peak_tflops": known[0][0] / 1e12, "peak_source": known[0][1]}

    def row(self, images_per_s: float, epoch: int) -> dict[str, float]:
        """Return train/mfu in percent (model FLOPs utilisation: Chowdhery et al., PaLM, 2022)."""
        if not self._of_size:
            return {}
        flops = self._of_size[self._cfg.data.train_image_size(epoch)]
        return {"train/mfu": 100 * images_per_s * flops / self._peak}


class EnergyMeter:
    """Joules of the GPUs of all ranks, or without GPUs of the CPUs of all machines.

    Collective. It measures nothing unless all of them have a counter. If a counter fails later, the
    row in progress and all later ones are empty, on all ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._joules = 0.0  # before the last pause
        self._counters: list[Counter] = []
        measures = True
        if world.device.type == "cuda":
            self._counters = gpu_counters(world.device)
        elif world.local_rank == 0:
            self._counters = cpu_counters()
        else:
            measures = False  # local rank 0 measures the whole machine
        self._has_failed = False  # on this rank
        self._is_on = not any_rank(measures and not self._counters, world)

    def pause(self) -> None:
        """Stop counting: an evaluation or a checkpoint begins."""
        self._joules += self._used()

    def resume(self) -> None:
        """Count again."""
        self._used()

    def row(self, num_images: float) -> dict[str, float]:
        """Collective. Return train/joules_per_image since the last row. num_images: of all."""
        if not self._is_on:
            return {}
        mine = self._joules + self._used()
        self._joules = 0.0
        joules = torch.tensor(mine, dtype=torch.float64, device=self._world.device)
        total = float(sum_over_ranks(joules))
        self._is_on = not math.isnan(total)
        return {"train/joules_per_image": total / num_images} if self._is_on and num_images else {}

    def _used(self) -> float:
        """The joules since the last call; NaN, which the sum over ranks keeps, after a failure."""
        if not self._is_on:
            return 0.0
        if self._has_failed:
            return math.nan
        try:
            return sum(counter.used() for counter in self._counters)
        except (OSError, ValueError) as error:
            log.warning("train/joules_per_image is no longer logged: %s", error)
            self._has_failed = True
            return math.nan
