"""Compare the loader with torchvision's reference and other packed formats, on the same images.

    python benchmarks/loader.py [--images DIR] [--json FILE] [--plot PNG] [--only P5,P8]
        [--repetitions N] [--quick]

DIR contains JPEG files; without it, synthetic photographs are created. It takes ten minutes on two
cores. Peers that are not installed are skipped: pip install -e '.[bench,bench-streaming,plot]' in an
environment of its own installs them.

P5   the original files
P6   the same images, packed, with a shorter side of 256
P7   raw shards, against the original files
P8   start to first batch
P11  memory
P12  resuming in mid-epoch
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peers
import processes
import torch
import torchvision
from materials import Materials
from measuring import Report, in_turns, machine, rate
from peers import BATCH, WORKERS
from torch.utils.data import ConcatDataset, DataLoader

from alexnet_ddp.config import BasicAugmentConfig, DataConfig, FolderConfig, ShardsConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.effects import normalise
from alexnet_ddp.data.loader import Loader, build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.sets import open_data

PARTS = ("P5", "P6", "P7", "64px", "P8", "P11", "P12")
V1, V2 = "ImageFolder, 2 workers, v1", "ImageFolder, 2 workers, v2"
# P12: an epoch contains each image this many times, and is resumed at this step.
COPIES = 5
STEPS_BEFORE = 40


def open_loader(cfg: DataConfig, index: SampleIndex) -> Loader:
    augment = build_augment(BasicAugmentConfig(), 0, cfg.image_size, cfg.eval_resize)
    return build_loader(cfg, index, augment, 1, torch.device("cpu"))


def ours(
    cfg: DataConfig, index: SampleIndex | None = None, epochs: int = 1, on_cpu: bool = False
) -> Callable[[], int]:
    """Our loader, with uint8 batches; on_cpu: normalised to floats, as by the peers' workers."""
    index = index or open_data(cfg).train
    loader, sampler = open_loader(cfg, index), GlobalBatchSampler(len(index), BATCH, seed=0)

    def run() -> int:
        works = sampler.micro_batches(range(epochs * sampler.steps_per_epoch), 0, 1, None)
        return sum(
            len(normalise(b.images, None) if on_cpu else b.images) for b in loader.batches(works)
        )

    return run


def rates(
    report: Report, title: str, variants: dict[str, Callable[[], int]], repetitions: int
) -> dict:
    print(f"\n{title}", flush=True)
    found = in_turns(
        {name: rate(run) for name, run in variants.items()},
        repetitions,
        "images/s",
        repetitions > 1,
    )
    report.turns[title] = found
    return found


def originals(report: Report, have: Materials, repetitions: int) -> None:
    """P5 and P7: the original files, and raw shards of them."""
    tree, title = have.originals, "224 px crops of the originals"
    folder = {n: FolderConfig(root=str(tree), num_threads=n) for n in (1, 2, 4)}
    raw = {n: ShardsConfig(root=str(have.raw_shards), num_threads=n) for n in (1, 2, 4)}
    variants = {
        V1: peers.reference(tree, peers.on_pillow(224)),
        V2: peers.reference(tree, peers.on_tensors(224)),
        **{f"ours: folder, {threads(n)}": ours(folder[n]) for n in (2, 1, 4)},
        "ours: folder, 2 threads, normalised": ours(folder[2], on_cpu=True),
        "ours: archive, 2 threads": ours(folder[2], have.archive),
        **{f"ours: raw shards, {threads(n)}": ours(raw[n], epochs=4) for n in (2, 1, 4)},
        "ours: raw shards, 2 threads, normalised": ours(raw[2], on_cpu=True),
    }
    found = rates(report, title, variants, repetitions)
    against = ratios_in(report, title, found)
    against("P5", "ours: folder, 2 threads", V1)
    against(None, "ours: folder, 2 threads", V2)
    against(None, "ours: folder, 1 thread", V1)
    against(None, "ours: folder, 2 threads, normalised", V1)
    against(None, "ours: archive, 2 threads", V1)
    against("P7", "ours: raw shards, 2 threads", V1)
    against(None, "ours: raw shards, 1 thread", V1)
    against(None, "ours: raw shards, 2 threads, normalised", V1)
    for name in ("folder", "raw shards"):
        for n in (2, 4):
            against(None, f"ours: {name}, {threads(n)}", f"ours: {name}, 1 thread")


def packed(report: Report, have: Materials, repetitions: int) -> None:
    """P6: JPEGs with a shorter side of 256, as files and in each packed format."""
    tree, title = have.packed_files, "224 px crops of packed JPEGs"
    shards = {n: ShardsConfig(root=str(have.jpeg_shards), num_threads=n) for n in (1, 2, 4)}
    variants = {
        V1: peers.reference(tree, peers.on_pillow(224)),
        V2: peers.reference(tree, peers.on_tensors(224)),
        **packed_peers(report, have),
        **{f"ours: shards, {threads(n)}": ours(shards[n], epochs=2) for n in (2, 1, 4)},
        "ours: shards, 2 threads, normalised": ours(shards[2], on_cpu=True),
        "ours: folder, 2 threads": ours(FolderConfig(root=str(tree), num_threads=2), epochs=2),
    }
    found = rates(report, title, variants, repetitions)
    against = ratios_in(report, title, found)
    against("P6", "ours: shards, 2 threads", V1)
    for peer in [name for name in found if not name.startswith("ours") and name != V1]:
        against(None, "ours: shards, 2 threads", peer)
    for name in (
        "ours: shards, 1 thread",
        "ours: shards, 2 threads, normalised",
        "ours: folder, 2 threads",
    ):
        against(None, name, V1)
    for n in (2, 4):
        against(None, f"ours: shards, {threads(n)}", "ours: shards, 1 thread")


