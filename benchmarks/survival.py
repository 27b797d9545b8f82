"""Measure the cost of fault tolerance: the stall of a checkpoint, and the share of a step (P13).

    python benchmarks/survival.py [--json FILE] [--repetitions N] [--batch 32] [--quick]

P13    a step with all monitoring against the same step without it: AlexNet with 61.1 M parameters
       at 64 px, in turns in one process. Monitoring: watchdog, heartbeat, vote, detection
       of loss spikes and stragglers, snapshots for undoing a bad step. The comparison of replicas
       (every 1,000 steps) and a checkpoint (every 5 minutes) are included with their shares.
stall  how long training waits for a checkpoint of that network and its momentum, 489 MB
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.checkpoint.manager import RunState
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.watchdog import Watchdog
from alexnet_ddp.tracking import RunStatus
from alexnet_ddp.training.parts import TrainingParts
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.trainer import Trainer
from alexnet_ddp.training.vote import VoteResult


class NoExchange:
    """Replaces the vote: every step is good."""

    def start(self, loss_sum, num_images, vote, nonfinite_previous, weight=None) -> None:
        self.num_images = num_images

    def finish(self) -> VoteResult:
        return VoteResult(
            False, False, False, False, False, self.num_images, 0.0, self.num_images, 0.0
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="one short turn, as a test")
    args = parser.parse_args()
    turns, steps = (1, 1) if args.quick else (args.repetitions, 8)
    directory = Path(tempfile.mkdtemp(prefix="alexnet_ddp.survival."))
    try:
        results = measure(directory, turns, steps, args.batch)
    finally:
        shutil.rmtree(directory)
    if args.json:
        args.json.write_text(json.dumps({"results": results}, indent=1) + "\n")


def measure(directory: Path, turns: int, steps: int, batch: int) -> list[dict]:
    overrides = [
        "data=synthetic",
        "data.image_size=64",
        "data.num_train=100000",
        "model=alexnet",
        "trainer.epochs=1",
    ]
    overrides += [
        "logger.progress=false",
        "logger.tensorboard=false",
        f"trainer.global_batch_size={batch}",
    ]
    cfg = cli.compose([*overrides, f"run.root={directory}", "run.name=a"])
    os.environ.pop("RANK", None)
    with (
        distributed.session(cfg.device) as world,
        Watchdog(cfg.trainer.hang_timeout_s, cfg.run_dir, world) as watchdog,
    ):
        cfg.run_dir.mkdir(parents=True)
        setup = RunSetup(cfg, world)
        parts = TrainingParts(setup, on_phase=watchdog.phase)
        status = RunStatus(cfg.run_dir, is_main=False)
        run = Trainer(setup, parts, [], watchdog, status, StopSignal())
        for _ in range(3):
            run.advance()
        with_all, without = [], []
        for _ in range(turns):
            with_all.append(seconds_a_step(run, steps))
            with taken_out(run):
                without.append(seconds_a_step(run, steps))
        stalls = [stall(run) for _ in range(turns)]
        checks = [check(run) for _ in range(turns)]
        setup.checkpoints.close()
        parts.close()
    step, bare = statistics.median(with_all), statistics.median(without)
    each = statistics.median(a / b for a, b in zip(with_all, without)) - 1
    now_and_then = statistics.median(checks) / 1000 / bare + statistics.median(stalls) / 300
    share = each + now_and_then
    results = [
        row(
            "P13",
            "share of a step, all of it",
            share,
            [a / b - 1 + now_and_then for a, b in zip(with_all, without)],
        ),
        row(
            None,
            "share of a step, in each step",
            each,
            [a / b - 1 for a, b in zip(with_all, without)],
        ),
        row(None, "step, s", step, with_all),
        row(None, "step without, s", bare, without),
        row("stall", "stall of a checkpoint of 489 MB, s", statistics.median(stalls), stalls),
        row(None, "check of the replicas, s", statistics.median(checks), checks),
    ]
    for result in results:
        (low, high), n = result["range"], result["n"]
        print(
            f"{result['id'] or '':6}{result['value']:10.4f}  "
            f"({low:.4f} to {high:.4f}, n = {n})  {result['what']}"
        )
    return results


def row(mark: str | None, what: str, value: float, values: list[float]) -> dict:
    return {
        "id": mark,
        "what": what,
        "value": value,
        "range": [min(values), max(values)],
        "n": len(values),
    }


def seconds_a_step(run: Trainer, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        run.advance()
    return (time.perf_counter() - began) / steps


@contextmanager
def taken_out(run: Trainer):
    """Disable the monitoring of the same training."""
    train_step = run.train_step
    kept = train_step._exchange, train_step._before, train_step._on_phase, run.guard, run.watchdog
    train_step._exchange, train_step._on_phase = NoExchange(), lambda phase: None
    run.watchdog = Watchdog(None, run.cfg.run_dir, run.world)
    run.guard = type("NoGuard", (), {"watch": lambda self, step, loss: None})()
    train_step._before = type(
        "NoSnapshot", (), {"snapshot": lambda self: None, "restore": lambda self, bad: None}
    )()
    yield
    train_step._exchange, train_step._before, train_step._on_phase, run.guard, run.watchdog = kept


def stall(run: Trainer) -> float:
    run.checkpoints.poll(wait=True)
    began = time.perf_counter()
    run.checkpoints.save(RunState(step=run.state.step), run.parts.state_dict(), is_last=False)
    return time.perf_counter() - began


def check(run: Trainer) -> float:
    run.checkpoints.poll(wait=True)
    began = time.perf_counter()
    tensors = {name: t for group in run.parts.state_dict().values() for name, t in group.items()}
    run.replicas._compare(0, tensors)  # with one rank: checksums without communication
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
