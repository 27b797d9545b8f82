"""Plot the results of benchmarks/communication.py: seconds per step by link, and scaling curves.

    python benchmarks/communication_picture.py JSON PNG [FILE.md]

As a command it also prints the table, and replaces the table between the two marks of README.md.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from picture import INK, OURS, THEIRS, frame

PLAIN, GREY = "plain DDP", "#57606a"
STYLES = {"unshaped": ":", "1 Gbit/s": "--", "100 Mbit/s": "-"}
BYTES = "K=2, MB sent a step"
Turns = dict[str, dict[str, list[float]]]


def draw(turns: Turns, about: dict, file: Path) -> None:
    """Plot bars for each link; also ratios by image size and the scaling, if measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {link: found for link in STYLES if (found := turns.get(f"K=2, 64 px, {link}"))}
    curves = [
        draw_one
        for draw_one, wanted in ((by_size, "128 px"), (scaling, "weak"))
        if any(wanted in t for t in turns)
    ]
    heights = [len(found) + 1 for found in bars.values()]
    figure = pyplot.figure(
        figsize=(14 if curves else 9, max(0.42 * sum(heights) + 0.8, 6.5 * bool(curves)))
    )
    grid = figure.add_gridspec(1, 1 + bool(curves), width_ratios=[1.25, 1][: 1 + bool(curves)])
    left = grid[0].subgridspec(len(bars), 1, height_ratios=heights, hspace=0.28)
    for place, (link, found) in zip(left, bars.items()):
        panel(figure.add_subplot(place), link, found)
    for place, draw_one in zip(
        grid[1].subgridspec(len(curves), 1, hspace=0.3) if curves else (), curves
    ):
        draw_one(figure.add_subplot(place), turns)
    note = (
        f"medians; AlexNet, 32 images per rank, {about['cores']} cores of {about['cpu']}, "
        f"{about['date']}"
    )
    figure.text(0.99, 0.005, note, ha="right", va="bottom", fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def panel(axis: object, link: str, found: dict[str, list[float]]) -> None:
    """Plot one bar per variant, with its seconds and its speed relative to plain DDP."""
    values = {name: statistics.median(seconds) for name, seconds in found.items()}
    most = max(values.values())
    axis.barh(
        [label(name) for name in found],
        list(values.values()),
        color=[colour(name) for name in found],
        height=0.72,
    )
    for row, (name, value) in enumerate(values.items()):
        ratio = "" if name == PLAIN else f"   {statistics.median(ratios(found, name)):.1f} x"
        axis.text(
            value + most * 0.008, row, f"{value:.2f} s{ratio}", va="center", fontsize=9.5, color=INK
        )
    frame(axis, f"A step of two ranks at 64 px, {link}", most * 1.25)


def by_size(axis: object, turns: Turns) -> None:
    """Plot our speed relative to plain DDP, by image size."""
    for num_ranks, shade in ((2, OURS), (4, "#8250df")):
        for link, style in STYLES.items():
            points = {}
            for size in (64, 128, 224):
                found = turns.get(f"K={num_ranks}, {size} px, {link}", {})
                mine = [name for name in found if name.startswith("ours")]
                if mine:
                    points[size] = statistics.median(ratios(found, mine[-1]))
            if points:
                axis.plot(
                    *zip(*points.items()),
                    style,
                    marker="o",
                    color=shade,
                    label=f"{num_ranks} ranks, {link}",
                )
    axis.axhline(1, color=THEIRS, linewidth=1)
    finish(axis, "Times faster than plain DDP, by image size", "pixels", [64, 128, 224])
    axis.set_yscale("log")
    ticks = [1, 2, 4, 8, 16]
    axis.set_yticks(ticks, [f"{tick} x" for tick in ticks])
    axis.minorticks_off()


def scaling(axis: object, turns: Turns) -> None:
    """Plot images per second by number of ranks, relative to plain DDP on one rank."""
    for title, found in turns.items():
        kind = title.split()[0]
        if kind not in ("weak", "strong"):
            continue
        one = statistics.median(found[f"{PLAIN}, K=1"])
        lines: dict[str, dict[int, float]] = {}
        for name, rates in found.items():
            variant, num_ranks = re.fullmatch(r"(.*), K=(\d+)", name).groups()
            lines.setdefault(variant, {})[int(num_ranks)] = statistics.median(rates) / one
        for name, points in lines.items():
            style = "-" if kind == "weak" else "--"
            axis.plot(
                *zip(*points.items()),
                style,
                marker="o",
                color=colour(name),
                label=f"{label(name)}, {kind}",
            )
    finish(
        axis,
        "Images per second at 1 Gbit/s, relative to plain DDP on one rank",
        "ranks",
        [1, 2, 3, 4],
    )
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])


