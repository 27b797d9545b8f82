"""Devices and links of a cluster, and all constants of the cost model.

The constants are few and physical. Those of GPUs were not fitted to any published run. Those of
CPUs and gloo were estimated from two steps of a prototype on a link that was not shaped.
tests/cost_model/test_cost_model.py shows how close the model is to published runs.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from alexnet_ddp.config import ConfigError, Precision
from alexnet_ddp.cost_model.network import Network
from alexnet_ddp.runtime.environment import num_usable_cores

# Of training on one image of 224 pixels, forward and backward.
ALEXNET_FLOPS = 4.145e9
# Assumed share of a GPU's peak that AlexNet reaches, if no figure was published.
SUSTAINED = 0.3
# Share of a nominal rate that NCCL reaches on large messages (nccl-tests' bus bandwidth).
LINK_REACHED = 0.8
# Payload of Ethernet frames of 1,500 bytes under TCP/IP: 1,448 of 1,538, and acknowledgements.
TCP_REACHED = 0.94
# Of a step: Python, and about 200 kernel launches.
GPU_OVERHEAD_S = 2e-3
# A core copies a byte into a socket and another out of one, and adds it; not overlapped.
GLOO_HOST_S_PER_BYTE = 1.7e-9
GLOO_LATENCY_US = 60.0
NCCL_LATENCY_US = 5.0
NETWORK_LATENCY_US = 15.0
# Of a core, if nothing is measured: fp32 of an AVX2 core, and its copies.
CPU_FLOPS_PER_S = 45e9
CPU_BYTES_PER_S = 9e9
# Share of a core's sgemm rate that AlexNet reaches.
SGEMM_SHARE = 0.65
# Memory and link of a GPU that is not in the table.
CUSTOM_BYTES_PER_S = 1e12
PCIE_GB_PER_S = 16.0
# Per parameter: SGD's four unfused passes; gradients copied into DDP's buckets and back.
TUTORIAL_UPDATE_BYTES = 60

# Of a measurement: timed steps, after two that are not timed, and floats that are copied.
_NUM_STEPS = 5
_NUM_COPIED = 16_000_000


@dataclass(frozen=True)
class Device:
    """The device of one rank. Rates are the reached ones, in bytes or FLOPs per second."""

    name: str
    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    overhead_s: float = GPU_OVERHEAD_S
    host_s_per_byte: float = 0.0  # computing time that is lost per byte sent
    origin: str = ""


@dataclass(frozen=True)
class Link:
    """Alpha-beta model: a message takes latency + bytes / rate. The rate is per direction."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Cluster:
    """Nodes with the same number of GPUs (or CPU ranks) each."""

    nodes: int
    gpus_per_node: int
    inside: Link  # from one GPU to the others of its node
    between: Link  # from one node to the others, shared by its GPUs
    trees: bool = True  # NCCL's trees need 2 log2(nodes) messages; gloo's ring 2 (ranks - 1)

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Gpu:
    """A row of the table. Peaks are dense. The link: one direction of all NVLinks, or of PCIe."""

    tflops: float  # fp32, or TF32 if the GPU has it (trainer.tf32)
    half_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float
    images_per_s: float | None = None  # measured: AlexNet at 224 pixels, fp32
    half_images_per_s: float | None = None
    origin: str = "NVIDIA's data sheet; AlexNet's share of the peak is assumed"
    fp32_tflops: float | None = None  # without TF32, if the GPU has it
    source: str = ""  # of the peaks; "" if no data sheet was looked up


_NVIDIA = "https://www.nvidia.com"
_DATA_CENTER = f"{_NVIDIA}/content/dam/en-zz/Solutions/Data-Center"
_P100 = "https://images.nvidia.com/content/tesla/pdf/nvidia-tesla-p100-datasheet.pdf"
_V100 = (
    "https://images.nvidia.com/content/technologies/volta/pdf/"
    "volta-v100-datasheet-update-us-1165301-r5.pdf"
)
_T4 = f"{_DATA_CENTER}/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_L4 = "https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet"
_A100 = f"{_DATA_CENTER}/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = f"{_NVIDIA}/en-us/data-center/h200/"

