"""`predict` against the usual pipeline of torchvision, and the memory of `predict`.

python benchmarks/predict.py --images DIR [--model alexnet] [--repetitions 5] [--num-files N]

The peer is a data set of the same files, opened by Pillow, with torchvision's preset for
classification (resize 256, centre crop 224), a DataLoader with 2 workers and the same network in
evaluation mode; it keeps the five most probable classes. Both run in this process in turns, with
the same number of threads. The figure is images/s from the first file to the last prediction,
without imports and without reading the weights. A second row has a network that costs nothing,
instead of one that a GPU computes. The profile is the CPU time of each part on one thread.

The last part runs `predict` in a process of its own on hard links of a few small JPEG files,
and reports the largest resident memory of that process, with alexnet_small at 32 px.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import measuring
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms._presets import ImageClassification

from alexnet_ddp import load_run
from alexnet_ddp.api import TrainedRun
from alexnet_ddp.config import Device, RunConfig
from alexnet_ddp.config.predict import PredictConfig
from alexnet_ddp.data.decode import centre_into
from alexnet_ddp.data.effects import normalise
from alexnet_ddp.data.sources.index import FileStore
from alexnet_ddp.predict.command import predict
from alexnet_ddp.predict.images import find_images
from alexnet_ddp.runtime import distributed

ROOT = Path(__file__).parents[1]
_WORKERS = 2
_BATCH_SIZE = 64


class Files(Dataset):
    """The images of `paths`, as torchvision's preset prepares them."""

    def __init__(self, paths: list[str]) -> None:
        self.paths, self.transform = paths, ImageClassification(crop_size=224)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with open(self.paths[i], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def run_of(folder: Path, model: str, size: int) -> Path:
    """Train a network for a step on synthetic images: its speed does not depend on its weights."""
    options = [
        *("data=synthetic", "data.num_classes=1000", "data.num_train=8", "data.num_val=8"),
        *(f"data.image_size={size}", f"model={model}", "trainer.max_steps=1", "augment=basic"),
        *("trainer.global_batch_size=8", "trainer.epochs=1", "logger.tensorboard=false"),
        *(f"run.root={folder}", f"run.name={model}-{size}", "device=cpu"),
    ]
    _start("train", *options)
    return folder / f"{model}-{size}"


def _start(command: str, *options: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", f"alexnet_ddp.{command}", *options]
    subprocess.run(line, check=True, env=environment, stdout=subprocess.DEVNULL)


def rates(
    report: measuring.Report, trained: TrainedRun, paths: FileStore, what: str, repetitions: int
) -> None:
    """Add a row. what: the network of `trained`."""
    names = [paths.name(i) for i in range(len(paths))]
    options = PredictConfig(run=RunConfig(name="x"), images="x", device=Device.cpu)

    def ours() -> int:
        return sum(len(one.classes) == 5 for one in predict(trained, paths, options, world))

    def theirs() -> int:
        found = 0
        loader = DataLoader(Files(names), _BATCH_SIZE, num_workers=_WORKERS)
        with torch.inference_mode():
            for batch in loader:
                found += len(trained.model(batch).softmax(1).topk(5).indices.tolist())
        return found

    with distributed.session(Device.cpu) as world:
        assert ours() == theirs() == len(paths)
        variants = {"predict": measuring.rate(ours), "DataLoader": measuring.rate(theirs)}
        figures = measuring.in_turns(variants, repetitions, "images/s")
    title = f"predict, {what}, 224 px, {len(paths)} files"
    report.turns[title] = figures
    peer = [f"torchvision's preset, DataLoader with {_WORKERS} workers", "images/s"]
    report.compare("predict", title, figures["predict"], figures["DataLoader"], peer)


def without_network(trained: TrainedRun) -> TrainedRun:
    """`trained` with a network of almost no arithmetic."""
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(trained.classes))]
    return replace(trained, model=nn.Sequential(*layers).eval())


