"""P8 and P11: what a whole process costs, from its start to its first batch, and in memory. Each turn is a new one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from materials import Materials
from measuring import Figures, Report, in_turns


def start_to_first_batch(report: Report, have: Materials, repetitions: int) -> None:
    """P8. All with a warm page cache, and OMP_NUM_THREADS=1 as torchrun gives it to its ranks."""
    tree, shards, raw = str(have.large_tree), str(have.large_jpeg_shards), str(have.large_raw_shards)
    starts = Starts(have.scratch)
    peer = "ImageFolder + DataLoader, 2 workers"
    variants = {
        peer: starts.of(loader="theirs", root=tree, workers=2),
        "ours: shards": starts.of(loader="ours", data="shards", root=shards),
        "ours: raw shards": starts.of(loader="ours", data="shards", root=raw),
        "ours: shards, torch imported": starts.of(loader="ours", data="shards", root=shards, torch=True),
        "ours: folder, cached index, torch imported": starts.of(loader="ours", data="folder", root=tree, torch=True),
    }
    whole = in_turns(variants, repetitions, "s", warm_up=repetitions > 1)
    after: Figures = {name: seconds[-repetitions:] for name, seconds in zip(variants, starts.after_imports.values())}
    report.turns |= {"start to first batch, s": whole, "imports to first batch, s": after}
    what = f"start to first batch, index of {have.large[0] * have.large[1]:,}, "
    for mark, name, note in (
        ("P8", "ours: shards", "shards, batch in host memory before torch is imported"),
        (None, "ours: raw shards", "raw shards, batch in host memory before torch is imported"),
        (None, "ours: shards, torch imported", "shards, torch imported by both"),
        (None, "ours: folder, cached index, torch imported", "the same folders, torch imported by both"),
    ):
        report.compare(mark, what + note, whole[name], whole[peer], [peer, "s"])
    for name in ("ours: shards", "ours: folder, cached index, torch imported"):
        note = f"{what}counted from the end of the imports, {name.removeprefix('ours: ')}"
        report.compare(None, note, after[name], after[peer], [peer, "s"])


def memory(report: Report, have: Materials, repetitions: int, ratios: tuple[float, float]) -> None:
    """P11. Peak of PSS, summed over the process and its workers, torch included in both, each library counted once.

    Workers are as many as our throughput needs of them: 2 threads x `ratios` (packed, originals), on a machine with so
    many cores. Their number is what counts for memory, so two cores may feed them as slowly as they like. Both are
    looked at when all that they prepare ahead is there, which is two batches a worker, torch's default.
    """
    large, files, shards = str(have.large_tree), str(have.packed_files), str(have.jpeg_shards)
    more, some = (ceil(2 * ratio) for ratio in ratios)
    starts, short = Starts(have.scratch), repetitions == 1

    def load(seconds: float, **ask: object) -> Callable[[], float]:
        return starts.memory_of(torch=True, seconds=0.5 if short else seconds, **ask)

    variants = {
        f"ImageFolder, {more} workers, packed": load(5, loader="theirs", root=files, workers=more, copies=5),
        "ImageFolder, 2 workers, packed": load(3, loader="theirs", root=files, workers=2, copies=5),
        "ours: shards, 2 threads": load(2, loader="ours", data="shards", root=shards),
        f"ImageFolder, {some} workers, large": load(5, loader="theirs", root=large, workers=some),
        "ours: folder, 2 threads, large": load(2, loader="ours", data="folder", root=large),
    }
    found = in_turns(variants, repetitions, "MB", warm_up=False)
    report.turns["peak PSS, MB"] = found
    equal, plain, packed, equal_large, folder = found
    what, index = "peak PSS of loading, torch included", f"index of {have.large[0] * have.large[1]:,} files"
    note = f"as many workers as the throughput of 2 threads needs ({ratios[0]:.1f} x 2)"
    report.compare("P11", f"{what}, packed JPEGs, {note}", found[packed], found[equal], [equal, "MB"])
    report.compare(None, f"{what}, packed JPEGs, any throughput", found[packed], found[plain], [plain, "MB"])
    note = f"as many workers as needed ({ratios[1]:.1f} x 2)"
    report.compare(None, f"{what}, {index}, {note}", found[folder], found[equal_large], [equal_large, "MB"])


@dataclass
class Starts:
    """Starts one_process.py."""

    scratch: Path
    after_imports: Figures = field(default_factory=dict)  # seconds from the end of the imports to the first batch

    def of(self, **ask: object) -> Callable[[], float]:
        """Seconds from the start of a process to its first batch."""

        def run() -> float:
            began = time.perf_counter()
            process = self._start(ask)
            line = process.stdout.readline()
            seconds = time.perf_counter() - began
            _finish(process)
            self.after_imports.setdefault(key, []).append(float(line))
            return seconds

        key = json.dumps(ask)
        return run

    def memory_of(self, **ask: object) -> Callable[[], float]:
        """Peak of its PSS, in MB, from its first batch on."""

        def run() -> float:
            process, peak = self._start(ask), 0.0
            process.stdout.readline()
            while process.poll() is None:
                own, files = zip(*map(_memory_mb, _family(process.pid)))
                peak = max(peak, sum(own) + max(files))
                time.sleep(0.1)
            _finish(process)
            return peak

        return run

    def _start(self, ask: dict[str, object]) -> subprocess.Popen:
        full = {"torch": False, "seconds": 0, **ask}
        command = [sys.executable, str(Path(__file__).with_name("one_process.py")), json.dumps(full)]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "XDG_CACHE_HOME": str(self.scratch / "cache"),
        }
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)


def _finish(process: subprocess.Popen) -> None:
    process.stdout.close()
    if process.wait():
        sys.exit(f"a process ended with {process.returncode}: {process.args[-1]}")


def _family(pid: int) -> list[int]:
    """`pid` and the processes below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # gone
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def _memory_mb(pid: int) -> tuple[float, float]:
    """(PSS of memory and of shared memory, pages of files that are mapped in) of a process; zeros for one that ends.

    The kernel divides a page of libtorch by the number of processes that have it mapped, strangers as well. So they are
    not taken from its sum: the caller counts the files of the largest process, once.
    """
    try:
        rollup, status = (Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status"))
    except OSError:
        return 0.0, 0.0
    kib = {line.split(":")[0]: line.split()[1] for line in (rollup + status).splitlines() if line.endswith(" kB")}
    own, files, shared = (int(kib.get(key, 0)) * 1024 / 1e6 for key in ("Pss_Anon", "RssFile", "Pss_Shmem"))
    return own + shared, files
