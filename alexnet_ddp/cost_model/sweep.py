"""The same training on more and more ranks: each strategy's curve."""

from dataclasses import dataclass, replace

from alexnet_ddp.cost_model.choose import strategies
from alexnet_ddp.cost_model.machine import Cluster, Device
from alexnet_ddp.cost_model.network import Network
from alexnet_ddp.cost_model.step import Step, Strategy, predict

_ENOUGH = 1024  # ranks, at least


@dataclass(frozen=True)
class Sweep:
    """Steps at each number of ranks; `whole` is a hybrid of the whole world, `groups` the fastest smaller group.

    Where a network has nothing to split, both are empty.
    """

    ranks: list[int]
    plain: list[Step]
    half: list[Step]  # the fp16 hook
    whole: list[Step]
    groups: list[Step]
    crossover: float | None  # images of the global batch


def sweep(network: Network, device: Device, cluster: Cluster, images: int) -> Sweep:
    """From one rank, over the whole node, to 1,024 ranks or all of the cluster's, if they are more; doubling."""
    sizes = [
        replace(cluster, nodes=1, gpus_per_node=each) for each in _doubling(cluster.gpus_per_node)
    ]
    most = max(cluster.nodes, -(-_ENOUGH // cluster.gpus_per_node))
    sizes += [
        replace(cluster, nodes=nodes)
        for nodes in sorted({*_doubling(most), cluster.nodes})
        if nodes > 1
    ]

    def steps(strategy: Strategy) -> list[Step]:
        return [predict(network, device, size, strategy, images) for size in sizes]

    ranks, plain, half = (
        [size.world_size for size in sizes],
        steps(Strategy()),
        steps(Strategy(gradient_bytes=2)),
    )
    found = Sweep(ranks, plain, half, [], [], network.crossover)
    if not network.split:
        return found
    for size, plain in zip(sizes, found.plain):
        hybrids = [
            predict(network, device, size, strategy, images)
            for strategy in strategies(network, size)[2:]
        ]
        world = Strategy(group=size.world_size)
        found.whole.append(
            predict(network, device, size, world, images) if size.world_size > 1 else plain
        )
        found.groups.append(min(hybrids or [plain], key=lambda step: step.seconds))
    return found


def _doubling(most: int) -> list[int]:
    powers = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return sorted({*powers, most})
