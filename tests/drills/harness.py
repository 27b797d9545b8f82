"""A run that a drill may hurt: started by launch/local.sh as a user starts it, found by a mark in its environment."""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"
PRELOADED = Path(__file__).parent / "preloaded" / "python"
MARK = "ALEXNET_DDP_DRILL"  # in the environment of every process of a job

# A step takes some 50 ms, a start of the processes some 5 s.
SMALL = [
    "data=folder",
    "data.image_size=64",
    "trainer.log_every_steps=1",
    "logger.tensorboard=false",
]
SMALL += ["trainer.epochs=2", "trainer.global_batch_size=8", "checkpoint.save_every_steps=5"]


class Job:
    """One run.name in one run.root; start() may be called again, as a user would.

    PYTHON of the launcher is `python`. With PRELOADED torchrun forks the ranks, and is itself forked by a
    preloaded_server if one runs on its host.
    """

    python = PRELOADED
    servers: Path | None = None  # folder of preloaded_server
    network: tuple[str, ...] = ()  # overrides; without any it is alexnet_small

    def __init__(
        self,
        root: Path,
        name: str,
        *overrides: str,
        ranks: int = 2,
        env: dict[str, str] | None = None,
        network: tuple[str, ...] | None = None,
    ):
        self.network = self.network if network is None else network
        self.root, self.name, self.ranks = root, name, ranks
        self.overrides = [*SMALL, *self.network, *overrides]
        self.run_dir = root / "runs" / name
        self.log = root / f"{name}.log"
        self.mark = f"{name}-{secrets.token_hex(3)}"
        self.env = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "PYTHON": str(self.python),
            "PRELOADED_PYTHON": sys.executable,
            "WANDB_MODE": "disabled",
        }
        if self.servers:
            self.env["PRELOADED_SERVERS"] = str(self.servers)
        self.env |= {MARK: self.mark, "NPROC": str(ranks), "RESTART_DELAY": "0", **(env or {})}
        self.process: subprocess.Popen | None = None

    @property
    def plugins(self) -> list[str]:
        """What a command that reads the run must be given: a record does not choose what is imported."""
        return [override for override in self.network if override.startswith("plugins=")]

    def start(self, *more: str, launcher: list[str] | None = None) -> "Job":
        command = launcher or [str(PROJECT / "launch/local.sh")]
        command = [
            *command,
            f"run.root={self.root}/runs",
            f"run.name={self.name}",
            *self.overrides,
            *more,
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def wait(self, timeout_s: float = 180) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(
                f"{self.name} did not end in {timeout_s} s:\n{self.said()[-3000:]}"
            ) from None

    def inject(self, fault: str) -> "Job":
        """From the next start on: see faults/sitecustomize.py. "" for none."""
        self.env |= {"ALEXNET_DDP_FAULT": fault, "PYTHONPATH": f"{FAULTS}{os.pathsep}{PROJECT}"}
        return self

    def run(self, *more: str, timeout_s: float = 180) -> int:
        return self.start(*more).wait(timeout_s)

    def until(
        self, condition: Callable[[], object], timeout_s: float = 90, what: str = "the condition"
    ) -> float:
        """Wait for it; seconds that it took. Fails where the launcher has ended, or the time is over."""
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            assert waited < timeout_s, (
                f"{self.name}: {what} did not come in {timeout_s} s:\n{self.said()[-3000:]}"
            )
            time.sleep(0.02)
        return time.monotonic() - began

    def until_step(self, step: int, timeout_s: float = 90) -> float:
        return self.until(lambda: self.step() >= step, timeout_s, f"step {step}")

    def step(self) -> int:
        """The last step that is in metrics.jsonl."""
        found = self.rows("train/loss")
        return found[-1]["step"] if found else 0

    def rows(self, key: str) -> list[dict]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # being written
                continue
        return [row for row in found if key in row]

    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text())

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def checkpoints(self) -> list[Path]:
        return sorted((self.run_dir / "checkpoints").glob("step-*"))

    def digest(self) -> str:
        """SHA-256 of the parameters, the buffers and the momentum of the newest checkpoint."""
        newest, digest = self.checkpoints()[-1], hashlib.sha256()
        for name in ("model.safetensors", "optimizer.safetensors"):
            digest.update((newest / name).read_bytes())
        return digest.hexdigest()

    def index_hashes(self) -> dict[int, str]:
        """Which images each step saw."""
        return {row["step"]: row["data/index_hash"] for row in self.rows("train/loss")}

    def processes(self) -> dict[int, dict[str, str]]:
        """Environments of the job's living processes by pid, the launcher's among them."""
        return dict(_marked(self.mark))

    def rank(self, rank: int) -> int:
        """The pid of the process that trains as `rank`."""
        for pid, env in self.processes().items():
            is_own = env.get("RANK") == str(rank) and b"alexnet_ddp.train" in _read(pid, "cmdline")
            if is_own or _read(pid, "comm").decode().startswith(f"rank {rank} "):
                return pid
        raise LookupError(f"{self.name} has no rank {rank} now")

    def hit(self, number: signal.Signals, rank: int) -> int:
        pid = self.rank(rank)
        os.kill(pid, number)
        return pid

    def end(self) -> None:
        """Whatever is left of the job."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def preloaded_server(folder: Path, host: str, on_host: Sequence[str] = ()) -> Iterator[None]:
    """preloaded/server.py, which runs until the block ends; its socket is in `folder`.

    on_host: what runs a command on the host, if that is not this machine.
    """
    env = {**os.environ, "PYTHONPATH": f"{FAULTS}{os.pathsep}{PROJECT}"}
    command = [*on_host, sys.executable, str(PRELOADED.with_name("server.py")), str(folder)]
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
    try:
        while not (folder / host).exists():
            assert server.poll() is None, "the server of preloaded processes has ended"
            time.sleep(0.02)
        yield
    finally:
        server.stdin.close()
        server.wait(30)


def assert_same_run(job: Job, calm: Job) -> None:
    """Bit-equal weights and momentum, the same images in every step, one continuous record."""
    assert job.digest() == calm.digest()
    assert job.index_hashes() == calm.index_hashes()
    steps = [row["step"] for row in job.rows("train/loss")]
    assert steps == sorted(set(steps)) == [row["step"] for row in calm.rows("train/loss")]


def _marked(mark: str) -> Iterator[tuple[int, dict[str, str]]]:
    """By the environment of a program, or the name of a fork of preloaded_server."""
    token = mark.rpartition("-")[2]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        raw = _read(int(entry.name), "environ")
        is_forked = _read(int(entry.name), "comm").decode().strip().endswith(f" {token}")
        if is_forked or f"{MARK}={mark}".encode() in raw.split(b"\0"):
            pairs = (
                pair.decode(errors="replace").partition("=") for pair in raw.split(b"\0") if pair
            )
            yield int(entry.name), {name: value for name, _, value in pairs}


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:  # gone, or about to go
        return b""
