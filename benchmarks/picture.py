"""Plot the results of benchmarks/loader.py: images per second by loader.

python benchmarks/picture.py benchmarks/results/loader.json benchmarks/results/loader.png
"""

import json
import statistics
import sys
from pathlib import Path

OURS, THEIRS, INK = "#1f6feb", "#b8bec7", "#24292f"
LABELS = {  # group of turns -> variant -> label in the plot
    "224 px crops of the originals": {
        "ImageFolder, 2 workers, v1": "ImageFolder + DataLoader, v1",
        "ImageFolder, 2 workers, v2": "ImageFolder + DataLoader, v2",
        "ours: folder, 2 threads": "alexnet_ddp, the same files",
        "ours: raw shards, 2 threads": "alexnet_ddp, raw shards",
    },
    "224 px crops of packed JPEGs": {
        "ImageFolder, 2 workers, v1": "ImageFolder + DataLoader, v1",
        "ImageFolder, 2 workers, v2": "ImageFolder + DataLoader, v2",
        "webdataset, 2 workers": "webdataset",
        "mosaicml, 2 workers": "mosaicml-streaming",
        "litdata, 2 workers": "litdata",
        "ours: shards, 2 threads": "alexnet_ddp, shards",
    },
}


def draw(turns: dict[str, dict[str, list[float]]], about: dict, file: Path) -> None:
    """Plot one panel per measured group of LABELS; bars have rates, and ratios to the first bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {
        title: found for title in LABELS if (found := shown(turns.get(title, {}), LABELS[title]))
    }
    if not groups:
        sys.exit("no rates to plot: --only must include P5, P6 or P7")
    heights = [len(found) + 1 for found in groups.values()]
    size = (9, 0.42 * sum(heights) + 0.6)
    figure, axes = pyplot.subplots(len(groups), figsize=size, squeeze=False, height_ratios=heights)
    for axis, (title, found) in zip(axes[:, 0], groups.items()):
        panel(axis, title, found)
    note = (
        f"medians; 2 workers or 2 threads, {about['cores']} cores of {about['cpu']}, "
        f"{about['date']}"
    )
    figure.text(0.99, 0.005, note, ha="right", va="bottom", fontsize=8, color="#57606a")
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def shown(found: dict[str, list[float]], labels: dict[str, str]) -> dict[str, float]:
    return {
        label: statistics.median(found[name]) for name, label in labels.items() if name in found
    }


def panel(axis: object, title: str, found: dict[str, float]) -> None:
    first, most = next(iter(found.values())), max(found.values())
    colours = [OURS if "alexnet_ddp" in label else THEIRS for label in found]
    axis.barh(list(found), list(found.values()), color=colours, height=0.72)
    for row, value in enumerate(found.values()):
        ratio = "" if value == first else f"   {value / first:.1f} x"
        axis.text(
            value + most * 0.008, row, f"{value:,.0f}{ratio}", va="center", fontsize=9.5, color=INK
        )
    frame(axis, f"{title}, images per second", most * 1.16)


def frame(axis: object, title: str, limit: float) -> None:
    """Set the title and remove axes: the bars are labelled with their values."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axis.set_xlim(0, limit)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    written = json.loads(Path(sys.argv[1]).read_text())
    draw(written["turns"], written["machine"], Path(sys.argv[2]))
