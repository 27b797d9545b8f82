"""Compare the duration of a training on one machine and on two, connected at 1 Gbit/s.

    sudo python benchmarks/two_machines.py data.root=DIR [KEY=VALUE ...] [--json FILE]
        [--repetitions N] [--quick]

It trains experiment=imagenet20 (DIR contains its archives) for 3 epochs with batches of 256, with
three variants in turns: one process on one core; two hosts with one core each and parallel=hybrid;
and the same with parallel=ddp. Seconds are those of the whole command, including start-up and
evaluations. The hosts are network namespaces, which need root and iproute2.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

from links import OUR_MALLOC, ROOT, Hosts, why_not
from measuring import Report, machine

RECIPE = [
    "experiment=imagenet20",
    "trainer.global_batch_size=256",
    "optimizer.lr=1.7e-3",
    "trainer.epochs=3",
]
QUIET = ["logger.progress=false", "logger.tensorboard=false", "trainer.log_every_steps=50"]
ONE, HYBRID, DDP = (
    "one process on one core",
    "two hosts, parallel=hybrid",
    "two hosts, parallel=ddp",
)
TEAMS = {ONE: (1, "ddp"), HYBRID: (2, "hybrid"), DDP: (2, "ddp")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="overrides of the training")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on synthetic images, as a test"
    )
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"two_machines.py creates hosts and links on this machine, which {reason}")
    overrides = [*RECIPE, *QUIET, *args.overrides]
    if args.quick:
        small = ["data=synthetic", "data.num_train=64", "data.num_val=20", "data.image_size=64"]
        overrides = [*QUIET, *small, "trainer.epochs=1", "trainer.global_batch_size=32"]
    report, seconds, accuracy = Report(), {team: [] for team in TEAMS}, {}
    folder = Path(tempfile.mkdtemp(prefix="alexnet_ddp.two_machines."))
    try:
        for turn in range(args.repetitions):
            for team in TEAMS:
                run_dir = folder / f"{turn}-{len(accuracy)}"
                seconds[team].append(train(team, run_dir, overrides))
                accuracy[f"{team}, turn {turn}"] = curve(run_dir)
                top1 = accuracy[f"{team}, turn {turn}"]
                print(f"{team:28s}{seconds[team][-1]:8.1f} s   top-1 {top1}", flush=True)
    finally:
        shutil.rmtree(folder)
    for team in (HYBRID, DDP):
        report.compare(
            None, f"training at 1 Gbit/s, {team}", seconds[team], seconds[ONE], [ONE, "s"]
        )
    report.turns |= {"seconds of a training": seconds, "top-1 after each epoch": accuracy}
    if args.json:
        report.write(args.json, machine() | {"overrides": overrides})


def train(team: str, run_dir: Path, overrides: list[str]) -> float:
    """Train once, and return the duration in seconds."""
    num_ranks, parallel = TEAMS[team]
    overrides = [
        *overrides,
        f"parallel={parallel}",
        f"run.root={run_dir.parent}",
        f"run.name={run_dir.name}",
    ]
    env = {
        **os.environ,
        **OUR_MALLOC,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    env |= {"WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "10.77.0.11", "MASTER_PORT": "29500", "PYTHONWARNINGS": "ignore"}
    with Hosts(2) as hosts:  # one core each
        for host in ("n1", "n2"):
            hosts.rate(host, "1gbit")
        began = monotonic()
        command = [sys.executable, "-m", "alexnet_ddp.train", *overrides]
        ranks = [
            subprocess.Popen(hosts.command(f"n{rank + 1}", *command), env=env | {"RANK": str(rank)})
            for rank in range(num_ranks)
        ]
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit(f"{team}: exit codes {codes}; see the messages above")
    return monotonic() - began


def curve(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["val/top1"] for row in rows if "val/top1" in row]


if __name__ == "__main__":
    main()
