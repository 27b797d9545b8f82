"""Plot the learning curves of runs from their metrics.jsonl.

python benchmarks/learning_curve.py OUT.png runs/demo [runs/other ...]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def rows(run_dir: Path, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of each row that has `key`."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["epoch"], float(row[key])) for row in lines if key in row]


def draw(out: Path, run_dirs: list[Path]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for color, run_dir in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], run_dirs):
        for axis, kind, style in (
            (left, "train/loss", "-"),
            (left, "val/loss", "o--"),
            (right, "val/top1", "o-"),
        ):
            found = rows(run_dir, kind)
            if found:
                label = f"{run_dir.name} {kind.split('/')[0]}"
                axis.plot(
                    *zip(*found),
                    style,
                    color=color,
                    label=label,
                    markersize=4,
                    linewidth=1.2,
                    alpha=0.9,
                )
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="top-1 (%)", ylim=(0, 100))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    missing = [name for name in sys.argv[2:] if not (Path(name) / "metrics.jsonl").is_file()]
    if missing:
        sys.exit(f"{missing[0]} contains no metrics.jsonl; give the directory of a run")
    draw(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
