"""Faults of a drill, injected into the real program: this folder comes first on PYTHONPATH of a job's processes.

ALEXNET_DDP_FAULT="gradient rank=1 step=7" and the like, several with ";". The program knows nothing of it, and has no
option for it. Steps count from 1, as in metrics.jsonl; rank=-1 means all. Without step: always.

    kill at=NAME            whoever opens a file whose path ends so is killed
    fsync ms=50             every file of a checkpoint takes so much longer to be on the disk
    gil rank=1 when=FILE    a thread runs a catastrophic regular expression once FILE is there, which it removes first
"""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def _text() -> str:
    return os.environ.get("ALEXNET_DDP_FAULT", "")


def _faults() -> list[tuple[str, dict[str, Any]]]:
    """Those of this rank."""
    found = []
    for fault in filter(None, map(str.strip, _text().split(";"))):
        name, *pairs = fault.split()
        texts = dict(pair.split("=") for pair in pairs)
        values = {
            key: text if key in ("at", "when") else float(text) for key, text in texts.items()
        }
        if values.get("rank", -1) in (-1, int(os.environ["RANK"])):
            found.append((name, values))
    return found


def _kill(event: str, arguments: tuple) -> None:
    if event == "open" and any(
        name == "kill" and str(arguments[0]).endswith(v["at"]) for name, v in _faults()
    ):
        os.kill(os.getpid(), signal.SIGKILL)


def _hold_gil(go: Path) -> None:
    while not go.exists():
        time.sleep(0.05)
    go.unlink()  # once: not again after a restart
    re.match(r"(a+)+$", "a" * 60 + "b")


def _inject() -> None:
    import torch

    from alexnet_ddp.data.prefetch import Prefetcher
    from alexnet_ddp.training.step import TrainStep

    faults = _faults()
    call, start, finish = TrainStep.__call__, TrainStep.__init__, Prefetcher._finish
    now = {"step": 0}

    def active(wanted: str) -> list[dict[str, float]]:
        return [
            v for name, v in faults if name == wanted and v.get("step", now["step"]) == now["step"]
        ]

    def spoilt(grad: torch.Tensor) -> torch.Tensor:
        if active("gradient"):
            grad = grad.clone()
            grad.view(-1)[grad.numel() // 2] = float("nan")
        return grad

    def begin(self: TrainStep, *args: object, **options: object) -> None:
        start(self, *args, **options)
        parameters = list(self.parallel_model.model.parameters())
        parameters[-2].register_hook(spoilt)
        self.parallel_model.model.register_forward_hook(
            lambda module, args, out: (
                out * active("scale")[0]["factor"] if active("scale") and module.training else out
            )
        )
        for fault in active(
            "unequal"
        ):  # before the first step: a model that was loaded on one rank only
            parameters[int(fault["parameter"])].data += 1

    def step(self: TrainStep, batches: object, k: int, *more: object) -> object:
        now["step"] = k + 1
        if active("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
            more = (*more[:-1], type(more[-1])(stop=True, save=more[-1].save, error=more[-1].error))
        for fault in active("flip"):  # one bit of one value of a parameter
            parameter = list(self.parallel_model.model.parameters())[int(fault["parameter"])].data
            parameter.as_strided((parameter.numel(),), (1,)).view(torch.int32)[17] ^= 1 << int(
                fault["bit"]
            )
        for fault in active("memory"):
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + int(fault["mb"] * 1e6)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return call(self, batches, k, *more)

    def slow(self: Prefetcher, tasks: list) -> list[int]:
        for fault in active("loader"):  # each batch comes so much later, which no prefetching hides
            time.sleep(fault["ms"] / 1000)
        return finish(self, tasks)

    TrainStep.__call__, TrainStep.__init__, Prefetcher._finish = step, begin, slow
    sys.addaudithook(_kill)
    for name, values in faults:
        if name == "gil":
            threading.Thread(target=_hold_gil, args=[Path(values["when"])], daemon=True).start()


def _slow_down_fsync(seconds: float) -> None:
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow


def inject() -> None:
    """Inject the faults into this process if it is a rank that trains, or its writer of checkpoints."""
    if "alexnet_ddp.checkpoint.writer" in sys.orig_argv:
        for name, values in _faults():
            if name == "fsync":
                _slow_down_fsync(values["ms"] / 1000)
        return
    if _text() and "RANK" in os.environ and "alexnet_ddp.train" in sys.orig_argv:
        _inject()


inject()
