"""Train on half of the classes, fine-tune on the other half, and compare with training from scratch.

    python benchmarks/transfer_classes.py --data DIR --json FILE --plot FILE.png
    python benchmarks/transfer_classes.py --quick      # two steps each, on noise

DIR contains train/CLASS and val/CLASS. The published figure is of the 20 classes of
experiment=imagenet20, as files. Each training is `python -m alexnet_ddp.train` with the options of
that recipe. The weights come from the 1st, 3rd, 5th, ... class; the 2nd, 4th, 6th, ... class are
new to the network. The fine-tuning differs from the training from scratch only in its weights and
in the number of its epochs; both have a shorter warm-up and a higher rate than the recipe, as
these trainings are short. The accuracy is measured on all validation images of the new classes
after each epoch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from measuring import machine
from PIL import Image

EPOCHS = {"from scratch": 4, "fine-tuned": 2}
SHORT = ["scheduler.warmup_epochs=0.25", "optimizer.lr=1e-3"]  # better for both than the recipe's
COLOURS = {"from scratch": "#57606a", "fine-tuned": "#1f6feb"}


def main() -> None:
    args = parse()
    with TemporaryDirectory() as folder:
        root = Path(folder)
        data = noise(root / "noise") if args.quick else args.data
        split(data, root)
        results = []
        for seed in range(args.repetitions):
            source = train(root / "known", root / f"source-{seed}", seed, args.source_epochs, args)
            for name, epochs in EPOCHS.items():
                run = root / f"{name.replace(' ', '-')}-{seed}"
                weights = [f"model.weights={source}"] if name == "fine-tuned" else []
                train(root / "new", run, seed, epochs, args, *SHORT, *weights)
                results.append({"training": name, "seed": seed, "top1": top1(run)})
                print(json.dumps(results[-1]), flush=True)
    print(table(results))
    if args.json:
        about = {"machine": machine(("torch", "numpy")), "source_epochs": args.source_epochs}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    if args.plot:
        draw(results, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="DIR", type=Path, help="with train/CLASS and val/CLASS")
    parser.add_argument("--source-epochs", type=int, default=12, help="of the first training")
    parser.add_argument("--repetitions", type=int, default=3, help="seeds")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="FILE", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.repetitions = 1
    elif args.data is None:
        parser.error("--data is needed, or --quick")
    return args


def noise(folder: Path) -> Path:
    """Four classes of images without content."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "abcd":
            (folder / part / name).mkdir(parents=True)
            for k in range(8):
                pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{k}.png")
    return folder


def split(data: Path, root: Path) -> None:
    """Link every second class of `data` below root/known, the others below root/new."""
    for part in ("train", "val"):
        classes = sorted(path for path in (data / part).iterdir() if path.is_dir())
        for k, path in enumerate(classes):
            link = root / ("new" if k % 2 else "known") / part / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())


def train(
    data: Path, run: Path, seed: int, epochs: int, args: argparse.Namespace, *more: str
) -> Path:
    """Train on `data`; returns the directory of the run."""
    command = [sys.executable, "-m", "alexnet_ddp.train", "experiment=imagenet20", "data=folder"]
    command += [f"data.root={data}", f"run.root={run.parent}", f"run.name={run.name}"]
    command += [f"trainer.epochs={epochs}", f"seed={seed}", "logger.tensorboard=false", *more]
    command += ["trainer.max_steps=2"] * args.quick
    env = {**os.environ, "XDG_CACHE_HOME": str(run.parent / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return run


def top1(run: Path) -> list[float]:
    """The accuracy after each epoch, in percent."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [round(row["val/top1"], 2) for row in map(json.loads, lines) if "val/top1" in row]


def curves(results: list[dict], name: str) -> np.ndarray:
    """[seeds, epochs]"""
    return np.array([found["top1"] for found in results if found["training"] == name])


def table(results: list[dict]) -> str:
    """Markdown: the accuracy after each epoch, mean and spread over the seeds."""
    epochs = max(EPOCHS.values())
    lines = ["| training | " + " | ".join(f"epoch {k + 1}" for k in range(epochs)) + " |"]
    lines.append("|---" * (1 + epochs) + "|")
    for name in EPOCHS:
        cells = [
            f"{statistics.mean(column):.1f} % ({min(column):.1f} to {max(column):.1f})"
            for column in curves(results, name).T
        ]
        lines.append("| " + " | ".join([name, *cells, *[""] * (epochs - len(cells))]) + " |")
    return "\n".join(lines)


def draw(results: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axis = pyplot.subplots(figsize=(6, 3.6), constrained_layout=True)
    for name, colour in COLOURS.items():
        found = curves(results, name)
        epochs = 1 + np.arange(found.shape[1])
        axis.plot(epochs, found.mean(0), "o-", color=colour, label=name)
        axis.fill_between(epochs, found.min(0), found.max(0), color=colour, alpha=0.15)
    axis.set(xlabel="epoch", ylabel="top-1 (%)", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(f"10 new classes, n = {len(found)} seeds", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