def table(turns: Turns) -> str:
    """A Markdown table: seconds per step, and speed relative to plain DDP (median, min, max)."""
    lines = []
    for num_ranks, size in ((k, px) for k in (2, 4) for px in (64, 128, 224)):
        found = {link: turns.get(f"K={num_ranks}, {size} px, {link}", {}) for link in STYLES}
        for name in dict.fromkeys(name for variants in found.values() for name in variants):
            cells = [cell(variants, name) for variants in found.values()]
            lines.append(f"| {num_ranks} | {size} | {label(name)} | {' | '.join(cells)} |")
    head = [f"| ranks | px | | {' | '.join(STYLES)} |", "|---" * (3 + len(STYLES)) + "|"]
    return "\n".join([*head, *lines, "", *sent(turns.get(BYTES, {}))])


def sent(found: dict[str, list[float]]) -> list[str]:
    """P1 as a sentence, if it was measured."""
    if not found:
        return []
    (ours,) = (name for name in found if name != PLAIN)
    mine, theirs, times = (
        statistics.median(x) for x in (found[ours], found[PLAIN], ratios(found, ours))
    )
    return [
        f"With two ranks, each sends {mine:.1f} MB per step, under plain DDP {theirs:.1f} MB: "
        f"{times:.1f} times fewer (P1)."
    ]


def cell(found: dict[str, list[float]], name: str) -> str:
    if name not in found:
        return ""
    taken = f"{statistics.median(found[name]):.2f} s"
    times = ratios(found, name)
    return (
        taken
        if name == PLAIN
        else f"{taken}, {statistics.median(times):.1f} x ({min(times):.1f} to {max(times):.1f})"
    )


def ratios(found: dict[str, list[float]], name: str) -> list[float]:
    return [theirs / mine for theirs, mine in zip(found[PLAIN], found[name])]


def finish(axis: object, title: str, what: str, ticks: list[int]) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.set_xlabel(what, color=GREY)
    axis.set_xticks(ticks)
    axis.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def colour(name: str) -> str:
    return OURS if name.startswith("ours") else THEIRS


def label(name: str) -> str:
    return f"alexnet_ddp, {name.removeprefix('ours: ')}" if name.startswith("ours") else name


def put(text: str, file: Path) -> None:
    """Replace the text between the marks of `file`."""
    marks = re.compile(
        "(<!-- communication: [^\n]*-->\n).*(<!-- end of communication -->)", re.DOTALL
    )
    changed, times = marks.subn(lambda found: f"{found[1]}{text}\n{found[2]}", file.read_text())
    if times != 1:
        sys.exit(
            f"{file} must contain the two marks of the communication table once, not {times} times"
        )
    file.write_text(changed)


def main() -> None:
    written = json.loads(Path(sys.argv[1]).read_text())
    draw(written["turns"], written["machine"], Path(sys.argv[2]))
    print(table(written["turns"]))
    for file in sys.argv[3:]:
        put(table(written["turns"]), Path(file))


if __name__ == "__main__":
    main()
