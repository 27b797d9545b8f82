"""Shared by the benchmarks: turns, ratios, facts about the machine, the table and the JSON file.

Variants run in turns (A B C A B C ...), and the first turn is not counted. A ratio is the median
over the turns, with minimum and maximum. Absolute figures depend on other users of a shared
machine; ratios depend on them less.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LIBRARIES = ("torch", "torchvision", "numpy", "opencv-python-headless", "simplejpeg", "pillow")
PEERS = ("webdataset", "litdata", "mosaicml-streaming")

Figures = dict[str, list[float]]  # variant -> its figure in each counted turn


@dataclass
class Report:
    """The rows of the table, and the figures of each turn from which they are computed."""

    rows: list[dict] = field(default_factory=list)
    turns: dict[str, Figures] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def compare(
        self, mark: str | None, what: str, ours: list[float], theirs: list[float], labels: list[str]
    ) -> None:
        """Add a row: how many times better `ours` is than `theirs`.

        mark: the target of the row, if it has one. labels: the peer, and the unit of both. More
        images/s are better; of every other unit less is better.
        """
        peer, unit = labels
        more = unit == "images/s"
        ratios = [a / b if more else b / a for a, b in zip(ours, theirs)]
        row = {"id": mark, "what": what, "peer": peer, "ratio": statistics.median(ratios)}
        row |= {"min": min(ratios), "max": max(ratios), "n": len(ratios)}
        row |= {"ours": statistics.median(ours), "theirs": statistics.median(theirs), "unit": unit}
        self.rows.append(
            {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}
        )
        print(as_text(self.rows[-1]), flush=True)

    def skip(self, what: str, why: object) -> None:
        line = f"{what} is skipped: {why}"
        self.skipped.append(line)
        print(line, flush=True)

    def print_table(self) -> None:
        print(
            "\n"
            + "\n".join(
                as_text(row) for row in sorted(self.rows, key=lambda row: row["id"] is None)
            )
        )

    def write(self, file: Path, about: dict) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        turns = {
            title: {k: [round(v, 3) for v in vs] for k, vs in figures.items()}
            for title, figures in self.turns.items()
        }
        found = {"machine": about, "skipped": self.skipped, "results": self.rows, "turns": turns}
        file.write_text(json.dumps(found, indent=1) + "\n")


def as_text(row: dict) -> str:
    spread = f"({row['min']:.2f} to {row['max']:.2f}, n = {row['n']})"
    both = f"{row['ours']:,.4g} against {row['theirs']:,.4g} {row['unit']}"
    ratio = f"{row['id'] or '':3s} {row['ratio']:7.2f} x {spread:30s}"
    return f"{ratio} {both}: {row['what']}; peer: {row['peer']}"


def in_turns(
    variants: dict[str, Callable[[], float]], repetitions: int, unit: str, warm_up: bool = True
) -> Figures:
    """The figures of each variant in `repetitions` turns, after a `warm_up` turn without count."""
    figures: Figures = {name: [] for name in variants}
    for turn in range(not warm_up, repetitions + 1):
        for name, run in variants.items():
            figure = run()
            if turn:
                figures[name].append(figure)
            print(f"turn {turn}  {name:44s} {figure:10.4g} {unit}", flush=True)
    return figures


def rate(run: Callable[[], int]) -> Callable[[], float]:
    """Turn a function that returns a count into one that returns the count per second."""

    def timed() -> float:
        began = time.perf_counter()
        count = run()
        return count / (time.perf_counter() - began)

    return timed


def machine(libraries: Iterable[str] = (*LIBRARIES, *PEERS)) -> dict:
    """Facts about this machine, and its matrix-multiplication and copy rates."""
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(cores)
    a = torch.rand(1024, 1024)
    gflops = 10 * 2 * 1024**3 / 1e9 / _best_seconds(lambda: [a @ a for _ in range(10)])
    torch.set_num_threads(threads)
    source, target = np.ones(64_000_000, np.uint8), np.ones(64_000_000, np.uint8)
    copy = source.nbytes / 1e9 / _best_seconds(lambda: np.copyto(target, source))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": cores,
        "python": platform.python_version(),
        "versions": {name: version for name in libraries if (version := _version(name))},
        "sgemm_gflops": round(gflops, 1),
        "copy_gb_per_s": round(copy, 1),
    }


def _best_seconds(run: Callable[[], object], times: int = 5) -> float:
    """The shortest of a few runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _cpu() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
