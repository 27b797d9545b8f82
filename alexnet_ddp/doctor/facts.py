"""Collects the facts that a rank can find about its machine on its own, as JSON types."""

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
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
)
_ALONE = {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@dataclass(frozen=True)
class Facts:
    """Facts about one rank."""

    rank: int
    local_rank: int
    local_world_size: int
    host: str
    network: str  # id of the network stack: ranks with the same one can use 127.0.0.1
    address: str  # IP address of the host's own name; "" if it does not resolve
    interfaces: list[str]
    device: str  # cpu, cuda, or the reason why there is none
    device_name: str
    num_devices: int
    versions: dict[str, str]
    cores: int  # usable by this process
    files_limit: int  # open files
    memory: int  # free bytes, of the machine or of this container
    shm: int  # bytes of /dev/shm
    env: dict[str, str]
    config: dict[str, str]  # every option and its value
    data: str  # fingerprint of data.root; "" if it cannot be read

    @property
    def is_leader(self) -> bool:
        """True for one rank per node, which represents it."""
        return self.local_rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host})"


def collect_facts(cfg: Config, options: dict) -> Facts:
    """Collect the facts of this rank. options: `cfg` as JSON types."""
    ranks = read_ranks(_ALONE | os.environ)  # runtime/startup.py refuses incomplete environments
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
        config=_flatten(redact(options)),
        data=_data_fingerprint(cfg),
    )


def free_memory() -> int:
    """Return the bytes that a process can still allocate, within the limit of its container."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control groups, or no limit
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit = int((group / "memory.max").read_text())
        current = int((group / "memory.current").read_text())
        page_cache = int(used["inactive_file"])  # freed on demand
        free = min(free, max(0, limit - (current - page_cache)))
    return free


def _device(cfg: Config, local_rank: int) -> tuple[str, str, int]:
    """Return (cpu, cuda or an error, the device's name, the number of visible devices)."""
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
    """Return an id of the network stack: containers share the boot id, not the namespace."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


def _address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _data_fingerprint(cfg: Config) -> str:
    """Return 16 hex digits: a hash of the names two levels below data.root and of its files' sizes.

    If data.root is a file (data=csv), of its content. "" if data.root cannot be read.
    """
    root = getattr(cfg.data, "root", None)
    # The built-in data is created by each node that needs it.
    if root is None or "://" in str(root) or isinstance(cfg.data, DemoConfig):
        return "not on a disk"
    digest = hashlib.sha256()
    try:
        if os.path.isfile(root):
            return hashlib.sha256(Path(root).read_bytes()).hexdigest()[:16]
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


def _flatten(options: dict, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in options.items():
        found |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": str(value)}
        )
    return found
