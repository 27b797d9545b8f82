"""Checks the places that a run writes to: run.root and Weights & Biases. Leaves no files."""

import netrc
import os
import secrets
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from alexnet_ddp.config import CheckpointConfig, LoggerConfig
from alexnet_ddp.doctor.findings import Finding, Level, format_bytes, format_seconds, shorten
from alexnet_ddp.runtime.files import existing_parent, free_bytes
from alexnet_ddp.tracking.wandb_settings import wandb_mode

_WRITE_S = 3.0
_CHUNK_BYTES = 16_000_000
_VISIBLE_S = 3.0  # network file systems show a new file late
_CONNECT_S = 3.0


@dataclass(frozen=True)
class Disk:
    """Measurement of the folder of run.root."""

    folder: str
    free: int  # bytes
    bytes_per_s: float  # with fsync
    error: str = ""  # why the folder cannot be written to


def measure_disk(run_dir: Path, num_bytes: int) -> Disk:
    """Write up to `num_bytes` (at least 1) to the run's disk for at most 3 s, and delete them."""
    folder = existing_parent(run_dir)
    free = free_bytes(folder)
    num_bytes = max(1, num_bytes)
    chunk = os.urandom(_CHUNK_BYTES)  # random, since some disks compress
    written, began = 0, time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            while written < num_bytes and time.monotonic() - began < _WRITE_S:
                written += file.write(chunk[: num_bytes - written])
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        return Disk(str(folder), free, 0.0, error.strerror or str(error))
    return Disk(str(folder), free, written / (time.monotonic() - began))


def create_marker(run_dir: Path) -> Path | None:
    """Create a file that the other nodes look for; None if the folder cannot be written to."""
    mark = existing_parent(run_dir) / f".doctor-{secrets.token_hex(8)}"
    try:
        mark.touch()
    except OSError:
        return None
    return mark


def is_visible(mark: Path) -> bool:
    """Return True as soon as this machine sees rank 0's file, False after 3 s."""
    deadline = time.monotonic() + _VISIBLE_S
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def check_disk(disk: Disk, checkpoint_bytes: int, cfg: CheckpointConfig) -> list[Finding]:
    """Check the free space and the time to write a checkpoint.

    checkpoint_bytes: 0 if unknown, because the model could not be built.
    """
    if disk.error:
        failure = Finding(
            "disk",
            f"{disk.folder}: {disk.error}",
            "a folder that can be written to",
            Level.fail,
            "choose another run.root, fix its permissions, or free some space",
        )
        return [_check_space(disk, checkpoint_bytes, cfg), failure]
    if checkpoint_bytes == 0:
        return [
            Finding(
                "disk",
                f"{disk.folder} can be written to, {format_bytes(disk.free)} free",
                "space for a checkpoint, of unknown size: see step",
            )
        ]
    save_s = checkpoint_bytes / disk.bytes_per_s
    limit_s = 60 * (cfg.save_every_minutes or 5) / 10
    writing = Finding(
        "disk",
        f"{format_bytes(disk.bytes_per_s)}/s with fsync: {format_seconds(save_s)} for a checkpoint "
        f"of {format_bytes(checkpoint_bytes)}",
        f"at most {format_seconds(limit_s)}, a tenth of the time between two",
        Level.warn,
        "choose a faster run.root, or save less often (checkpoint.save_every_minutes)",
    )
    return [_check_space(disk, checkpoint_bytes, cfg), writing.ok_if(save_s <= limit_s)]


def _check_space(disk: Disk, checkpoint_bytes: int, cfg: CheckpointConfig) -> Finding:
    num_kept = cfg.keep_last + 2  # the best one, and the one being written
    needed = num_kept * checkpoint_bytes
    bad = Finding(
        "disk space",
        f"{format_bytes(disk.free)} free at {disk.folder}",
        f"{format_bytes(needed)}: {num_kept} checkpoints of {format_bytes(checkpoint_bytes)}",
        Level.fail if disk.free < checkpoint_bytes else Level.warn,
        "free some space, lower checkpoint.keep_last, or choose another run.root",
    )
    return bad.ok_if(disk.free >= needed)


def check_visibility(folder: str, blind: list[str]) -> Finding:
    """Check that all nodes share run.root: after a restart, rank 0 may be on another node.

    folder: rank 0's. blind: the hosts that do not see rank 0's file in it.
    """
    remedy = (
        "choose a run.root on a shared disk, or checkpoint.copy_to a store that all nodes reach"
    )
    found = f"{folder} of rank 0 is not visible on {shorten(blind)}" if blind else folder
    return Finding("run.root", found, "the same on every node", Level.warn, remedy).ok_if(not blind)


def check_wandb(cfg: LoggerConfig) -> Finding:
    """Check on rank 0 that wandb has a key and reaches its server. The key is not sent or printed.

    At most a warning, since a run without a key or server logs offline.
    """
    mode = wandb_mode(cfg.wandb)
    if mode != "online":
        return Finding("wandb", mode, "nothing")
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or "api.wandb.ai"
    needed = f"a key, and a connection to {host}"
    remedy = "logger.wandb=offline, and wandb sync afterwards"
    if not has_key(host):
        return Finding("wandb", "no key", needed, Level.warn, f"wandb login, or {remedy}")
    try:
        with socket.create_connection(
            (host, server.port or (80 if server.scheme == "http" else 443)), _CONNECT_S
        ):
            return Finding("wandb", f"a key, and {host} answers", needed)
    except OSError as error:
        return Finding("wandb", f"{host} does not answer ({error})", needed, Level.warn, remedy)


def has_key(host: str) -> bool:
    """True if the environment or the file that `wandb login` writes has a key for `host`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return (
            netrc.netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host)
            is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False
