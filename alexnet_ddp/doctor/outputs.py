"""run.root: can it be written, how fast, how much fits, and do all nodes see the same one. Leaves nothing there."""

import netrc
import os
import secrets
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from alexnet_ddp.config import CheckpointConfig, LoggerConfig, Wandb
from alexnet_ddp.doctor.findings import Finding, Level, seconds, shortened, size

_WRITE_S = 3.0
_PIECE = 16_000_000  # bytes between two looks at the clock
_SEEN_S = 3.0  # shared folders show a new file late


@dataclass(frozen=True)
class Disk:
    """What a trial told of the folder that a run would be in. error: why it cannot be written; "" where it can."""

    folder: str
    free: int  # bytes
    bytes_per_s: float  # with fsync
    error: str = ""


def try_disk(run_dir: Path, num_bytes: int) -> Disk:
    """Write up to `num_bytes`, but some, where the run will be, for 3 s at most, and delete them."""
    folder = existing(run_dir)
    free = shutil.disk_usage(folder).free
    num_bytes, piece = max(1, num_bytes), os.urandom(_PIECE)  # some disks compress
    written, began = 0, time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            while written < num_bytes and time.monotonic() - began < _WRITE_S:
                written += file.write(piece[: num_bytes - written])
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        return Disk(str(folder), free, 0.0, error.strerror or str(error))
    return Disk(str(folder), free, written / (time.monotonic() - began))


def existing(run_dir: Path) -> Path:
    """The run's folder, or the one in which it would be made: what there is of its path."""
    return next(d for d in (run_dir.absolute(), *run_dir.absolute().parents) if d.exists())


def leave_mark(run_dir: Path) -> Path | None:
    """A file for the other nodes to look for; None where nothing can be written."""
    mark = existing(run_dir) / f".doctor-{secrets.token_hex(8)}"
    try:
        mark.touch()
    except OSError:
        return None
    return mark


def sees(mark: Path) -> bool:
    """Whether this machine sees rank 0's file."""
    deadline = time.monotonic() + _SEEN_S
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def judge_disk(disk: Disk, checkpoint_bytes: int, cfg: CheckpointConfig) -> list[Finding]:
    """Room for a checkpoint, for all that are kept, and time to write one. 0 bytes: nobody knows how many."""
    if disk.error:
        remedy = "choose another run.root, mend its rights, or make room"
        lacks = Finding("disk", f"{disk.folder}: {disk.error}", "to be written", Level.fail, remedy)
        return [_space(disk, checkpoint_bytes, cfg), lacks]
    if checkpoint_bytes == 0:
        return [
            Finding(
                "disk",
                f"{disk.folder} can be written, {size(disk.free)} free",
                "a checkpoint, see step",
            )
        ]
    takes = checkpoint_bytes / disk.bytes_per_s
    most = 60 * (cfg.save_every_minutes or 5) / 10
    said = f"{size(disk.bytes_per_s)}/s with fsync: {seconds(takes)} a checkpoint of {size(checkpoint_bytes)}"
    remedy = "choose a faster run.root, or save less often (checkpoint.save_every_minutes)"
    bad = Finding(
        "disk",
        said,
        f"at most {seconds(most)}, a tenth of the time between two",
        Level.warn,
        remedy,
    )
    return [_space(disk, checkpoint_bytes, cfg), bad.unless(takes <= most)]


def _space(disk: Disk, checkpoint_bytes: int, cfg: CheckpointConfig) -> Finding:
    keeps = cfg.keep_last + 2  # the best one, and the one being written
    room = f"{size(keeps * checkpoint_bytes)}: {keeps} checkpoints of {size(checkpoint_bytes)}"
    verdict = Level.fail if disk.free < checkpoint_bytes else Level.warn
    remedy = "make room, lower checkpoint.keep_last, or choose another run.root"
    bad = Finding("disk space", f"{size(disk.free)} free at {disk.folder}", room, verdict, remedy)
    return bad.unless(disk.free >= keeps * checkpoint_bytes)


def judge_marks(folder: str, blind: list[str]) -> Finding:
    """blind: hosts that do not see what rank 0 writes. A run goes on from there when rank 0 moves to another node."""
    remedy = (
        "choose a run.root on a shared disk, or checkpoint.copy_to a store that all nodes reach"
    )
    found = f"{folder} of rank 0 is not there on {shortened(blind)}" if blind else folder
    return Finding("run.root", found, "the same on every node", Level.warn, remedy).unless(
        not blind
    )


_REACH_S = 3.0


def judge_wandb(cfg: LoggerConfig) -> Finding:
    """Rank 0 sends. Without a key or a way a run goes offline and on, so this is never worse than a warning."""
    mode = os.environ.get("WANDB_MODE", cfg.wandb.value).lower()
    if cfg.wandb is not Wandb.online or mode != "online":
        return Finding("wandb", mode if cfg.wandb is Wandb.online else cfg.wandb.value, "nothing")
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or "api.wandb.ai"
    needed = f"a key, and a way to {host}"
    remedy = "logger.wandb=offline, and wandb sync afterwards"
    if not has_key(host):
        return Finding("wandb", "no key", needed, Level.warn, f"wandb login, or {remedy}")
    try:
        with socket.create_connection(
            (host, server.port or (80 if server.scheme == "http" else 443)), _REACH_S
        ):
            return Finding("wandb", f"a key, and {host} answers", needed)
    except OSError as error:
        return Finding("wandb", f"{host} does not answer ({error})", needed, Level.warn, remedy)


def has_key(host: str) -> bool:
    """In the environment, or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return (
            netrc.netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host)
            is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False