def packed_peers(report: Report, have: Materials) -> dict[str, Callable[[], int]]:
    makers = {
        "webdataset": lambda: peers.webdataset(have.jpeg_shards, 224),
        "litdata": lambda: peers.litdata(have.packed_for("litdata"), 224),
        "mosaicml": lambda: peers.mosaicml(have.packed_for("mosaicml"), 224),
    }
    found = {}
    for name, make in makers.items():
        try:
            found[f"{name}, 2 workers"] = make()
        except (ImportError, subprocess.CalledProcessError) as error:
            report.skip(name, error)
    return found


def small(report: Report, have: Materials, repetitions: int) -> None:
    """64 px: with less resizing, decoding is a larger share."""
    title, files, pixels = "64 px crops", have.originals, peers.on_pillow(64)
    two = {"num_threads": 2, "image_size": 64}
    variants = {
        "ImageFolder, 2 workers, v1, originals": peers.reference(files, pixels),
        "ImageFolder, 2 workers, v1, packed": peers.reference(have.packed_files, pixels),
        "ours: folder, 2 threads": ours(FolderConfig(root=str(files), **two), epochs=2),
        "ours: shards, 2 threads": ours(ShardsConfig(root=str(have.jpeg_shards), **two), epochs=2),
        "ours: raw shards, 2 threads": ours(
            ShardsConfig(root=str(have.raw_shards), **two), epochs=8
        ),
    }
    against = ratios_in(report, title, rates(report, title, variants, repetitions))
    against(None, "ours: folder, 2 threads", "ImageFolder, 2 workers, v1, originals")
    against(None, "ours: shards, 2 threads", "ImageFolder, 2 workers, v1, packed")
    against(None, "ours: raw shards, 2 threads", "ImageFolder, 2 workers, v1, originals")


def ratios_in(
    report: Report, title: str, found: dict[str, list[float]]
) -> Callable[[str | None, str, str], None]:
    def against(mark: str | None, name: str, peer: str) -> None:
        report.compare(
            mark,
            f"{title}, {name.removeprefix('ours: ')}",
            found[name],
            found[peer],
            [peer, "images/s"],
        )

    return against


def threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def resume(report: Report, have: Materials, repetitions: int, step: int) -> None:
    """P12: seconds to the batch of `step` when an epoch is resumed there; the index is loaded."""
    cfg = FolderConfig(root=str(have.originals), num_threads=2)
    folder = torchvision.datasets.ImageFolder(have.originals / "train", peers.on_pillow(224))
    index = open_data(cfg).train
    many = torch.arange(len(index)).repeat(COPIES).numpy()
    index = SampleIndex(index.classes, index.labels[many], index.store.take(many))
    seeds = iter(range(2 * repetitions + 2))

    def replayed() -> float:
        torch.manual_seed(next(seeds))
        loader = DataLoader(
            ConcatDataset([folder] * COPIES), BATCH, shuffle=True, num_workers=WORKERS
        )
        began = time.perf_counter()
        batches = iter(loader)
        for _ in range(step + 1):
            next(batches)
        return time.perf_counter() - began

    def resumed() -> float:
        loader, sampler = (
            open_loader(cfg, index),
            GlobalBatchSampler(len(index), BATCH, seed=next(seeds)),
        )
        began = time.perf_counter()
        batches = loader.batches(
            sampler.micro_batches(range(step, sampler.steps_per_epoch), 0, 1, None)
        )
        next(batches)
        seconds = time.perf_counter() - began
        batches.close()
        loader.close()
        return seconds

    peer, name = "DataLoader, 2 workers, iterated to the step", "ours"
    found = in_turns({peer: replayed, name: resumed}, repetitions, "s", repetitions > 1)
    report.turns["resume, s"] = found
    what = (
        f"resuming at step {step} of {-(-len(index) // BATCH)} of an epoch, "
        f"batches of {BATCH}, 2 threads"
    )
    report.compare("P12", what, found[name], found[peer], [peer, "s"])


def run_parts(report: Report, have: Materials, parts: set[str], repetitions: int) -> None:
    if parts & {"P5", "P7"}:
        originals(report, have, repetitions)
    if "P6" in parts:
        packed(report, have, repetitions)
    if "64px" in parts:
        small(report, have, repetitions)
    if "P12" in parts:
        steps = COPIES * have.count // BATCH
        resume(report, have, repetitions, min(STEPS_BEFORE, steps // 2))
    if "P8" in parts:
        processes.start_to_first_batch(report, have, repetitions)
    if "P11" in parts:
        measured = {row["id"]: row["ratio"] for row in report.rows}
        processes.memory(
            report, have, repetitions, (measured.get("P6", 5.0), measured.get("P5", 2.5))
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, help="a directory of JPEG files; default: synthetic photographs"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--plot", type=Path, help="plot images per second to this file; needs matplotlib"
    )
    parser.add_argument(
        "--only", default=",".join(PARTS), help="the parts to run (default: %(default)s)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=5, help="counted turns (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one short turn, as a test")
    args = parser.parse_args(arguments)
    parts = set(args.only.split(","))
    if parts - set(PARTS):
        parser.error(
            f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(parts - set(PARTS)))}"
        )
    count, large, repetitions = (
        (32, (20, 50), 1) if args.quick else (1024, (1000, 1281), args.repetitions)
    )
    torch.set_num_threads(1)
    report, about = Report(), machine()
    about["images"] = str(args.images.name) if args.images else "synthetic photographs"
    print(about)
    with tempfile.TemporaryDirectory() as scratch:
        run_parts(report, Materials(Path(scratch), args.images, count, large), parts, repetitions)
    report.print_table()
    if args.json:
        report.write(args.json, about)
    if args.plot:
        from picture import draw

        draw(report.turns, about, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
