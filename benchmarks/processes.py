"""P8 and P11: time from process start to first batch, and memory. Each turn is a new process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from materials import Materials
from measuring import Figures, Report, in_turns


def start_to_first_batch(report: Report, have: Materials, repetitions: int) -> None:
    """P8. With a warm page cache and OMP_NUM_THREADS=1, as torchrun sets it."""
    tree, shards, raw = (
        str(have.large_tree),
        str(have.large_jpeg_shards),
        str(have.large_raw_shards),
    )
    starts = Starts(have.scratch)
    peer = "ImageFolder + DataLoader, 2 workers"
    variants = {
        peer: starts.of(loader="theirs", root=tree, workers=2),
        "ours: shards": starts.of(loader="ours", data="shards", root=shards),
        "ours: raw shards": starts.of(loader="ours", data="shards", root=raw),
        "ours: shards, torch imported": starts.of(
            loader="ours", data="shards", root=shards, torch=True
        ),
        "ours: folder, cached index, torch imported": starts.of(
            loader="ours", data="folder", root=tree, torch=True
        ),
    }
    whole = in_turns(variants, repetitions, "s", warm_up=repetitions > 1)
    after: Figures = {
        name: seconds[-repetitions:]
        for name, seconds in zip(variants, starts.after_imports.values())
    }
    report.turns |= {"start to first batch, s": whole, "imports to first batch, s": after}
    what = f"start to first batch, index of {have.large[0] * have.large[1]:,}, "
    for mark, name, note in (
        ("P8", "ours: shards", "shards, batch in host memory before torch is imported"),
        (None, "ours: raw shards", "raw shards, batch in host memory before torch is imported"),
        (None, "ours: shards, torch imported", "shards, torch imported by both"),
        (
            None,
            "ours: folder, cached index, torch imported",
            "the same folders, torch imported by both",
        ),
    ):
        report.compare(mark, what + note, whole[name], whole[peer], [peer, "s"])
    for name in ("ours: shards", "ours: folder, cached index, torch imported"):
        note = f"{what}counted from the end of the imports, {name.removeprefix('ours: ')}"
        report.compare(None, note, after[name], after[peer], [peer, "s"])


def memory(report: Report, have: Materials, repetitions: int, ratios: tuple[float, float]) -> None:
    """P11. Peak memory of a process and its workers, including torch.

    The peer has as many workers as it would need for the throughput of our 2 threads: 2 x `ratios`
    (packed, originals), on a machine with that many cores. Memory depends on their number, not on
    their speed, so two cores are enough here. Memory is read when all prefetched batches exist: two
    per worker, torch's default.
    """
    large, files, shards = str(have.large_tree), str(have.packed_files), str(have.jpeg_shards)
    more, some = (ceil(2 * ratio) for ratio in ratios)
    loads = {
        f"ImageFolder, {more} workers, packed": (
            5,
            {"loader": "theirs", "root": files, "workers": more, "copies": 5},
        ),
        "ImageFolder, 2 workers, packed": (
            3,
            {"loader": "theirs", "root": files, "workers": 2, "copies": 5},
        ),
        "ours: shards, 2 threads": (2, {"loader": "ours", "data": "shards", "root": shards}),
        f"ImageFolder, {some} workers, large": (
            5,
            {"loader": "theirs", "root": large, "workers": some},
        ),
        "ours: folder, 2 threads, large": (2, {"loader": "ours", "data": "folder", "root": large}),
    }
    starts, short = Starts(have.scratch), repetitions == 1
    variants = {
        name: starts.memory_of(name, torch=True, seconds=0.5 if short else seconds, **request)
        for name, (seconds, request) in loads.items()
    }
    found = in_turns(variants, repetitions, "MB", warm_up=False)
    report.turns |= {"peak memory, MB": found, "peak PSS, MB": starts.pss}
    equal, plain, packed, equal_large, folder = found
    what, index = (
        "memory of loading, torch included",
        f"index of {have.large[0] * have.large[1]:,} files",
    )
    need = "as many workers as the throughput of 2 threads needs"
    for mark, mine, peer, note in (
        ("P11", packed, equal, f"packed JPEGs, {need} ({ratios[0]:.1f} x 2)"),
        (None, packed, plain, "packed JPEGs, 2 workers, whatever their throughput"),
        (None, folder, equal_large, f"{index}, {need} ({ratios[1]:.1f} x 2)"),
    ):
        report.compare(
            mark, f"{what}, PSS and waiting batches: {note}", found[mine], found[peer], [peer, "MB"]
        )
        report.compare(
            None, f"{what}, PSS alone: {note}", starts.pss[mine], starts.pss[peer], [peer, "MB"]
        )


@dataclass
class Starts:
    """Starts one_process.py."""

    scratch: Path
    # Seconds from the end of the imports to the first batch.
    after_imports: Figures = field(default_factory=dict)
    pss: Figures = field(default_factory=dict)  # peak, in MB

    def of(self, **request: object) -> Callable[[], float]:
        """Returns a function that measures seconds from process start to first batch."""

        def run() -> float:
            began = time.perf_counter()
            process = self._start(request)
            line = process.stdout.readline()
            seconds = time.perf_counter() - began
            _finish(process)
            self.after_imports.setdefault(key, []).append(float(line))
            return seconds

        key = json.dumps(request)
        return run

    def memory_of(self, name: str, **request: object) -> Callable[[], float]:
        """Returns a function that measures peak memory in MB after the first batch.

        It appends the peak of PSS to self.pss[name].
        """

        def run() -> float:
            process, peak, peak_pss = self._start(request), 0.0, 0.0
            process.stdout.readline()
            while process.poll() is None:
                used, pss = _memory_mb(_family(process.pid))
                peak, peak_pss = max(peak, used), max(peak_pss, pss)
                time.sleep(0.1)
            _finish(process)
            self.pss.setdefault(name, []).append(peak_pss)
            return peak

        return run

    def _start(self, request: dict[str, object]) -> subprocess.Popen:
        full = {"torch": False, "seconds": 0, **request}
        command = [
            sys.executable,
            str(Path(__file__).with_name("one_process.py")),
            json.dumps(full),
        ]
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
    """`pid` and its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def _memory_mb(family: list[int]) -> tuple[float, float]:
    """(memory in use, PSS) of several processes together, in MB.

    The kernel's PSS is used for private memory. Two values are corrected. Mapped files: PSS divides
    a page of libtorch by all processes that map it, including unrelated ones, so the mapped files
    of the largest process are counted once instead. Queued batches: they are files in /dev/shm
    that no process maps, so PSS does not contain them.
    """
    own, files, mapped, shared = 0.0, 0.0, 0.0, {}
    for pid in family:
        status = _read(f"/proc/{pid}/smaps_rollup") + _read(f"/proc/{pid}/status")
        kib = {
            line.split(":")[0]: line.split()[1]
            for line in status.splitlines()
            if line.endswith(" kB")
        }
        own += int(kib.get("Pss_Anon", 0)) * 1024 / 1e6
        files = max(files, int(kib.get("RssFile", 0)) * 1024 / 1e6)
        mapped += int(kib.get("Pss_Shmem", 0)) * 1024 / 1e6
        shared |= _shared_memory_mb(pid)
    return own + files + max(mapped, sum(shared.values())), own + files + mapped


def _shared_memory_mb(pid: int) -> dict[int, float]:
    """inode -> MB of the files in /dev/shm that a process has mapped or opened."""
    found = {}
    for line in _read(f"/proc/{pid}/maps").splitlines():
        if "/dev/shm/" in line:
            span, _, _, _, inode, *_ = line.split()
            start, end = (int(address, 16) for address in span.split("-"))
            found[int(inode)] = (end - start) / 1e6
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed
                if os.readlink(link).startswith("/dev/shm/"):
                    status = link.stat()
                    found[status.st_ino] = status.st_blocks * 512 / 1e6
    return found


def _read(path: str) -> str:
    """The content of a file in /proc, or "" if the process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
