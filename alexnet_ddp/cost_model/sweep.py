"""Predictions for the same training on more and more ranks, per strategy, and a plot of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from alexnet_ddp.config import ConfigError
from alexnet_ddp.cost_model.choose import strategies
from alexnet_ddp.cost_model.machine import Cluster, Device
from alexnet_ddp.cost_model.network import Network
from alexnet_ddp.cost_model.step import Step, Strategy, predict

_MIN_LAST = 1024  # ranks of the last prediction, at least

_DDP_COLOUR = "#57606a"
_FP16_COLOUR = "#b8bec7"
_WORLD_COLOUR = "#d1540a"
_GROUP_COLOUR = "#1f6feb"
_INK = "#24292f"
_PALE = "#8c959f"


@dataclass(frozen=True)
class Sweep:
    """Predicted steps for each number of ranks.

    world_hybrid: one group of all ranks; group_hybrid: the fastest group size. Both are empty if
    the network has no layers to split.
    """

    ranks: list[int]
    ddp: list[Step]
    ddp_fp16: list[Step]
    world_hybrid: list[Step]
    group_hybrid: list[Step]
    crossover: float | None  # images of the global batch


def sweep(network: Network, device: Device, cluster: Cluster, images: int) -> Sweep:
    """Predict from one rank to 1,024, or to the cluster's number of ranks if it is larger.

    The number of ranks doubles: first within a node, then the number of nodes. images: per rank.
    """
    per_node = cluster.gpus_per_node
    sizes = [replace(cluster, nodes=1, gpus_per_node=ranks) for ranks in _doubling(per_node)]
    most = max(cluster.nodes, -(-_MIN_LAST // per_node))
    sizes += [
        replace(cluster, nodes=nodes)
        for nodes in sorted({*_doubling(most), cluster.nodes})
        if nodes > 1
    ]

    def steps(strategy: Strategy) -> list[Step]:
        return [predict(network, device, size, strategy, images) for size in sizes]

    found = Sweep(
        ranks=[size.world_size for size in sizes],
        ddp=steps(Strategy()),
        ddp_fp16=steps(Strategy(gradient_bytes=2)),
        world_hybrid=[],
        group_hybrid=[],
        crossover=network.crossover,
    )
    if not network.split:
        return found
    for size, ddp in zip(sizes, found.ddp):
        world = Strategy(group=size.world_size)
        found.world_hybrid.append(
            predict(network, device, size, world, images) if size.world_size > 1 else ddp
        )
        hybrids = [
            predict(network, device, size, strategy, images)
            for strategy in strategies(network, size)[2:]
        ]
        found.group_hybrid.append(min(hybrids or [ddp], key=lambda step: step.seconds))
    return found


def draw(swept: Sweep, images: int, world_size: int, file: Path) -> None:
    """Plot bytes and efficiency against the number of ranks. Raises ConfigError: no matplotlib.

    world_size: the number of ranks to mark.
    """
    pyplot = matplotlib_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    curves = [
        ("ddp", swept.ddp, _DDP_COLOUR, "-"),
        ("ddp, fp16 hook", swept.ddp_fp16, _FP16_COLOUR, "-"),
    ]
    if swept.world_hybrid:
        curves += [
            ("hybrid over all ranks", swept.world_hybrid, _WORLD_COLOUR, "-"),
            ("hybrid, fastest group", swept.group_hybrid, _GROUP_COLOUR, "--"),
        ]
    one, highest = swept.ddp[0].images_per_s, 0.0
    for label, steps, colour, style in curves:
        options = {"color": colour, "linestyle": style, "linewidth": 2, "label": label}
        efficiency = [100 * step.images_per_s / (step.world_size * one) for step in steps]
        highest = max(highest, *efficiency)
        left.plot(swept.ranks[1:], [step.bytes_sent / 1e6 for step in steps[1:]], **options)
        right.plot(swept.ranks, efficiency, **options)
    left.set(title="MB sent per rank and step", yscale="log")
    right.set(title="scaling efficiency, % of one rank's rate", ylim=(0, max(105, 1.05 * highest)))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"ranks, {images} images each")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.grid(alpha=0.25)
        axis.axvline(world_size, color=_PALE, linewidth=1, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    right.annotate(" this cluster", (world_size, 2), color=_PALE, fontsize=9)
    if swept.crossover is not None and swept.ranks[0] < swept.crossover / images < swept.ranks[-1]:
        at = swept.crossover / images
        left.axvline(at, color=_INK, linewidth=1)
        left.annotate(
            f" global batch {int(swept.crossover):,}",
            (at, left.get_ylim()[0] * 1.3),
            color=_INK,
            fontsize=9,
        )
    left.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    left.yaxis.set_minor_formatter(lambda y, _: "")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="lower center", ncols=len(labels))
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def matplotlib_pyplot(what: str = "plot", otherwise: str = ", or leave plot out") -> ModuleType:
    """matplotlib.pyplot. Raises ConfigError if matplotlib is not installed.

    what, otherwise: for the message: the option that needs it, and what to do without it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            f"{what} needs matplotlib, which is not installed; "
            f"pip install 'alexnet-ddp[plot]'{otherwise}"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    powers = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return sorted({*powers, most})
