"""Choose the fastest exact strategy that fits into memory; DDP if no other is clearly faster."""

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

CLEARLY = 1.05  # another strategy is chosen if it is this many times faster than DDP
GUESSED_GBIT = {"cpu": 1.0, "cuda": 25.0}  # between nodes, if not given
USABLE = 0.9  # share of a device's memory


@dataclass(frozen=True)
class Choice:
    """The chosen strategy, and the reason in one line."""

    strategy: Strategy
    reason: str


def strategies(network: Network, cluster: Cluster, activation_bytes: int = 4) -> list[Strategy]:
    """DDP, DDP with 16-bit gradients, and a hybrid per group size that divides or fills nodes.

    activation_bytes: per value that a hybrid sends.
    """
    found = [Strategy(), Strategy(gradient_bytes=2)]
    if not network.split:
        return found
    per_node, world = cluster.gpus_per_node, cluster.world_size
    most = min(network.split[0].outputs, *(layer.inputs for layer in network.split[1:]))
    for group in range(2, min(most, world) + 1):
        if world % group == 0 and (per_node % group == 0 or group % per_node == 0):
            found.append(Strategy(group=group, activation_bytes=activation_bytes))
    return found


def best(steps: list[Step], device: Device) -> Step | None:
    """The best exact strategy that fits into memory, or None. `steps` begins with plain DDP.

    The fp16 hook rounds gradients, so it is not exact. Plain DDP wins unless another strategy is
    clearly faster.
    """
    fitting = [
        s
        for s in steps
        if s.strategy.gradient_bytes == 4 and s.memory_bytes <= USABLE * device.memory_bytes
    ]
    if not fitting:
        return None
    fastest, plain = min(fitting, key=lambda s: s.seconds), fitting[0]
    is_close = plain.seconds < CLEARLY * fastest.seconds
    return plain if plain.strategy.group == 1 and is_close else fastest


def choose(
    network: Network,
    device: Device,
    cluster: Cluster,
    images: int,
    must_split: bool = False,
    activation_bytes: int = 4,
) -> Choice:
    """Choose for steps of `images` images per rank.

    must_split: choose among hybrids only, if there is more than one rank.
    """
    if not network.split:
        return Choice(
            Strategy(),
            "ddp: the last linear layers have less than half of the parameters, "
            "so splitting them does not pay",
        )
    if cluster.world_size == 1:
        return Choice(Strategy(), "ddp: a single rank sends nothing")
    steps = [
        predict(network, device, cluster, strategy, images)
        for strategy in strategies(network, cluster, activation_bytes)
    ]
    plain, hybrids = steps[0], steps[2:]
    candidates = hybrids if must_split and hybrids else steps
    found = best(candidates, device) or min(candidates, key=lambda s: s.memory_bytes)
    other = min(hybrids if found is plain else [plain], key=lambda s: s.seconds, default=plain)
    why = "; not clearly faster" if found is plain and other.seconds < plain.seconds else ""
    return Choice(
        found.strategy,
        f"{_describe(found)}, {_describe(other)}{why} (predicted, {images} images per rank)",
    )


def _describe(step: Step) -> str:
    return (
        f"{step.strategy.name}: {step.seconds * 1e3:,.0f} ms per step "
        f"with {step.bytes_sent / 1e6:,.1f} MB per rank"
    )


def guess(
    world_size: int,
    local_world_size: int,
    gpu_name: str | None,
    precision: Precision = Precision.fp32,
) -> tuple[Device, Cluster]:
    """The probable device and cluster of these ranks, without a measurement.

    gpu_name: as CUDA reports it; None: CPUs and gloo.
    """
    per_node = local_world_size if world_size % local_world_size == 0 else 1
    nodes = world_size // per_node
    if gpu_name is None:
        cores = max(1, num_usable_cores() // local_world_size)
        links = gloo_links(GUESSED_GBIT["cpu"])
        return cpu_device(cores), Cluster(nodes, per_node, *links, trees=False)
    known = find_gpu(gpu_name)
    if known is not None and not has_bf16(known) and precision is Precision.bf16:
        precision = Precision.fp32  # torch emulates bf16 on these GPUs
    device = gpu_device(gpu_name if known else "A100", precision)
    links = nccl_links(known.link_gb_per_s if known else 16, GUESSED_GBIT["cuda"])
    return device, Cluster(nodes, per_node, *links)


def choose_guessing(
    network: Network,
    device: Device,
    cluster: Cluster,
    images: int,
    must_split: bool,
    activation_bytes: int,
) -> Choice:
    """The choice of parallel=auto and parallel.group_size=auto, for what guess() returned.

    guess() looks at the current node only, so let rank 0 decide and broadcast the choice.
    """
    found = choose(network, device, cluster, images, must_split, activation_bytes)
    if cluster.nodes == 1:
        return found
    gbit = GUESSED_GBIT["cpu" if device.host_s_per_byte else "cuda"]
    return Choice(found.strategy, f"{found.reason}; guessed {gbit:g} Gbit/s between nodes")
