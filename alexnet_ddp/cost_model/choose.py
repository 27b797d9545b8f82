"""Which strategy to take: the fastest that is exact and fits; plain data parallel where nothing is clearly faster."""

from dataclasses import dataclass

from alexnet_ddp.config import Precision
from alexnet_ddp.cost_model.machine import (
    Cluster,
    Device,
    cpu_device,
    find_gpu,
    gloo_links,
    gpu_device,
    has_bf16,
    nccl_links,
)
from alexnet_ddp.cost_model.network import Network
from alexnet_ddp.cost_model.step import Step, Strategy, predict
from alexnet_ddp.runtime.environment import num_usable_cores

CLEARLY = 1.05  # times faster than ddp, before another strategy is worth its words
GUESSED_GBIT = {"cpu": 1.0, "cuda": 25.0}  # between nodes, where nobody says
USABLE = 0.9  # of a device's memory


@dataclass(frozen=True)
class Choice:
    strategy: Strategy
    reason: str  # one line


def strategies(network: Network, cluster: Cluster, wire_bytes: int = 4) -> list[Strategy]:
    """Data parallel, the same with half the bytes, and a hybrid for each group that fills nodes or divides them."""
    found, each, world = (
        [Strategy(), Strategy(gradient_bytes=2)],
        cluster.gpus_per_node,
        cluster.world_size,
    )
    if network.split:
        parts = min(network.split[0].outputs, *(layer.inputs for layer in network.split[1:]))
        groups = (g for g in range(2, min(parts, world) + 1) if world % g == 0)
        found += [
            Strategy(group=g, activation_bytes=wire_bytes)
            for g in groups
            if each % g == 0 or g % each == 0
        ]
    return found


def best(steps: list[Step], device: Device) -> Step | None:
    """Of the exact ones (not the fp16 hook, which rounds gradients) that fit into memory. None where none fits."""
    fitting = [
        s
        for s in steps
        if s.strategy.gradient_bytes == 4 and s.memory_bytes <= USABLE * device.memory_bytes
    ]
    if not fitting:
        return None
    fastest, plain = min(fitting, key=lambda s: s.seconds), fitting[0]
    return (
        plain
        if plain.strategy.group == 1 and plain.seconds < CLEARLY * fastest.seconds
        else fastest
    )


def choose(
    network: Network,
    device: Device,
    cluster: Cluster,
    images: int,
    must_split: bool = False,
    wire_bytes: int = 4,
) -> Choice:
    """For steps of `images` images a rank. must_split: among hybrids alone, if the ranks are more than one."""
    if not network.split:
        rule = "no linear layers at the end hold half of the parameters, so there is nothing that pays to split"
        return Choice(Strategy(), f"ddp: {rule}")
    if cluster.world_size == 1:
        return Choice(Strategy(), "ddp: a world of one sends nothing")
    steps = [
        predict(network, device, cluster, strategy, images)
        for strategy in strategies(network, cluster, wire_bytes)
    ]
    plain, hybrids = steps[0], steps[2:]
    candidates = hybrids if must_split and hybrids else steps
    found = best(candidates, device) or min(candidates, key=lambda s: s.memory_bytes)
    other = min(hybrids if found is plain else [plain], key=lambda s: s.seconds, default=plain)
    why = "; not clearly faster" if found is plain and other.seconds < plain.seconds else ""
    return Choice(
        found.strategy,
        f"{_in_words(found)}, {_in_words(other)}{why} (predicted, {images} images a rank)",
    )


def _in_words(step: Step) -> str:
    return f"{step.strategy.name}: {step.seconds * 1e3:,.0f} ms a step with {step.bytes_sent / 1e6:,.1f} MB a rank"


def guess(
    world_size: int,
    local_world_size: int,
    gpu_name: str | None,
    precision: Precision = Precision.fp32,
) -> tuple[Device, Cluster]:
    """What these ranks probably run on, without measuring. gpu_name: as CUDA says it; None: CPUs under gloo."""
    each = local_world_size if world_size % local_world_size == 0 else 1
    if gpu_name is None:
        cores = max(1, num_usable_cores() // local_world_size)
        return cpu_device(cores), Cluster(
            world_size // each, each, *gloo_links(GUESSED_GBIT["cpu"]), trees=False
        )
    known = find_gpu(gpu_name)
    if known is not None and not has_bf16(known) and precision is Precision.bf16:
        precision = Precision.fp32  # torch emulates it
    device = gpu_device(gpu_name if known else "A100", precision)
    links = nccl_links(known.link_gb_per_s if known else 16, GUESSED_GBIT["cuda"])
    return device, Cluster(world_size // each, each, *links)


def choose_guessing(
    network: Network,
    device: Device,
    cluster: Cluster,
    images: int,
    must_split: bool,
    wire_bytes: int,
) -> Choice:
    """What parallel=auto and parallel.group_size=auto take, and why, on what guess() has found. It looked at this node:
    let rank 0 decide, and broadcast what it says.
    """
    found = choose(network, device, cluster, images, must_split, wire_bytes)
    if cluster.nodes == 1:
        return found
    gbit = GUESSED_GBIT["cpu" if device.host_s_per_byte else "cuda"]
    return Choice(found.strategy, f"{found.reason}; guessed {gbit:g} Gbit/s between nodes")
