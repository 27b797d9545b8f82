"""Measure how many images per second are packed: one process, two, and Spark on this machine.

    python benchmarks/prepare.py [--json FILE] [--images DIR] [--quick]

The variants run in turns. Each is a new process, timed from its start to its commit, so Spark's
start-up (Java, a session) is included. "per core" divides by the number of working processes.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from materials import Materials
from measuring import Report, in_turns, machine

VARIANTS = {
    "local, 1 process": (1, ["engine=local", "engine.workers=1"]),
    "local, 2 processes": (2, ["engine=local", "engine.workers=2"]),
    "Spark, local[2]": (2, ["engine=spark", "engine.master=local[2,4]"]),
}
ONE, TWO, SPARK = VARIANTS


def packing(source: Path, root: Path, count: int, engine: list[str]) -> Callable[[], float]:
    """Returns a function that packs into an empty `root` and returns images/s."""
    command = [
        sys.executable,
        "-m",
        "alexnet_ddp.prepare",
        f"source={source}",
        f"root={root}",
        "split=train",
    ]

    def run() -> float:
        shutil.rmtree(root, ignore_errors=True)
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "num_shards=16", *engine], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr[-500:]}")
        return count / (time.perf_counter() - began)

    return run


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, help="a directory of JPEG files; default: synthetic photographs"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="counted turns (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one short turn, as a test")
    args = parser.parse_args(arguments)
    count, repetitions = (32, 1) if args.quick else (1_200, args.repetitions)
    report, about = Report(), machine()
    if importlib.util.find_spec("pyspark") is None:
        report.skip(SPARK, "pyspark is not installed: pip install 'alexnet-ddp[spark]'")
    about["spark"] = not report.skipped
    print(about)
    with tempfile.TemporaryDirectory() as scratch:
        have = Materials(Path(scratch), args.images, count, (1, 1))
        variants = {
            name: packing(have.originals, Path(scratch, "packed"), count, engine)
            for name, (_, engine) in VARIANTS.items()
            if name != SPARK or not report.skipped
        }
        found = in_turns(variants, repetitions, "images/s", warm_up=False)
    report.turns["preparation, images/s"] = found
    what = f"{count:,} originals to short side 256"
    for name in variants:
        cores = VARIANTS[name][0]
        per_core = [rate / cores for rate in found[name]]
        if name != ONE:
            report.compare(None, f"{what}, {name}", found[name], found[ONE], [ONE, "images/s"])
            report.compare(
                None, f"{what}, {name}, per core", per_core, found[ONE], [ONE, "images/s"]
            )
    if SPARK in variants:
        report.compare(None, f"{what}, {SPARK}", found[SPARK], found[TWO], [TWO, "images/s"])
    report.print_table()
    if args.json:
        report.write(args.json, about)


if __name__ == "__main__":
    main(sys.argv[1:])