# All words of a name are in CUDA's name of the GPU. Without PCIE and NVL: the SXM form.
GPUS = {
    "K20": Gpu(3.52, 3.52, 5, 208, 8, 327, origin="98.05 h for 90 epochs on one: Krizhevsky 2014"),
    "P40": Gpu(
        11.8, 11.8, 24, 346, 16, 3325, 3325, origin="the share of its peak that a P100 reaches"
    ),
    "P100": Gpu(
        10.6,
        21.2,
        16,
        732,
        80,
        2987,
        origin="tf_cnn_benchmarks on DGX-1, batch 512: tensorflow.org 2017",
        source=_P100,
    ),
    "V100": Gpu(
        15.7,
        125,
        32,
        900,
        150,
        half_images_per_s=3300,
        origin="fp16: 512 of them / 410: Sun 2019",
        source=_V100,
    ),
    "V100-PCIE": Gpu(14, 112, 32, 900, 16, source=_V100),
    "T4": Gpu(8.1, 65, 16, 320, 16, source=_T4),
    "RTX4090": Gpu(82.6, 165, 24, 1008, 32, source=_ADA),
    "L4": Gpu(60, 121, 24, 300, 32, fp32_tflops=30.3, source=_L4),
    "A100": Gpu(156, 312, 80, 2039, 300, fp32_tflops=19.5, source=_A100),
    "H100": Gpu(495, 989, 80, 3350, 450, fp32_tflops=67, source=_H100),
    "H100-PCIE": Gpu(378, 756, 80, 2000, 64, fp32_tflops=51, source=_H100),
    "H100-NVL": Gpu(418, 835, 94, 3900, 300, fp32_tflops=60, source=_H100),
    "H200": Gpu(495, 989, 141, 4800, 450, fp32_tflops=67, source=_H200),
    "H200-NVL": Gpu(418, 835, 141, 4800, 450, fp32_tflops=60, source=_H200),
}

# According to their data sheets.
_WITHOUT_BF16 = [GPUS[name] for name in ("K20", "P40", "P100", "V100", "V100-PCIE", "T4")]


def find_gpu(name: str) -> Gpu | None:
    """The row of a GPU; `name` may be CUDA's ("NVIDIA A100-SXM4-80GB"). None: not in the table."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper().replace("RTX ", "RTX")))
    fitting = [known for known in GPUS if words.issuperset(known.split("-"))]
    return GPUS[max(fitting, key=len)] if fitting else None


def has_bf16(gpu: Gpu) -> bool:
    """True if the GPU computes in bf16 without emulation."""
    return gpu not in _WITHOUT_BF16


def peak_flops(name: str, precision: Precision, tf32: bool) -> tuple[float, str] | None:
    """The dense peak of a GPU in FLOPs per second, and its source; None if it is not known.

    name: CUDA's. tf32: whether products of float32 use TF32.
    """
    gpu = find_gpu(name)
    if gpu is None or not gpu.source or (precision is Precision.bf16 and not has_bf16(gpu)):
        return None
    tflops = gpu.half_tflops
    if precision is Precision.fp32:
        tflops = gpu.tflops if tf32 or gpu.fp32_tflops is None else gpu.fp32_tflops
    return 1e12 * tflops, gpu.source


def gpu_device(name: str, precision: Precision) -> Device:
    """A GPU of the table. Raises ConfigError if it is not there or lacks the precision."""
    gpu = find_gpu(name)
    if gpu is None:
        raise ConfigError(
            f"device ({name}) is not in the table of GPUs: {', '.join(GPUS)}; "
            "use one of them, measure, or custom with images_per_s=..."
        )
    if precision is Precision.bf16 and not has_bf16(gpu):
        raise ConfigError(f"precision (bf16) is not supported by a {name}; use fp16 or fp32")
    half = precision is not Precision.fp32
    measured = gpu.half_images_per_s if half else gpu.images_per_s
    peak = 1e12 * (gpu.half_tflops if half else gpu.tflops)
    flops = measured * ALEXNET_FLOPS if measured else SUSTAINED * peak
    origin = gpu.origin if measured else Gpu.origin
    return Device(name, flops, gpu.memory_gb * 1e9, gpu.memory_gb_per_s * 1e9, origin=origin)


def cpu_device(cores: int, name: str = "cpu", flops_per_s: float | None = None) -> Device:
    """A rank with `cores` cores, under gloo."""
    return Device(
        name,
        flops_per_s or cores * CPU_FLOPS_PER_S,
        memory_bytes=4e9 * cores,
        memory_bytes_per_s=CPU_BYTES_PER_S,
        overhead_s=0.0,
        host_s_per_byte=GLOO_HOST_S_PER_BYTE,
        origin="guessed from the number of cores",
    )


def nccl_links(inside_gb_per_s: float, between_gbit_per_s: float) -> tuple[Link, Link]:
    """The links inside and between nodes, from nominal rates and NCCL's usual latencies."""
    inside = Link(LINK_REACHED * inside_gb_per_s * 1e9, NCCL_LATENCY_US / 1e6)
    return inside, Link(LINK_REACHED * between_gbit_per_s * 1e9 / 8, NETWORK_LATENCY_US / 1e6)


