"""Compare LARS with SGD at the linearly scaled rate, with a batch of 4,096 images (imagenet20).

    python benchmarks/large_batch.py --data DIR --json benchmarks/results/large_batch.json \\
        --plot large_batch.png
    python benchmarks/large_batch.py --quick      # two steps each, on synthetic images

It runs the two experiments, or resumes them from --runs, and collects their curves. A run that
diverges ends with 70, and its curve ends there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measuring import machine

KEYS = ("train/loss", "train/top1", "val/loss", "val/top1")
EXPERIMENTS = {"LARS": "imagenet20_lars_4k", "SGD, linearly scaled": "imagenet20_sgd_4k"}
QUICK = [
    "data=synthetic",
    "data.num_train=64",
    "data.num_val=20",
    "data.num_classes=20",
    "trainer.max_steps=2",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", metavar="DIR", help="the archives that experiment=imagenet20 reads"
    )
    parser.add_argument("--runs", default="runs", help="run.root")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="FILE", type=Path)
    args = parser.parse_args()
    if not args.quick and args.data is None:
        parser.error("--data is needed, or --quick")
    data = [*QUICK, "trainer.global_batch_size=32"] if args.quick else [f"data.root={args.data}"]
    curves = {}
    for label, name in EXPERIMENTS.items():
        command = [
            sys.executable,
            "-m",
            "alexnet_ddp.train",
            f"experiment={name}",
            *data,
            f"run.root={args.runs}",
        ]
        code = subprocess.run(command, check=False).returncode
        if code not in (0, 70):
            sys.exit(code)
        curves[label] = {
            "experiment": name,
            "exit_code": code,
            **curve(Path(args.runs) / name / "metrics.jsonl"),
        }
        best = max((top1 for _, top1 in curves[label]["val/top1"]), default=float("nan"))
        print(f"{label}: exit code {code}, best top-1 {best:.1f} %", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n")
    if args.plot:
        draw(curves, args.plot)


def curve(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each row, by key."""
    rows = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    return {key: [(row["step"], float(row[key])) for row in rows if key in row] for key in KEYS}


def draw(curves: dict[str, dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for colour, (label, found) in zip(("#1f6feb", "#d1242f"), curves.items()):
        last = found["train/loss"][-1][0]
        label += f" (not finite at step {last + 1})" if found["exit_code"] else ""
        left.plot(*zip(*found["train/loss"]), color=colour, label=label)
        if found["val/top1"]:
            right.plot(*zip(*found["val/top1"]), "o-", color=colour, label=label, markersize=4)
    left.set(xlabel="step", ylabel="training loss, logarithmic")
    left.set_yscale("log")
    left.set_ylim(1.5, 100)
    left.set_yticks([2, 3, 5, 10, 20, 50, 100], ["2", "3", "5", "10", "20", "50", "100"])
    left.minorticks_off()
    figure.suptitle("Batches of 4,096 images, 20 classes of ImageNet, 32 px", fontsize=11)
    right.set(xlabel="step", ylabel="top-1 (%)", ylim=(0, None))
    right.axhline(5, color="#57606a", linestyle=":", linewidth=1, label="chance")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
