"""What a rank knows of its machine without asking another one. JSON's types, so that it can go through the store."""

import contextlib
import hashlib
import os
import platform
import resource
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from alexnet_ddp import __version__
from alexnet_ddp.config import Config, DemoConfig
from alexnet_ddp.runtime.distributed import choose_device
from alexnet_ddp.runtime.environment import num_usable_cores, read_ranks
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.redaction import redact

VARIABLES = (
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)
VARIABLES += ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_ALONE = {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@dataclass(frozen=True)
class Facts:
    """Of one rank."""

    rank: int
    local_rank: int
    local_world_size: int
    host: str
    network: str  # names the network stack: ranks that share it reach each other by 127.0.0.1
    address: str  # what the host's own name resolves to; "" where it does not
    interfaces: list[str]
    device: str  # cpu or cuda; else why there is none
    device_name: str
    num_devices: int
    versions: dict[str, str]
    cores: int  # that this process may use
    files_limit: int  # open files
    memory: int  # bytes that are free, of the machine or of this container
    shm: int  # bytes of /dev/shm
    env: dict[str, str]
    config: dict[str, str]  # every knob and its value
    data: str  # names what data.root shows; "" where there is none

    @property
    def is_leader(self) -> bool:
        """Speaks for its node."""
        return self.local_rank == 0

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host})"


def look(cfg: Config, knobs: dict) -> Facts:
    """The facts of this rank. knobs: `cfg` as JSON's types."""
    ranks = read_ranks(_ALONE | os.environ)  # what is missing is refused when the command starts
    device, name, count = _device(cfg, ranks.local_rank)
    return Facts(
        rank=ranks.rank,
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        host=socket.gethostname(),
        network=_network(),
        address=_address(),
        interfaces=[name for _, name in socket.if_nameindex()],
        device=device,
        device_name=name,
        num_devices=count,
        versions=_versions(),
        cores=num_usable_cores(),
        files_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memory=free_memory(),
        shm=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        env={name: os.environ[name] for name in VARIABLES if name in os.environ},
        config=_flat(redact(knobs)),
        data=_shown_by(cfg),
    )


def free_memory() -> int:
    """Bytes that a process can still take: the machine's, or what a container is allowed."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control groups, or "max"
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit = int((group / "memory.max").read_text())
        taken = int((group / "memory.current").read_text()) - int(
            used["inactive_file"]
        )  # the page cache gives way
        free = min(free, max(0, limit - taken))
    return free


def _device(cfg: Config, local_rank: int) -> tuple[str, str, int]:
    """(cpu or cuda, its name, how many of them this process sees)."""
    try:
        device = choose_device(cfg.device, local_rank)
    except ConfigError as error:
        return str(error), "", torch.cuda.device_count()
    if device.type == "cuda":
        return "cuda", torch.cuda.get_device_name(device), torch.cuda.device_count()
    return "cpu", platform.machine(), 1


def _versions() -> dict[str, str]:
    found = {
        "alexnet_ddp": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _network() -> str:
    """Two containers on one machine share its boot id, but not its network."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


def _address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _shown_by(cfg: Config) -> str:
    """16 hex digits of the names below data.root, two folders deep, and of the sizes of files at its top."""
    root = getattr(cfg.data, "root", None)
    if (
        root is None or "://" in str(root) or isinstance(cfg.data, DemoConfig)
    ):  # the built-in data is made where needed
        return "not on a disk"
    digest = hashlib.sha256()
    try:
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.name.startswith((".", "_")):
                continue
            names = (
                sorted(os.listdir(entry.path)) if entry.is_dir() else [str(entry.stat().st_size)]
            )
            digest.update("\0".join([entry.name, *names]).encode())
    except OSError:
        return ""
    return digest.hexdigest()[:16]


def _flat(knobs: dict, prefix: str = "") -> dict[str, str]:
    found = {}
    for key, value in knobs.items():
        found |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": str(value)}
        )
    return found
