"""Helpers for tests of packing: run small preparations in this process or another one."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from alexnet_ddp.config import BasicAugmentConfig
from alexnet_ddp.config.prepare import Action, Encoding, LocalEngineConfig, PrepareConfig, Split
from alexnet_ddp.prepare.command import main

REPO = Path(__file__).parents[1]


def config(
    source: Path | str | None, root: Path | str, workers: int = 1, **knobs: object
) -> PrepareConfig:
    given = {"augment": BasicAugmentConfig(), "num_shards": 3, **knobs}
    given |= {
        name: kind(given[name])
        for name, kind in (("encoding", Encoding), ("split", Split))
        if name in given
    }
    source = None if source is None else str(source)
    return PrepareConfig(
        source=source, root=str(root), engine=LocalEngineConfig(workers=workers), **given
    )


def pack(source: Path | str, root: Path | str, workers: int = 1, **knobs: object) -> Path:
    """Prepare in this process; returns root."""
    main(config(source, root, workers, **knobs), [])
    return Path(root)


def act(action: str, root: Path | str, **knobs: object) -> None:
    main(config(knobs.pop("source", None), root, action=Action(action), **knobs), [])


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below root, by relative path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def times(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def start(*overrides: str, **env: str) -> subprocess.Popen:
    """`python -m alexnet_ddp.prepare OVERRIDES`, as the leader of its own process group."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), **env}
    command = [sys.executable, "-m", "alexnet_ddp.prepare", *overrides]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # As in a terminal: a test run in the background inherits SIGINT ignored, and its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(*overrides: str) -> tuple[int, str, str]:
    process = start(*overrides)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def hit(
    process: subprocess.Popen, number: signal.Signals, root: Path, shards: int
) -> tuple[int, str]:
    """Send `number` once `shards` sidecars exist; return (exit code, stderr)."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(root.glob("_state/*/*.json"))) >= shards:
            break
        time.sleep(0.005)
    # A terminal and a scheduler signal the workers too. SIGKILL is sent to the driver only: its workers must notice.
    process.send_signal(number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    return process.wait(60), process.stderr.read()


def members_of_group(group: int) -> list[int]:
    """Processes of a process group that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if fields[2] == str(group) and fields[0] != "Z":
            found.append(int(entry.name))
    return found
