"""How many images a second the loader makes, against torchvision's reference pipeline on the same files.

    python benchmarks/loader.py --images DIR [--json FILE] [--quick]

DIR holds JPEG files; without it, photograph-like ones are made. The variants run in turns (A B C A B C ...), warm, and
a ratio is the median over the turns. Absolute figures mean little on a shared machine; the ratio is the claim.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2

from alexnet_ddp.config import BasicAugmentConfig, FolderConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.effects import normalise
from alexnet_ddp.data.index import index_folder
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH = 64


def lay_out(root: Path, images: Path | None, count: int) -> None:
    """root/train/CLASS/*: links to files of `images`, or `count` synthetic photographs of 500 x 375, about 110 kB."""
    train = root / "train" / "all"
    train.mkdir(parents=True)
    if images:
        files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        for path in files[:count]:
            (train / path.name).symlink_to(path.resolve())
        return
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        photo = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        photo = np.clip(photo + rng.normal(0, 14, photo.shape), 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(train / f"{i:04d}.jpg", quality=93)


def reference(root: Path, size: int, rounds: int, workers: int, uint8: bool) -> Callable[[], int]:
    """ImageFolder + DataLoader as in torchvision's references: v1 on floats, or v2 on uint8 tensors."""
    if uint8:
        steps = [v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    else:
        steps = [v1.RandomResizedCrop(size), v1.RandomHorizontalFlip(), v1.ToTensor()]
        transform = v1.Compose([*steps, v1.Normalize(MEAN, STD)])
    data = ConcatDataset([torchvision.datasets.ImageFolder(root / "train", transform)] * rounds)
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, prefetch_factor=2)

    def go() -> int:
        return sum(len(images) for images, _ in loader)

    return go


def ours(root: Path, size: int, rounds: int, threads: int, on_cpu: bool) -> Callable[[], int]:
    """Our loader with `threads` threads: uint8 batches, which a GPU normalises; or normalised, `on_cpu`.

    The reference has no such choice: its workers normalise.
    """
    cfg = FolderConfig(root=str(root), image_size=size, num_threads=threads)
    index = index_folder(root, "train")
    loader = build_loader(
        cfg, index, build_augment(BasicAugmentConfig(), 0, size, cfg.eval_resize), 1, torch.device("cpu")
    )
    sampler = GlobalBatchSampler(len(index), BATCH, seed=0)

    def go() -> int:
        works = sampler.work(range(rounds * sampler.steps_per_epoch), 0, 1, None)
        return sum(len(normalise(b.images, None) if on_cpu else b.images) for b in loader.batches(works))

    return go


def measure(variants: dict[str, Callable[[], int]], repetitions: int) -> dict[str, list[float]]:
    """images/s of each variant, in turns, after one turn that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repetitions + 1):
        for name, go in variants.items():
            began = time.perf_counter()
            count = go()
            if turn:
                rates[name].append(count / (time.perf_counter() - began))
            print(f"turn {turn}  {name:28s} {count / (time.perf_counter() - began):8.0f} images/s", flush=True)
    return rates


def compare(mark: str, what: str, ours: list[float], theirs: list[float], peer: str) -> dict:
    ratios = [a / b for a, b in zip(ours, theirs)]
    figures = {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "n": len(ratios)}
    figures |= {"ours": statistics.median(ours), "theirs": statistics.median(theirs), "unit": "images/s"}
    return {
        "id": mark,
        "what": what,
        "peer": peer,
        **{k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()},
    }


def machine() -> dict:
    """What the figures were measured on, and its ceilings."""
    a = torch.rand(1024, 1024)
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    gflops = 10 * 2 * 1024**3 / (time.perf_counter() - began) / 1e9
    source = np.ones(64_000_000, np.uint8)
    began = time.perf_counter()
    source.copy()
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, np, cv2, simplejpeg)}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {**versions, "pillow": Image.__version__},
        "sgemm_gflops": round(gflops, 1),
        "copy_gb_per_s": round(0.064 / (time.perf_counter() - began), 1),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a directory of JPEG files; default: synthetic photographs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="one short repetition, for the mechanics")
    ask = parser.parse_args(arguments)
    count, rounds, repetitions = (32, 1, 1) if ask.quick else (300, 3, 7)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        lay_out(root, ask.images, count)
        variants = {
            "ImageFolder, 2 workers, v1": reference(root, 224, rounds, 2, uint8=False),
            "ImageFolder, 2 workers, v2": reference(root, 224, rounds, 2, uint8=True),
            "ours, 2 threads": ours(root, 224, rounds, 2, on_cpu=False),
            "ours, 1 thread": ours(root, 224, rounds, 1, on_cpu=False),
            "ours, 2 threads, normalised": ours(root, 224, rounds, 2, on_cpu=True),
        }
        rates = measure(variants, repetitions)
    v1_name, v2_name, two, one, normalised = variants
    files = str(ask.images.name) if ask.images else "synthetic photographs"
    what = f"random-resized crops of 224 px from {files}, 2 threads"
    results = [
        compare("P5", what, rates[two], rates[v1_name], v1_name),
        compare("", what, rates[two], rates[v2_name], v2_name),
        compare("", what.replace("2 threads", "1 thread"), rates[one], rates[v1_name], v1_name),
        compare("", f"{what}, normalised on the CPU as well", rates[normalised], rates[v1_name], v1_name),
    ]
    for row in results:
        spread = f"{row['min']:.2f} to {row['max']:.2f}, n = {row['n']}"
        rates_text = f"{row['ours']:.0f} against {row['theirs']:.0f}"
        print(f"{row['id']:3s} {row['ratio']:.2f} x ({spread})  {rates_text}: {row['what']}")
    if ask.json:
        ask.json.parent.mkdir(parents=True, exist_ok=True)
        ask.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
