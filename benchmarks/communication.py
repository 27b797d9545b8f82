"""Measure the cost of communication: parallel=hybrid against plain DDP, on links of known speed.

    sudo python benchmarks/communication.py [--json FILE] [--plot PNG] [--repetitions N]
        [--all | --fine-tuning] [--quick]

It creates hosts on this machine (network namespaces with one core each), connects them, and
alternates between variants of one training. It needs root, iproute2 and 8 GB of memory; --all needs
18 GB. Without --all: P1 to P4, in six minutes. With --all, in over an hour (n = 3): also our DDP,
the communication hooks, Lightning if it is installed, 128 and 224 px, four ranks, and scaling from
1 to 4 ranks. --fine-tuning instead compares what a step of finetune.method=head and lora sends and
takes with finetune.method=full, at 100 Mbit/s.

P1  bytes sent per rank and step: two ranks, 32 images each. The parameters must be equal to 1e-5
    after these steps
P2  seconds per step at 1 Gbit/s, 64 px
P3  the same at 100 Mbit/s
P4  the same on a link that is not shaped

The peer is plain_ddp.py. It uses the default memory allocator, as its users do; ours uses the
MALLOC_ settings of launch/. Both use the kernel's TCP settings.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from communication_picture import BYTES, draw
from links import LINKS, Field, field, has_lightning, why_not
from measuring import Report, in_turns, machine

PLAIN, FP16, POWERSGD, LIGHTNING = (
    "plain DDP",
    "plain DDP, fp16 hook",
    "plain DDP, PowerSGD rank 1",
    "Lightning DDP",
)
# What is faster without hybrid: the fused update, the allocator, gradients as views of buckets.
OURS_DDP = "ours: parallel=ddp"
VARIANTS = {
    PLAIN: {"kind": "plain"},
    FP16: {"kind": "plain", "hook": "fp16"},
    POWERSGD: {"kind": "plain", "hook": "PowerSGD"},
    LIGHTNING: {"kind": "lightning"},
    OURS_DDP: {"kind": "ours", "overrides": ["parallel=ddp"]},
}
FINE_TUNED = {method: f"ours: finetune.method={method}" for method in ("full", "head", "lora")}
TARGETS = {"1 Gbit/s": "P2", "100 Mbit/s": "P3", "unshaped": "P4"}
BLOCK = {"unshaped": 4, "1 Gbit/s": 3, "100 Mbit/s": 1}  # steps per turn
WARM_UP = 4  # steps of a new team: DDP rebuilds its buckets, PowerSGD starts
SCALING_LINK = "1 Gbit/s"
STRONG_BATCH = 96  # images of the global batch, divisible by 1 to 4


@dataclass
class Bench:
    """One set of measurements and its settings."""

    report: Report
    overrides: list[str]  # of our runs
    repetitions: int
    batch: int  # images per rank
    links: list[str]
    keep: Callable[[], None]  # saves the results so far: --all takes over an hour
    warm_up: bool = True

    @property
    def ours(self) -> str:
        return "ours: " + " ".join(self.overrides)

    def request(self, variant: str, batch: int, size: int) -> dict:
        known = VARIANTS | {self.ours: {"kind": "ours", "overrides": self.overrides}}
        return {**known[variant], "batch": batch, "size": size}

    def bytes_sent(self, on: Field, folder: Path, size: int = 64) -> None:
        """P1, and a check that both variants compute the same: equal weights, no dropout."""
        record = {"record": str(folder)}
        ours = self.request(self.ours, self.batch, size) | record
        ours["overrides"] = [*ours["overrides"], "model.dropout=0"]
        team = on.team(ours)  # records the weights and images for `peer`
        peer = on.team({"kind": "replayed"} | record)
        variants = {self.ours: team.megabytes(1), PLAIN: peer.megabytes(1)}
        found = self._turns(BYTES, variants, "MB")
        team.close()
        peer.close()
        apart, astray = largest_differences(folder)
        # Relative to the update they may differ more: rounding can flip a ReLU, which makes 3e-4.
        if apart > 1e-5 or astray > 1e-2:
            sys.exit(
                f"the parameters differ by {apart:.1e} of their norm and {astray:.1e} of their "
                "update; 1e-5 and 1e-2 are allowed"
            )
        what = (
            f"sent by a rank in a step, {self.batch} images, K=2; "
            f"parameters equal to {apart:.0e} relative"
        )
        self.report.compare("P1", what, found[self.ours], found[PLAIN], [PLAIN, "MB"])

    def step_times(self, on: Field, variants: list[str], num_ranks: int, size: int) -> None:
        """The rows of one image size and number of ranks, on all links. They include P2 to P4."""
        teams = {name: on.team(self.request(name, self.batch, size)) for name in variants}
        for team in teams.values():
            team.steps(WARM_UP if self.warm_up else 1)
        for link in self.links:
            on.link(LINKS[link])
            steps = BLOCK[link] if self.warm_up else 1
            title = f"K={num_ranks}, {size} px, {link}"
            found = self._turns(
                title, {name: team.seconds(steps) for name, team in teams.items()}, "s"
            )
            for name in variants:
                if name != PLAIN:
                    mark = TARGETS[link] if (name, num_ranks, size) == (self.ours, 2, 64) else None
                    what = f"step, {title}, {self.batch} images a rank: {name}"
                    self.report.compare(mark, what, found[name], found[PLAIN], [PLAIN, "s"])
        on.link(None)
        for team in teams.values():
            team.close()
        self.keep()

    def scaling(self, largest: int, size: int = 64) -> None:
        """Images per second on 1 to `largest` ranks: fixed batch per rank, and fixed total."""
        for kind in ("weak", "strong"):
            title = f"{kind} scaling, {size} px, {SCALING_LINK}, images/s"
            figures = self.report.turns.setdefault(title, {})
            for num_ranks in range(1, largest + 1):
                batch = self.batch if kind == "weak" else STRONG_BATCH // num_ranks
                found = self._at_scale(num_ranks, batch, size)
                figures |= {
                    name: [batch * num_ranks / s for s in taken] for name, taken in found.items()
                }
            for num_ranks in range(2, largest + 1):
                for name in (PLAIN, self.ours):
                    pair = [figures[f"{name}, K={k}"] for k in (num_ranks, 1)]
                    self.report.compare(
                        None, f"{title}, K={num_ranks}: {name}", *pair, ["itself, K=1", "images/s"]
                    )
            self.keep()

    def _at_scale(self, num_ranks: int, batch: int, size: int) -> dict[str, list[float]]:
        with field(num_ranks) as on:
            teams = {
                f"{name}, K={num_ranks}": on.team(self.request(name, batch, size))
                for name in (PLAIN, self.ours)
            }
            for team in teams.values():
                team.steps(WARM_UP)
            on.link(LINKS[SCALING_LINK])
            seconds = {name: team.seconds(BLOCK[SCALING_LINK]) for name, team in teams.items()}
            return in_turns(seconds, self.repetitions, "s", self.warm_up)

    def fine_tuning(self, on: Field, folder: Path, size: int = 64) -> None:
        """Bytes and seconds of a step on 10 classes, by what is trained, whatever the weights."""
        weights = folder / "alexnet.pt"
        write_weights(weights)
        teams = {}
        for method, name in FINE_TUNED.items():
            overrides = ["parallel=ddp", f"finetune.method={method}", f"model.weights={weights}"]
            overrides += ["data.num_classes=10"]
            request = {"kind": "ours", "overrides": overrides, "batch": self.batch, "size": size}
            teams[name] = on.team(request)
            teams[name].steps(WARM_UP if self.warm_up else 1)
        link = "100 Mbit/s"
        on.link(LINKS[link])
        for what, unit, figure in (
            ("fine-tuning, " + BYTES, "MB", lambda team: team.megabytes(1)),
            (f"fine-tuning, K=2, {size} px, {link}", "s", lambda team: team.seconds(BLOCK[link])),
        ):
            found = self._turns(what, {name: figure(team) for name, team in teams.items()}, unit)
            full = FINE_TUNED["full"]
            for name in teams:
                if name != full:
                    title = f"{what}, {self.batch} images a rank: {name}"
                    self.report.compare(None, title, found[name], found[full], [full, unit])
        on.link(None)
        for team in teams.values():
            team.close()
        self.keep()

    def _turns(self, title: str, variants: dict, unit: str) -> dict[str, list[float]]:
        print(f"\n{title}", flush=True)
        self.report.turns[title] = in_turns(variants, self.repetitions, unit, self.warm_up)
        return self.report.turns[title]


def write_weights(file: Path) -> None:
    import torch
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), file)


def largest_differences(folder: Path) -> tuple[float, float]:
    """The largest |ours - plain| / |plain| and |ours - plain| / |plain - start| of all tensors."""
    import torch

    ours, plain, start = (
        torch.load(folder / f"{name}.pt", weights_only=True) for name in ("ours", "plain", "start")
    )
    assert ours.keys() == plain.keys()
    apart = {name: (ours[name] - plain[name]).norm() for name in plain}
    relative = [float(apart[name] / plain[name].norm()) for name in plain]
    return max(relative), max(
        float(apart[name] / (plain[name] - start[name]).norm()) for name in plain
    )


def ceilings(on: Field, links: list[str]) -> dict[str, float]:
    """The MB/s that a broadcast of 25 MB reaches on each link."""
    team, found = on.team({"kind": "link", "megabytes": 25}), {}
    for link in links:
        on.link(LINKS[link])
        team.steps(1)
        found[link] = round(25 / team.steps(2)["seconds"], 1)
    on.link(None)
    team.close()
    return found


def compute_s(on: Field, batch: int, size: int = 64) -> float:
    """Seconds of forward and backward pass without communication, while both ranks compute."""
    team = on.team({"kind": "compute", "batch": batch, "size": size})
    team.steps(1)
    found = statistics.median(team.steps(1)["seconds"] for _ in range(5))
    team.close()
    return round(found, 3)


def everything(bench: Bench) -> None:
    """The measurements of --all: hooks, Lightning, larger images, four ranks, scaling."""
    peers = [name for name in VARIANTS if name != LIGHTNING or has_lightning()]
    if LIGHTNING not in peers:
        bench.report.skip(LIGHTNING, "it is not installed; pip install lightning")
    fewer = replace(bench, repetitions=min(3, bench.repetitions))

    def at(num_ranks: int, *sizes: int) -> None:
        for size in sizes:
            with field(num_ranks) as on:
                now = bench if (num_ranks, size) == (2, 64) else fewer
                # All ranks of all variants exist at the same time, with 1.5 GB each.
                variants = peers if num_ranks == 2 else [PLAIN, FP16]
                now.step_times(on, [*variants, bench.ours], num_ranks, size)

    at(2, 64)
    fewer.scaling(4)
    at(4, 64, 128)
    at(2, 128, 224)
    at(4, 224)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--ours",
        nargs="+",
        default=["parallel=hybrid"],
        metavar="KEY=VALUE",
        help="overrides of our run",
    )
    parser.add_argument(
        "--all", action="store_true", help="also other peers, image sizes, four ranks, and scaling"
    )
    parser.add_argument(
        "--fine-tuning", action="store_true", help="only what fine-tuning sends and takes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short turn of P1, P4 and P2, as a test"
    )
    args = parser.parse_args()
    if args.fine_tuning and (args.all or args.plot):
        parser.error("--fine-tuning takes the place of the rows of --all and --plot")
    return args


def main() -> None:
    args = parse()
    if reason := why_not():
        print(
            f"communication.py creates hosts and links on this machine, which {reason}",
            file=sys.stderr,
        )
        sys.exit(64)
    report, about = Report(), {}

    def keep() -> None:
        if args.json:
            report.write(args.json, about)

    if args.quick:
        bench = Bench(report, args.ours, 1, 4, ["unshaped", "1 Gbit/s"], keep, warm_up=False)
    else:
        bench = Bench(report, args.ours, args.repetitions, 32, list(LINKS), keep)
    with field(2) as on, tempfile.TemporaryDirectory() as folder:
        about |= machine(("torch", "torchvision", "lightning")) | {
            "link_mb_per_s": ceilings(on, bench.links)
        }
        about["compute_s"] = compute_s(on, bench.batch)
        print(about)
        if args.fine_tuning or args.quick:
            bench.fine_tuning(on, Path(folder))
        if not args.fine_tuning:
            bench.bytes_sent(on, Path(folder))
        if not args.all and not args.fine_tuning:
            bench.step_times(on, [PLAIN, bench.ours], 2, 64)
    if args.all:
        everything(bench)
    report.print_table()
    if args.plot:
        draw(report.turns, about, args.plot)


if __name__ == "__main__":
    main()
