"""What this machine's device does, from a short run: a few seconds of training steps on random images."""

import os
import time
from collections.abc import Callable

import torch
from torch import nn

from alexnet_ddp.config import Precision
from alexnet_ddp.cost_model.machine import GLOO_HOST_S_PER_BYTE, GPU_OVERHEAD_S, Device
from alexnet_ddp.cost_model.network import Network
from alexnet_ddp.runtime.environment import num_usable_cores

_STEPS, _COPIED = 5, 16_000_000  # timed, after two that are not; floats


def measure_device(
    model: nn.Module,
    network: Network,
    shape: tuple[int, int],
    precision: Precision,
    device: torch.device,
    ranks: int,
) -> Device:
    """One of `ranks` ranks on this machine. shape: images a step, and their size in pixels. Dropout is left out."""
    is_gpu, cores = device.type == "cuda", num_usable_cores()
    if not is_gpu:
        torch.set_num_threads(max(1, cores // ranks))
    model = model.to(device, memory_format=torch.channels_last).eval()
    images, pixels = shape
    batch = torch.randn(images, 3, pixels, pixels, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    half = torch.float16 if precision is Precision.fp16 else torch.bfloat16

    def step() -> None:
        with torch.autocast(device.type, half, enabled=precision is not Precision.fp32):
            loss = nn.functional.cross_entropy(model(batch), labels)
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()

    source, target = torch.ones(_COPIED, device=device), torch.empty(_COPIED, device=device)
    seconds = _best_seconds(step, is_gpu)
    copied_per_s = 2 * 4 * _COPIED / _best_seconds(lambda: target.copy_(source), is_gpu)
    overhead, host = (GPU_OVERHEAD_S, 0.0) if is_gpu else (0.0, GLOO_HOST_S_PER_BYTE)
    busy = max(seconds - overhead, seconds / 2)  # launches are in it already
    name = (
        torch.cuda.get_device_name(device)
        if is_gpu
        else f"{max(1, cores // ranks)} of {cores} cores"
    )
    memory = (
        torch.cuda.get_device_properties(device).total_memory if is_gpu else _host_memory() / ranks
    )
    flops = network.train_flops * images / busy
    return Device(
        name,
        flops,
        memory,
        copied_per_s,
        overhead,
        host,
        f"measured: {images / seconds:,.0f} images/s",
    )


def _best_seconds(run: Callable[[], object], is_gpu: bool) -> float:
    """Of a few: what else the machine does now, it will not do then."""
    taken = []
    for _ in range(_STEPS + 2):
        began = time.perf_counter()
        run()
        if is_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[2:])


def _host_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
