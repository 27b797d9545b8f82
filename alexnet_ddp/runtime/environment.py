"""Ranks and usable CPU cores of this process, read from its environment. Needs no torch."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alexnet_ddp.runtime.errors import ConfigError

_LAUNCHERS = "start with torchrun or launch/local.sh"
# Variables that launchers of several processes set to the number of processes. Not SLURM_NTASKS,
# which batch scripts and salloc shells have too.
_NUM_TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}


@dataclass(frozen=True)
class Ranks:
    """The rank of a process and the number of processes, as set by torchrun."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """Return the ranks from torchrun's variables; rank 0 of 1 if RANK is not set.

    Raises ConfigError if the variables contradict each other.
    """
    if "RANK" not in env:
        for name, expected in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            if name in env and _number(env, name) != expected:
                raise ConfigError(
                    f"{name} ({env[name]}) in the environment is set, but RANK is not; "
                    f"{_LAUNCHERS}, or unset {name}"
                )
        return Ranks()
    rank = _number(env, "RANK")
    world_size = _number(env, "WORLD_SIZE")
    if world_size == 1:
        env = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **env}
    local_rank = _number(env, "LOCAL_RANK")
    local_world_size = _number(env, "LOCAL_WORLD_SIZE")
    _require_less("RANK", rank, "WORLD_SIZE", world_size)
    _require_less("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)
    if local_world_size > world_size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE ({local_world_size}) in the environment must be at most "
            f"WORLD_SIZE ({world_size}); {_LAUNCHERS}"
        )
    if not env.get("MASTER_ADDR"):
        raise ConfigError(
            f"MASTER_ADDR ({_shown(env, 'MASTER_ADDR')}) in the environment must name the host of "
            f"rank 0, because RANK is set; {_LAUNCHERS}"
        )
    port = _number(env, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise ConfigError(
            f"MASTER_PORT ({port}) in the environment must be a port from 1 to 65535; {_LAUNCHERS}"
        )
    return Ranks(rank, local_rank, world_size, local_world_size)


def refuse_lone_tasks(env: Mapping[str, str]) -> None:
    """Raise ConfigError if srun or mpirun started several tasks without torchrun.

    Each task would train a separate run.
    """
    if "RANK" in env:
        return
    remedy = (
        "start one task a node with launch/node.sh, as slurm/train.sbatch does, "
        "or one task for a run alone"
    )
    for name, launcher in _NUM_TASKS.items():
        count = env.get(name, "")
        if _is_number(count) and int(count) > 1:
            raise ConfigError(
                f"{launcher} started {count} tasks ({name}), and each would run alone; {remedy}"
            )
    task = env.get("SLURM_PROCID", "")
    if _is_number(task) and int(task) > 0:
        raise ConfigError(
            f"srun started several tasks (SLURM_PROCID={task}), and each would run alone; {remedy}"
        )


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name)
    if value is None:
        raise ConfigError(f"{name} is not set in the environment, but RANK is; start with torchrun")
    if not _is_number(value):
        raise ConfigError(
            f"{name} ({value!r}) in the environment must be a number; start with torchrun"
        )
    return int(value)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _require_less(name: str, value: int, limit_name: str, limit: int) -> None:
    if value >= limit:
        raise ConfigError(
            f"{name} ({value}) in the environment must be less than {limit_name} ({limit}); "
            f"{_LAUNCHERS}"
        )


def _shown(env: Mapping[str, str], name: str) -> str:
    return repr(env[name]) if name in env else "not set"


def num_usable_cores(
    membership: Path = Path("/proc/self/cgroup"),
    mounts: Path = Path("/proc/self/mountinfo"),
    root: Path = Path("/"),
) -> int:
    """Return the number of cores that this process may use, at least 1.

    It is the size of the CPU affinity, limited by the CPU quotas of the control groups, rounded up.

    Args:
        membership: the file that lists the control groups of this process.
        mounts: the file that lists the mounted file systems.
        root: the directory that contains the paths in `mounts`.
    """
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quotas = [
        q for folder, mount in _cpu_groups(membership, mounts, root) for q in _quotas(folder, mount)
    ]
    return max(1, min([affinity, *(math.ceil(quota) for quota in quotas)]))


def _cpu_groups(membership: Path, mounts: Path, root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (directory of this process, mount point) of cgroup v2 and of v1's cpu controller."""
    try:
        lines = membership.read_text().splitlines()
        mounted = [
            line.split(" - ", 1) for line in mounts.read_text().splitlines() if " - " in line
        ]
    except OSError:  # not Linux, or no /proc
        return
    paths = {}
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            paths["cgroup2" if controllers == "" else "cgroup"] = PurePosixPath(group)
    for target, source in mounted:
        kind, _, *options = source.split()
        top, point = (_unescaped(field) for field in target.split()[3:5])
        if kind not in paths or (kind == "cgroup" and "cpu" not in ",".join(options).split(",")):
            continue
        mount, path = root / point.lstrip("/"), paths[kind]
        # In a container the mount contains only the container's group, whose outer path is `top`.
        inside = (
            path.relative_to(top)
            if path.is_relative_to(top) and ".." not in path.parts
            else PurePosixPath()
        )
        yield mount / inside, mount


def _unescaped(field: str) -> str:
    return field.replace("\\040", " ")


def _quotas(folder: Path, mount: Path) -> Iterator[float]:
    """Yield the cores allowed by each group with a limit, from `folder` up to `mount`."""
    for group in (folder, *folder.parents):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (group / f"cpu.cfs_{name}_us").read_text().strip()
                    for name in ("quota", "period")
                )
            if quota not in ("max", "-1") and int(period) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):
            pass  # the group is not visible in this namespace, or is a root group without a limit
        if group == mount:
            return
