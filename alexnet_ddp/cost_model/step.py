"""Predict the duration of a step under a strategy, with a timeline of compute and communication.

A ring collective over m ranks sends (m-1)/m of its payload over each link: once for an all-gather
or a reduce-scatter, twice for an all-reduce. A message takes latency + bytes / rate (alpha-beta
model). DDP's buckets overlap with the backward pass: they are sent one after the other, each when
its last gradient is ready. A hybrid's all-gathers and reduce-scatters block both passes.
"""

import math
from dataclasses import dataclass

from alexnet_ddp.cost_model.machine import Cluster, Device
from alexnet_ddp.cost_model.network import Layer, Network

# DDP's defaults. A bucket is never smaller than a layer.
BUCKET_BYTES = 25 * 2**20
FIRST_BUCKET_BYTES = 2**20
FLOAT = 4
# Per parameter: read weight, gradient and momentum; write weight and momentum; read the gradient
# for its norm.
MOMENTUM_SGD_BYTES = 24


@dataclass(frozen=True)
class Strategy:
    """group: the number of ranks that share the split layers; 1 is plain DDP."""

    group: int = 1
    gradient_bytes: int = FLOAT  # per value; 2: DDP's fp16 hook
    activation_bytes: int = FLOAT
    update_bytes: int = MOMENTUM_SGD_BYTES
    overlaps: bool = True  # buckets overlap with the backward pass; false: they follow it

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
    """The prediction for one rank. The step takes compute_s + exposed_s + update_s."""

    strategy: Strategy
    images: int  # per rank
    world_size: int
    bytes_sent: float  # the rank receives as many
    compute_s: float
    communication_s: float  # including what overlaps with compute
    exposed_s: float  # communication that does not overlap
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
    """`members` ranks on `nodes` nodes; `sharing` such rings use each node's link concurrently."""

    members: int
    nodes: int
    sharing: int = 1

    def seconds(self, payload: float, laps: int, cluster: Cluster) -> float:
        """payload: bytes of the full tensor. laps: 2 for an all-reduce, 1 for half of one."""
        sent, spans = self.sent(payload, laps), self.nodes > 1
        inside = (
            sent / cluster.inside.bytes_per_s if self.members > self.nodes or not spans else 0.0
        )
        between = self.sharing * sent / cluster.between.bytes_per_s if spans else 0.0
        return self._latency(laps, cluster) + max(inside, between)

    def sent(self, payload: float, laps: int) -> float:
        """The bytes that a rank sends."""
        return laps * (self.members - 1) / self.members * payload

    def _latency(self, laps: int, cluster: Cluster) -> float:
        far, near = cluster.between.latency_s, cluster.inside.latency_s
        crossings = self.nodes if self.nodes > 1 else 0
        hop = (crossings * far + (self.members - crossings) * near) / self.members
        ring = laps * (self.members - 1) * hop
        tree = 2 * (math.ceil(math.log2(self.nodes)) * far + (self.members / self.nodes - 1) * near)
        return min(ring, tree) if cluster.trees and laps == 2 else ring


def rings(cluster: Cluster, group: int) -> tuple[Ring, Ring, Ring]:
    """The rings of all ranks, of a group, and of the ranks with the same shard in each group.

    A group lies within a node if it fits there.
    """
    nodes, per_node, world = cluster.nodes, cluster.gpus_per_node, cluster.world_size
    if group <= per_node:
        return Ring(world, nodes), Ring(group, 1), Ring(world // group, nodes, sharing=group)
    spanned = group // per_node
    return (
        Ring(world, nodes),
        Ring(group, spanned),
        Ring(world // group, nodes // spanned, sharing=per_node),
    )


def predict(
    network: Network, device: Device, cluster: Cluster, strategy: Strategy, images: int
) -> Step:
    """Predict a step with `images` images per rank."""
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
    hook_bytes = 12 if strategy.gradient_bytes < FLOAT else 0  # to cast and to cast back
    update_bytes = local * (strategy.update_bytes + hook_bytes)
    gathered = network.exchanged * images * strategy.group if split else 0
    # Weights, gradients and momentum; activations.
    memory = FLOAT * (3 * local + network.saved * images + gathered)
    return Step(
        strategy=strategy,
        images=images,
        world_size=cluster.world_size,
        bytes_sent=timeline.sent,
        compute_s=timeline.computed + device.overhead_s,
        communication_s=timeline.communicated,
        exposed_s=timeline.end - timeline.computed,
        update_s=update_bytes / device.memory_bytes_per_s,
        memory_bytes=memory,
    )


class _Timeline:
    """The clock of one rank during forward and backward pass.

    The link inside the node and the one between nodes each carry one message at a time.
    """

    def __init__(self, device: Device, cluster: Cluster, overlaps: bool) -> None:
        self._device, self._cluster, self._overlaps = device, cluster, overlaps
        self._idle_from = {False: 0.0, True: 0.0}  # key: is it the link between nodes?
        self._buckets: dict[Ring, tuple[float, float]] = {}  # bytes waiting, bytes of a bucket
        self._late: list[tuple[Ring, float]] = []
        self._host = 0.0  # seconds that sending takes from computing
        self.now = self.end = self.computed = self.communicated = self.sent = 0.0

    def compute(self, seconds: float) -> None:
        self.now += seconds
        self.computed += seconds

    def wait(self, ring: Ring, payload: float) -> None:
        """Wait for an all-gather or a reduce-scatter that the next layer needs."""
        self.now = max(self.now, self._send(ring, payload, 1))

    def ready(self, ring: Ring, payload: float) -> None:
        """`payload` bytes of gradients are ready. They are sent when DDP's bucket is full."""
        waiting, limit = self._buckets.get(ring, (0.0, FIRST_BUCKET_BYTES))
        if waiting + payload < limit:
            self._buckets[ring] = (waiting + payload, limit)
        else:
            self._send_bucket(ring, waiting + payload)
            self._buckets[ring] = (0.0, BUCKET_BYTES)

    def finish(self) -> None:
        """End the backward pass and wait for the last bucket."""
        for ring, (waiting, _) in self._buckets.items():
            self._send_bucket(ring, waiting)
        for ring, payload in self._late:
            self._send(ring, payload, 2)
        self.end = max(self.now + self._host, *self._idle_from.values())

    def _send_bucket(self, ring: Ring, payload: float) -> None:
        self._host += ring.sent(payload, 2) * self._device.host_s_per_byte
        if self._overlaps:
            self._send(ring, payload, 2)
        else:
            self._late.append((ring, payload))

    def _send(self, ring: Ring, payload: float, laps: int) -> float:
        """Send a message on its link, and return the time of its arrival."""
        if ring.members == 1 or payload == 0:
            return self.now
        sent, is_between = ring.sent(payload, laps), ring.nodes > 1
        seconds = max(
            ring.seconds(payload, laps, self._cluster), sent * self._device.host_s_per_byte
        )
        self.sent += sent
        self.communicated += seconds
        self._idle_from[is_between] = max(self.now, self._idle_from[is_between]) + seconds
        return self._idle_from[is_between]
