"""How long a step takes under a strategy: a timeline of compute and communication.

A collective over m ranks in a ring sends (m-1)/m of its payload over each link, once for a gather or a scatter, twice
for an all-reduce, and takes latency + bytes / rate (alpha-beta). DDP's buckets run beside the backward pass, one after
the other, each from when its last gradient is ready; a hybrid's gathers and scatters stand in the way of both passes.
"""

import math
from dataclasses import dataclass

from alexnet_ddp.cost_model.machine import Cluster, Device
from alexnet_ddp.cost_model.network import Layer, Network

BUCKET_BYTES, FIRST_BUCKET_BYTES = (
    25 * 2**20,
    2**20,
)  # DDP's; a bucket is never smaller than a layer
FLOAT = 4
MOMENTUM_SGD_BYTES = (
    24  # a parameter: read weight, gradient, momentum; write two of them; read the gradient's norm
)


@dataclass(frozen=True)
class Strategy:
    """group: ranks that share the split layers; 1 is plain data parallel."""

    group: int = 1
    gradient_bytes: int = FLOAT  # 2: DDP's fp16 hook
    activation_bytes: int = FLOAT
    update_bytes: int = MOMENTUM_SGD_BYTES
    overlaps: bool = True  # buckets beside the backward pass; false: behind it

    @property
    def name(self) -> str:
        if self.group > 1:
            return f"hybrid g={self.group}"
        return "ddp" if self.gradient_bytes == FLOAT else "ddp fp16"

    @property
    def overrides(self) -> str:
        if self.group > 1:
            wire = "" if self.activation_bytes == FLOAT else " parallel.wire_dtype=bf16"
            return f"parallel=hybrid parallel.group_size={self.group}{wire}"
        return "parallel=ddp" if self.gradient_bytes == FLOAT else "parallel=ddp parallel.hook=fp16"


@dataclass(frozen=True)
class Step:
    """Of one rank. The step takes compute_s + exposed_s + update_s."""

    strategy: Strategy
    images: int  # of one rank
    world_size: int
    bytes_sent: float  # and as many received
    compute_s: float
    communication_s: float  # all of it, also what compute hides
    exposed_s: float
    update_s: float
    memory_bytes: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s + self.update_s

    @property
    def images_per_s(self) -> float:
        return self.images * self.world_size / self.seconds


@dataclass(frozen=True)
class Ring:
    """`members` ranks on `nodes` nodes; `sharing` such rings go through each node's link at the same time."""

    members: int
    nodes: int
    sharing: int = 1

    def seconds(self, payload: float, laps: int, cluster: Cluster) -> float:
        """payload: bytes of the whole tensor. laps: 1 for a gather or a scatter, 2 for an all-reduce."""
        sent, spans = self.sent(payload, laps), self.nodes > 1
        inside = (
            sent / cluster.inside.bytes_per_s if self.members > self.nodes or not spans else 0.0
        )
        between = self.sharing * sent / cluster.between.bytes_per_s if spans else 0.0
        return self._latency(laps, cluster) + max(inside, between)

    def sent(self, payload: float, laps: int) -> float:
        return laps * (self.members - 1) / self.members * payload

    def _latency(self, laps: int, cluster: Cluster) -> float:
        far, near = cluster.between.latency_s, cluster.inside.latency_s
        crossings = self.nodes if self.nodes > 1 else 0
        hop = (crossings * far + (self.members - crossings) * near) / self.members
        ring = laps * (self.members - 1) * hop
        tree = 2 * (math.ceil(math.log2(self.nodes)) * far + (self.members / self.nodes - 1) * near)
        return min(ring, tree) if cluster.trees and laps == 2 else ring