def profile(trained: TrainedRun, paths: FileStore) -> dict[str, float]:
    """CPU ms of an image on one thread: the least of three passes for each part."""
    data, count = trained.config.data, min(_BATCH_SIZE, len(paths))
    peer = Files([paths.name(i) for i in range(count)])
    slots = np.empty((count, 224, 224, 3), np.uint8)
    ours = torch.zeros(count, 3, 224, 224).to(memory_format=torch.channels_last)
    theirs = ours.contiguous()
    parts: dict[str, Callable[[], object]] = {
        "decode, resize, crop": lambda: [
            centre_into(slots[i], paths.read(i), data.resized_side) for i in range(count)
        ],
        "normalise": lambda: normalise(torch.from_numpy(slots), None, data.normalisation),
        "network": lambda: trained.model(ours),
        "network of the peer": lambda: trained.model(theirs),
        "decode, resize, crop, normalise of the peer": lambda: [peer[i] for i in range(count)],
    }
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name, run in parts.items():
            times = []
            for _ in range(3):
                began = time.thread_time()
                run()
                times.append(time.thread_time() - began)
            found[name] = round(1000 * min(times) / count, 2)
    torch.set_num_threads(threads)
    return found


def listed(images: str, limit: int | None) -> FileStore:
    """At most `limit` of the images, evenly spread."""
    paths = find_images(images)
    count = min(limit or len(paths), len(paths))
    return paths.take(np.linspace(0, len(paths) - 1, count, dtype=np.int64))


def memory(run_dir: Path, num_files: int) -> dict[str, float]:
    """The largest resident memory of a `predict` process, in MB, for two numbers of files."""
    found = {}
    with tempfile.TemporaryDirectory(dir=run_dir.parent) as place:
        for count in (num_files // 100, num_files):
            _write_files(Path(place) / str(count), count)
            # ru_maxrss would count the memory of this process, too, which the new one inherits.
            code = (
                "import runpy\n"
                "try:\n    runpy.run_module('alexnet_ddp.predict', run_name='__main__')\n"
                "finally:\n    print([x for x in open('/proc/self/status') if 'VmHWM' in x][0])\n"
            )
            options = [
                *(f"run.root={run_dir.parent}", f"run.name={run_dir.name}", "device=cpu"),
                *(f"images={place}/{count}", f"output={place}/o.jsonl"),
            ]
            done = subprocess.run(
                [sys.executable, "-c", code, *options],
                check=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            )
            lines = Path(f"{place}/o.jsonl").read_bytes().count(b"\n")
            assert lines == count, lines
            found[f"{count:,} files"] = int(done.stdout.split()[-2]) * 1024 / 1e6
            print(f"{count:9,} files  {found[f'{count:,} files']:8.0f} MB", flush=True)
    return found


def _write_files(folder: Path, count: int) -> None:
    """`count` hard links of eight JPEG files of 64 x 64 pixels, 1,000 in each folder."""
    random = np.random.default_rng(0)
    folder.mkdir()
    originals = []
    for k in range(8):
        coarse = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        originals.append(folder / f"{k}.jpeg.source")
        Image.fromarray(coarse).resize((64, 64)).save(originals[-1], "JPEG")
    for i in range(count):
        place = folder / f"{i // 1000:05d}"
        if i % 1000 == 0:
            place.mkdir()
        os.link(originals[i % 8], place / f"{i:07d}.jpg")
    for original in originals:
        original.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="a folder of JPEG files; default: synthetic ones")
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--limit", type=int, help="use this many of the images")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--num-files", type=int, default=100_000, help="of the memory's part")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/predict.json")
    args = parser.parse_args()
    if args.quick:
        args.repetitions, args.num_files, args.limit = 1, 200, 16
    report = measuring.Report()
    about = measuring.machine(measuring.LIBRARIES)
    place = Path(tempfile.mkdtemp(prefix="predict-"))
    try:
        if args.images is None:
            _write_files(place / "images", 64)
            args.images = str(place / "images")
        paths = listed(args.images, args.limit)
        trained = load_run(run_of(place / "runs", args.model, 224))
        trained.model.to(memory_format=torch.channels_last)  # as the command does
        about["profile_ms"] = profile(trained, paths)
        print(about["profile_ms"], flush=True)
        rates(report, trained, paths, args.model, args.repetitions)
        rates(report, without_network(trained), paths, "no network", args.repetitions)
        found = memory(run_of(place / "runs", "alexnet_small", 32), args.num_files)
        about["rss_mb"] = {count: round(mb) for count, mb in found.items()}
    finally:
        shutil.rmtree(place)
    report.print_table()
    report.write(args.json, about)


if __name__ == "__main__":
    main()
