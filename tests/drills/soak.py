"""D49: faults at random, every 30 seconds, for minutes; in the end nothing is lost, wrong, or left behind."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import make_folder
from tests.drills.harness import Job

EVERY_S = 30
AGAIN = (
    75,
    76,
)  # what a scheduler starts again: 76 where the stop signal met a rank that had just been killed
KEPT = 20  # epochs of 26 steps between two checkpoints that are kept
LONG = [
    "trainer.epochs=2000",
    "trainer.hang_timeout_s=5",
    "checkpoint.save_every_steps=20",
    "checkpoint.keep_last=3",
]
LONG += [
    f"checkpoint.keep_every_epochs={KEPT}",
    "trainer.eval_every_epochs=5",
]  # of two seconds each
LONG += ["scheduler=constant"]  # any other follows the length of the run


def soak(seconds: float) -> dict:
    """A run that is hurt, and one that is not, as far as that one came. AssertionError where something is wrong."""
    began, before = time.monotonic(), leftovers()
    root = Path(tempfile.mkdtemp(prefix="soak."))
    disk = root / "runs"
    disk.mkdir()
    mounted = os.geteuid() == 0
    if mounted:  # a disk that can be full
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", str(disk)], check=True)
    images = make_folder(root / "images", 205, 21)
    job = Job(root, "soak", f"data.root={images}", *LONG)
    try:
        counts, first = hurt(job, seconds, disk if mounted else None)
        ran = time.monotonic() - began
        reached = last_of_an_epoch(job)
        calm = Job(root, "calm", f"data.root={images}", *LONG, f"trainer.max_steps={reached}")
        assert calm.run(timeout_s=3600) == 0, calm.said()
        rows = calm.rows("train/loss")
        step_s = (rows[-1]["time_s"] - rows[0]["time_s"]) / (
            reached - 1
        )  # with its evaluations and its saves
        goodput = step_s * (job.step() - first) / seconds
        kept = next(d for d in job.checkpoints() if int(d.name[5:]) == reached)
        assert all(
            (kept / name).read_bytes() == (calm.checkpoints()[-1] / name).read_bytes()
            for name in ("model.safetensors", "optimizer.safetensors")
        ), "the weights or the momentum differ"
        assert {k: v for k, v in job.index_hashes().items() if k <= reached} == calm.index_hashes()
        assert not job.processes()
        assert leftovers() == before, f"left behind: {leftovers() - before}"
    finally:
        job.end()
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.rmtree(root)
    print(f"goodput {goodput:.1%}, {counts}, bit-equal at step {reached}")
    assert goodput > 0.7
    measured = {
        "minutes": round(seconds / 60),
        "goodput, %": round(100 * goodput, 1),
        **counts,
        "steps": reached,
    }
    return {"seconds": ran, "measured": measured}


def hurt(job: Job, seconds: float, disk: Path | None) -> tuple[dict[str, int], int]:
    """How often what was done, and the step at which the clock began."""
    moments, counts = random.Random(49), {}
    faults: dict[str, Callable[[], None]] = {
        "kills": lambda: job.hit(signal.SIGKILL, moments.randrange(2)),
        "hangs": lambda: job.hit(signal.SIGSTOP, moments.randrange(2)),
        "stop signals": lambda: job.hit(signal.SIGTERM, moments.randrange(2)),
    }
    if disk:
        faults["full disks"] = lambda: fill(disk)
    job.start()
    job.until_step(1)
    first, end = job.step(), time.monotonic() + seconds
    due = time.monotonic() + EVERY_S * moments.uniform(0.5, 1)
    while time.monotonic() < end:
        if job.process.poll() is not None:  # as a scheduler does
            assert job.process.returncode in AGAIN, job.said()[-3000:]
            job.start()
        if time.monotonic() > due:
            name = moments.choice(sorted(faults))
            with contextlib.suppress(LookupError):  # the rank is just being started again
                faults[name]()
                counts[name] = counts.get(name, 0) + 1
            due = time.monotonic() + EVERY_S
        time.sleep(0.05)
    if job.process.poll() is None:
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() in AGAIN, job.said()[-3000:]
    return counts, first


def fill(disk: Path) -> None:
    """For about as long as a checkpoint takes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        with contextlib.suppress(OSError):  # it is full
            while True:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), 1 << 20)
        file.truncate(
            file.seek(0, os.SEEK_END) - (4 << 20)
        )  # rows still fit, a checkpoint does not
    time.sleep(0.5)
    ballast.unlink()


def last_of_an_epoch(job: Job) -> int:
    """The newest checkpoint that an undisturbed run has as well, whatever else it left out."""
    return max(int(d.name[5:]) for d in job.checkpoints() if int(d.name[5:]) % (KEPT * 26) == 0)


def leftovers() -> set[str]:
    """Files of ours in memory and in the temporary folder."""
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return {str(path) for place in places if place.exists() for path in place.glob("*alexnet_ddp*")}
