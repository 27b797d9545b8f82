"""What a cluster can do: its devices and its links, and every constant of the model of costs, in this one place.

The constants are physical and few. Those of GPUs are not solved for from any published run; those of CPUs and gloo were
estimated from two steps of a prototype on a link that was not shaped. tests/test_costs.py states how far the model is.
"""

import re
from dataclasses import dataclass

from alexnet_ddp.config import ConfigError, Precision

ALEXNET_FLOPS = 4.145e9  # of training on one image of 224 pixels, forward and backward
SUSTAINED = (
    0.3  # share of a GPU's peak that AlexNet reaches where nobody published a figure: an assumption
)
LINK_REACHED = (
    0.8  # share of a nominal rate that NCCL reaches on large messages (nccl-tests' bus bandwidth)
)
TCP_REACHED = 0.94  # payload of Ethernet frames of 1,500 bytes under TCP/IP: 1,448 of 1,538, and acknowledgements
GPU_OVERHEAD_S = 2e-3  # of a step: launching about 200 kernels, and Python
GLOO_HOST_S_PER_BYTE = (
    1.7e-9  # a core copies a byte into a socket and another out of one, and adds it: not overlapped
)
GLOO_LATENCY_US, NCCL_LATENCY_US, NETWORK_LATENCY_US = 60.0, 5.0, 15.0
CPU_FLOPS_PER_S, CPU_BYTES_PER_S = (
    45e9,
    9e9,
)  # a core, where nothing is measured: fp32 of an AVX2 core, and its copies
SGEMM_SHARE = 0.65  # of a core's sgemm rate, that AlexNet reaches
CUSTOM_BYTES_PER_S, PCIE_GB_PER_S = (
    1e12,
    16.0,
)  # memory and link of a GPU that the table does not have
TUTORIAL_UPDATE_BYTES = (
    60  # a parameter: SGD's four unfused passes, and gradients copied into DDP's buckets and back
)


@dataclass(frozen=True)
class Device:
    """One rank's: rates in bytes and floating-point operations a second, as they are reached."""

    name: str
    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    overhead_s: float = GPU_OVERHEAD_S
    host_s_per_byte: float = 0.0  # what a byte that is sent costs the device that computes
    origin: str = ""


@dataclass(frozen=True)
class Link:
    """Alpha-beta: a message takes latency + bytes / rate. The rate is what is reached, in each direction."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    inside: Link  # a GPU's, to the others of its node
    between: Link  # a node's, shared by its GPUs
    trees: bool = (
        True  # NCCL's trees need 2 log2(nodes) messages where gloo's ring needs 2 (ranks - 1)
    )

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Gpu:
    """A line of the table. Peaks are dense, without sparsity; the link is one direction of all NVLinks, or of PCIe."""

    tflops: float  # fp32, or TF32 where it has it (trainer.tf32)
    half_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float
    images_per_s: float | None = None  # measured: AlexNet at 224 pixels, fp32
    half_images_per_s: float | None = None
    origin: str = "NVIDIA's data sheet; AlexNet's share of the peak is assumed"


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
    ),
    "V100": Gpu(
        15.7, 125, 32, 900, 150, half_images_per_s=3300, origin="fp16: 512 of them / 410: Sun 2019"
    ),
    "T4": Gpu(8.1, 65, 16, 320, 16),
    "RTX4090": Gpu(82.6, 165, 24, 1008, 32),
    "L4": Gpu(60, 121, 24, 300, 32),
    "A100": Gpu(156, 312, 80, 2039, 300),
    "H100": Gpu(495, 989, 80, 3350, 450),
    "H200": Gpu(495, 989, 141, 4800, 450),
}

_WITHOUT_BF16 = [
    GPUS[name] for name in ("K20", "P40", "P100", "V100", "T4")
]  # as their data sheets say


def find_gpu(name: str) -> Gpu | None:
    """The line of a name, also of one as CUDA says it ("NVIDIA A100-SXM4-80GB")."""
    words = re.split(r"[^A-Z0-9]+", name.upper().replace("RTX ", "RTX"))
    return next((gpu for known, gpu in GPUS.items() if known in words), None)


def has_bf16(gpu: Gpu) -> bool:
    return gpu not in _WITHOUT_BF16


def gpu_device(name: str, precision: Precision) -> Device:
    """Raises ConfigError for a name that the table does not have, and for a precision that the GPU does not."""
    gpu = find_gpu(name)
    if gpu is None:
        remedy = "give one of them, measure, or custom with images_per_s=..."
        raise ConfigError(
            f"device ({name}) is not in the table of GPUs: {', '.join(GPUS)}; {remedy}"
        )
    if precision is Precision.bf16 and not has_bf16(gpu):
        raise ConfigError(f"precision (bf16) is not what a {name} has; use fp16 or fp32")
    half = precision is not Precision.fp32
    measured = gpu.half_images_per_s if half else gpu.images_per_s
    flops = (
        measured * ALEXNET_FLOPS
        if measured
        else SUSTAINED * 1e12 * (gpu.half_tflops if half else gpu.tflops)
    )
    origin = gpu.origin if measured else Gpu.origin
    return Device(name, flops, gpu.memory_gb * 1e9, gpu.memory_gb_per_s * 1e9, origin=origin)


def cpu_device(cores: int, name: str = "cpu", flops_per_s: float | None = None) -> Device:
    """A rank of `cores` cores, under gloo."""
    flops = flops_per_s or cores * CPU_FLOPS_PER_S
    return Device(
        name, flops, 4e9 * cores, CPU_BYTES_PER_S, 0.0, GLOO_HOST_S_PER_BYTE, "a guess of its cores"
    )


def nccl_links(inside_gb_per_s: float, between_gbit_per_s: float) -> tuple[Link, Link]:
    """From nominal rates, with NCCL's usual latencies."""
    inside = Link(LINK_REACHED * inside_gb_per_s * 1e9, NCCL_LATENCY_US / 1e6)
    return inside, Link(LINK_REACHED * between_gbit_per_s * 1e9 / 8, NETWORK_LATENCY_US / 1e6)


def gloo_links(between_gbit_per_s: float) -> tuple[Link, Link]:
    """From the nominal rate of an Ethernet. Inside a node the cores are slower than any link: host_s_per_byte."""
    between = Link(TCP_REACHED * between_gbit_per_s * 1e9 / 8, GLOO_LATENCY_US / 1e6)
    return Link(1 / GLOO_HOST_S_PER_BYTE, GLOO_LATENCY_US / 1e6), between