def rings(cluster: Cluster, group: int) -> tuple[Ring, Ring, Ring]:
    """All ranks; a group, inside a node where it fits; the ranks that hold the same part in each group."""
    nodes, each, world = cluster.nodes, cluster.gpus_per_node, cluster.world_size
    if group <= each:
        return Ring(world, nodes), Ring(group, 1), Ring(world // group, nodes, sharing=group)
    spanned = group // each
    return (
        Ring(world, nodes),
        Ring(group, spanned),
        Ring(world // group, nodes // spanned, sharing=each),
    )


def predict(
    network: Network, device: Device, cluster: Cluster, strategy: Strategy, images: int
) -> Step:
    """One step of `images` images a rank."""
    everyone, group, peers = rings(cluster, strategy.group)
    split = network.split if strategy.group > 1 else ()
    timeline = _Timeline(device, cluster, strategy.overlaps)

    def exchange(floats: int) -> None:
        timeline.wait(group, floats * images * strategy.group * strategy.activation_bytes)

    def work(layer: Layer, flops: float) -> None:
        touched = layer.parameters * FLOAT / (strategy.group if layer in split else 1)
        timeline.compute(
            max(flops * images / device.flops_per_s, touched / device.memory_bytes_per_s)
        )

    for layer in network.layers:
        if split and layer is split[0]:
            exchange(layer.inputs)
        work(layer, layer.flops)
        if layer in split[1:]:
            exchange(layer.outputs)
    for layer in reversed(network.layers):
        if layer in split[1:]:
            exchange(layer.outputs)
        work(layer, layer.backward_flops)
        if split and layer is split[0]:
            exchange(layer.inputs)
        ring, share = (peers, strategy.group) if layer in split else (everyone, 1)
        timeline.ready(ring, layer.parameters * strategy.gradient_bytes / share)
    timeline.finish()
    local = network.parameters - sum(layer.parameters for layer in split) * (1 - 1 / strategy.group)
    passes = strategy.update_bytes + (
        12 if strategy.gradient_bytes < FLOAT else 0
    )  # the hook's casts, to and fro
    gathered = network.exchanged * images * strategy.group if split else 0
    memory = FLOAT * (
        3 * local + network.saved * images + gathered
    )  # weights, gradients, momentum; activations
    return Step(
        strategy, images, cluster.world_size, timeline.sent, timeline.computed + device.overhead_s,
        timeline.communicated, timeline.end - timeline.computed, local * passes / device.memory_bytes_per_s, memory,
    )  # fmt: skip


class _Timeline:
    """One rank's clock through the two passes. A link, inside the node or out of it, carries one message at a time."""

    def __init__(self, device: Device, cluster: Cluster, overlaps: bool) -> None:
        self._device, self._cluster, self._overlaps = device, cluster, overlaps
        self._free = {
            False: 0.0,
            True: 0.0,
        }  # from when the link inside, and the one out of the node, is idle
        self._buckets: dict[
            Ring, tuple[float, float]
        ] = {}  # bytes that wait for more, and how many are a bucket
        self._late: list[tuple[Ring, float]] = []
        self._host = 0.0  # seconds that buckets cost the core that computes
        self.now = self.end = self.computed = self.communicated = self.sent = 0.0

    def compute(self, seconds: float) -> None:
        self.now += seconds
        self.computed += seconds

    def wait(self, ring: Ring, payload: float) -> None:
        """A gather or a scatter, which the next layer needs."""
        self.now = max(self.now, self._send(ring, payload, 1))

    def ready(self, ring: Ring, payload: float) -> None:
        """So many bytes of gradients: they leave when DDP's bucket is full."""
        waiting, limit = self._buckets.get(ring, (0.0, FIRST_BUCKET_BYTES))
        if waiting + payload < limit:
            self._buckets[ring] = (waiting + payload, limit)
        else:
            self._leave(ring, waiting + payload)
            self._buckets[ring] = (0.0, BUCKET_BYTES)

    def finish(self) -> None:
        """The backward pass has ended; the step goes on when the last bucket is there."""
        for ring, (waiting, _) in self._buckets.items():
            self._leave(ring, waiting)
        for ring, payload in self._late:
            self._send(ring, payload, 2)
        self.end = max(self.now + self._host, *self._free.values())

    def _leave(self, ring: Ring, payload: float) -> None:
        self._host += ring.sent(payload, 2) * self._device.host_s_per_byte
        if self._overlaps:
            self._send(ring, payload, 2)
        else:
            self._late.append((ring, payload))

    def _send(self, ring: Ring, payload: float, laps: int) -> float:
        """Put a message on its link; returns when it has arrived."""
        if ring.members == 1 or payload == 0:
            return self.now
        sent, leaves = ring.sent(payload, laps), ring.nodes > 1
        seconds = max(
            ring.seconds(payload, laps, self._cluster), sent * self._device.host_s_per_byte
        )
        self.sent += sent
        self.communicated += seconds
        self._free[leaves] = max(self.now, self._free[leaves]) + seconds
        return self._free[leaves]