def gloo_links(between_gbit_per_s: float) -> tuple[Link, Link]:
    """The links inside and between nodes, from the nominal rate of an Ethernet.

    Inside a node the cores, not the link, limit the rate: see GLOO_HOST_S_PER_BYTE.
    """
    between = Link(TCP_REACHED * between_gbit_per_s * 1e9 / 8, GLOO_LATENCY_US / 1e6)
    return Link(1 / GLOO_HOST_S_PER_BYTE, GLOO_LATENCY_US / 1e6), between


def measure_device(
    model: nn.Module,
    network: Network,
    shape: tuple[int, int],
    precision: Precision,
    device: torch.device,
    ranks: int,
) -> Device:
    """Measure the device of one of `ranks` ranks on this machine, in a few seconds.

    Runs training steps on random images, without dropout. shape: images per step, and their size in
    pixels. On a CPU it sets torch's number of threads to this rank's share of the cores.
    """
    images, pixels = shape
    is_gpu = device.type == "cuda"
    all_cores = num_usable_cores()
    cores = max(1, all_cores // ranks)
    if not is_gpu:
        torch.set_num_threads(cores)
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    batch = torch.randn(images, 3, pixels, pixels, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    half = torch.float16 if precision is Precision.fp16 else torch.bfloat16

    def step() -> None:
        with torch.autocast(device.type, half, enabled=precision is not Precision.fp32):
            loss = nn.functional.cross_entropy(model(batch), labels)
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()

    source = torch.ones(_NUM_COPIED, device=device)
    target = torch.empty(_NUM_COPIED, device=device)
    seconds = _best_seconds(step, is_gpu)
    copied_per_s = 2 * 4 * _NUM_COPIED / _best_seconds(lambda: target.copy_(source), is_gpu)
    if is_gpu:
        name = torch.cuda.get_device_name(device)
        memory: float = torch.cuda.get_device_properties(device).total_memory
        overhead, host = GPU_OVERHEAD_S, 0.0
    else:
        name = f"{cores} of {all_cores} cores"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
        overhead, host = 0.0, GLOO_HOST_S_PER_BYTE
    busy = max(seconds - overhead, seconds / 2)  # the measured time contains the launches
    return Device(
        name,
        network.train_flops * images / busy,
        memory,
        copied_per_s,
        overhead,
        host,
        f"measured: {images / seconds:,.0f} images/s",
    )


def _best_seconds(run: Callable[[], object], is_gpu: bool) -> float:
    """The shortest of a few runs: the others were slowed down by other processes."""
    taken = []
    for _ in range(_NUM_STEPS + 2):
        began = time.perf_counter()
        run()
        if is_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[2:])
