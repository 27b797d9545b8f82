"""The picture of a plan: bytes and efficiency against the number of ranks. The only module that knows matplotlib."""

from pathlib import Path
from types import ModuleType

from alexnet_ddp.config import ConfigError
from alexnet_ddp.cost_model.step import Step
from alexnet_ddp.cost_model.sweep import Sweep

PLAIN, HALF, WHOLE, GROUPS, INK, PALE = (
    "#57606a",
    "#b8bec7",
    "#d1540a",
    "#1f6feb",
    "#24292f",
    "#8c959f",
)


def draw(swept: Sweep, images: int, world_size: int, file: Path) -> None:
    """Two panels. Raises ConfigError where matplotlib is not installed."""
    pyplot = matplotlib_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    curves = [("ddp", swept.plain, PLAIN, "-"), ("ddp, fp16 hook", swept.half, HALF, "-")]
    if swept.whole:
        whole, groups = "hybrid over all ranks", "hybrid, fastest group"
        curves += [(whole, swept.whole, WHOLE, "-"), (groups, swept.groups, GROUPS, "--")]
    one = swept.plain[0].images_per_s
    for label, steps, colour, style in curves:
        drawn = {"color": colour, "linestyle": style, "linewidth": 2, "label": label}
        left.plot(swept.ranks[1:], [step.bytes_sent / 1e6 for step in steps[1:]], **drawn)
        right.plot(swept.ranks, [100 * _efficiency(step, one) for step in steps], **drawn)
    left.set(title="MB that a rank sends in a step", yscale="log")
    right.set(title="scaling efficiency, % of the ranks' own rates", ylim=(0, 105))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"ranks, {images} images each")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.grid(alpha=0.25)
        axis.axvline(world_size, color=PALE, linewidth=1, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    right.annotate(" this cluster", (world_size, 2), color=PALE, fontsize=9)
    if swept.crossover is not None and swept.ranks[0] < swept.crossover / images < swept.ranks[-1]:
        at = swept.crossover / images
        left.axvline(at, color=INK, linewidth=1)
        left.annotate(
            f" global batch {swept.crossover:,.0f}",
            (at, left.get_ylim()[0] * 1.3),
            color=INK,
            fontsize=9,
        )
    left.legend(frameon=False, fontsize=9, loc="upper left")
    figure.tight_layout()
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def _efficiency(step: Step, one: float) -> float:
    return step.images_per_s / (step.world_size * one)


def matplotlib_pyplot() -> ModuleType:
    """Raises ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        remedy = "pip install 'alexnet-ddp[plot]', or leave plot out"
        raise ConfigError(
            f"plot draws with matplotlib, which is not installed; {remedy}"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
