"""Checks of the machines, as functions of the facts of all ranks. Rank 0 calls them."""

import os

from alexnet_ddp.doctor.facts import Facts
from alexnet_ddp.doctor.findings import (
    Finding,
    Level,
    describe,
    format_bytes,
    group_by_value,
    shorten,
)
from alexnet_ddp.doctor.port import why_busy

_FILES = 4096  # open files of the loader and of libraries
_SHM = 64_000_000  # bytes that NCCL maps per rank; Docker's default is as much for all ranks


def check_compatibility(all_facts: list[Facts]) -> list[Finding]:
    """Check what must hold before the ranks form a process group.

    With a FAIL the ranks would hang, or train different models.
    """
    return [
        check_devices(all_facts),
        check_versions(all_facts),
        check_same_command(all_facts),
        *check_interfaces(all_facts),
    ]


def check_machines(all_facts: list[Facts]) -> list[Finding]:
    """Check everything else that a run needs of each machine."""
    found = [
        check_threads(all_facts),
        check_cores(all_facts),
        check_open_files(all_facts),
        check_shared_memory(all_facts),
        check_data_root(all_facts),
    ]
    return [check_launcher(all_facts), *found, check_port(all_facts[0], len(all_facts))]


def check_devices(all_facts: list[Facts]) -> Finding:
    """Check that every rank has a device, all of one kind."""
    needed = f"device={all_facts[0].config['device']} on every rank, of one kind"
    without = [one for one in all_facts if one.device not in ("cpu", "cuda")]
    if without:
        remedy = "give each node as many processes as it has GPUs, or device=cpu"
        return Finding(
            "devices", f"{without[0].name}: {without[0].device}", needed, Level.fail, remedy
        )
    kinds = group_by_value((one.name, f"{one.device} ({one.device_name})") for one in all_facts)
    mixed = len({one.device for one in all_facts}) > 1
    remedy = (
        "device=cpu for all, or GPUs on every node"
        if mixed
        else "use one kind: every step waits for the slowest device"
    )
    bad = Finding("devices", describe(kinds), needed, Level.fail if mixed else Level.warn, remedy)
    nodes = sum(one.is_leader for one in all_facts)
    counts = group_by_value((one.host, one.local_world_size) for one in all_facts if one.is_leader)
    found = f"{len(all_facts)} × {describe(kinds)}" + (
        f", {describe(counts)} on each of {nodes} nodes" if nodes > 1 else ""
    )
    return Finding("devices", found, needed) if len(kinds) == 1 else bad


def check_versions(all_facts: list[Facts]) -> Finding:
    """Check that all ranks have the same versions: collectives may hang or disagree otherwise."""
    mine = all_facts[0].versions
    names = sorted({name for one in all_facts for name in one.versions})
    differ = [
        f"{name} "
        + describe(group_by_value((one.name, one.versions.get(name, "none")) for one in all_facts))
        for name in names
        if len({one.versions.get(name) for one in all_facts}) > 1
    ]
    found = "; ".join(differ) or ", ".join(f"{name} {mine[name]}" for name in names)
    remedy = "install the same versions on every node"
    return Finding("versions", found, "the same on every rank", Level.fail, remedy).ok_if(
        not differ
    )


def check_same_command(all_facts: list[Facts]) -> Finding:
    """Check that all ranks were started with the same options."""
    keys = sorted({key for one in all_facts for key in one.config})
    differ = [
        f"{key}: " + describe(group_by_value((one.name, one.config.get(key)) for one in all_facts))
        for key in keys
        if len({one.config.get(key) for one in all_facts}) > 1
    ]
    found = "; ".join(differ[:3]) or f"{len(keys)} options"
    bad = Finding(
        "command",
        found,
        "the same on every rank",
        Level.fail,
        "start all nodes with the same command",
    )
    return bad.ok_if(not differ)


def check_interfaces(all_facts: list[Facts]) -> list[Finding]:
    """Check the network interface that gloo or NCCL would select, if there are several machines."""
    if len({one.network for one in all_facts}) == 1:
        return [Finding("interface", "one machine", "any: 127.0.0.1 reaches all ranks")]
    bad = [finding for one in all_facts if one.is_leader and (finding := check_own_interface(one))]
    good = Finding("interface", _selected(all_facts[0]), "one that reaches the other nodes")
    return bad[:4] or [good]


def check_own_interface(one: Facts) -> Finding | None:
    """Return what is wrong with the interface of one node, or None. Nothing is sent."""
    needed = "an interface that reaches the other nodes"
    variable = "GLOO_SOCKET_IFNAME" if one.device == "cpu" else "NCCL_SOCKET_IFNAME"
    remedy = f"{variable}={_others(one)} on every node, the one that connects them"
    chosen = one.env.get(variable, "")
    found = f"{one.host}: {variable}={chosen}"
    if one.device == "cpu":
        if chosen and chosen not in one.interfaces:
            return Finding(
                "interface",
                f"{found} is none of {', '.join(one.interfaces)}",
                needed,
                Level.fail,
                remedy,
            )
        if not chosen and (one.address.startswith("127.") or not one.address):
            found = f"{one.host}: its name resolves to {one.address or 'nothing'}, used by gloo"
            return Finding("interface", found, needed, Level.fail, f"fix /etc/hosts, or {remedy}")
    if chosen.removeprefix("=").split(",")[0] == "lo":
        return Finding(
            "interface", f"{found}, which reaches this machine alone", needed, Level.fail, remedy
        )
    return None


def _selected(one: Facts) -> str:
    variable = "GLOO_SOCKET_IFNAME" if one.device == "cpu" else "NCCL_SOCKET_IFNAME"
    return (
        f"{variable}={one.env[variable]}"
        if one.env.get(variable)
        else f"that of the host's name, {one.address}"
    )


def _others(one: Facts) -> str:
    return "|".join(name for name in one.interfaces if name != "lo") or "eth0"


def check_launcher(all_facts: list[Facts]) -> Finding:
    """Check that processes of srun or mpirun form one world, which needs torchrun's variables."""
    tasks = max(
        int(all_facts[0].env.get(name, "1"))
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    found = (
        f"{tasks} tasks, in worlds of {len(all_facts)}"
        if tasks > 1
        else f"a world of {len(all_facts)}"
    )
    remedy = (
        "start one torchrun per node: srun --ntasks-per-node=1 launch/node.sh, or "
        "slurm/train.sbatch"
    )
    bad = Finding("launcher", found, "all processes in one world", Level.fail, remedy)
    return bad.ok_if(tasks == 1 or "MASTER_ADDR" in all_facts[0].env)


def check_threads(all_facts: list[Facts]) -> Finding:
    """Check OMP_NUM_THREADS. A run sets torch's threads, but not those of numpy, OpenCV and MKL."""

    def is_invalid(one: Facts) -> bool:
        value = one.env.get("OMP_NUM_THREADS", "1")
        return not value.isdecimal() or not 1 <= int(value) <= max(1, one.cores)

    bad = group_by_value(
        (one.name, f"OMP_NUM_THREADS={one.env['OMP_NUM_THREADS']}, {one.cores} cores")
        for one in all_facts
        if is_invalid(one)
    )
    values = group_by_value(
        (one.name, one.env.get("OMP_NUM_THREADS", "not set")) for one in all_facts
    )
    found = (
        "; ".join(f"{value} on {shorten(names)}" for value, names in bad.items())
        or f"OMP_NUM_THREADS {describe(values)}"
    )
    share = max(1, all_facts[0].cores // all_facts[0].local_world_size)
    remedy = f"unset OMP_NUM_THREADS, or set it to {share}"
    needed = f"at most {all_facts[0].cores}, the cores that a rank may use"
    return Finding("threads", found, needed, Level.warn, remedy).ok_if(not bad)


def check_cores(all_facts: list[Facts]) -> Finding:
    """Check that every rank has at least one core."""
    leaders = [one for one in all_facts if one.is_leader]
    share = group_by_value(
        (one.host, f"{one.cores}, for ranks: {one.local_world_size}") for one in leaders
    )
    few = any(one.cores < one.local_world_size for one in all_facts)
    remedy = "start fewer processes on a node, or ask for more cores (--cpus-per-task)"
    return Finding("cores", describe(share), "at least 1 for each", Level.warn, remedy).ok_if(
        not few
    )


def check_open_files(all_facts: list[Facts]) -> Finding:
    """Check the limit of open files (ulimit -n)."""
    needed = _FILES + 2 * len(all_facts)  # a socket each way to every rank
    lowest = min(all_facts, key=lambda one: one.files_limit)
    found = (
        f"{lowest.files_limit:,} (lowest, {lowest.name})"
        if len(all_facts) > 1
        else f"{lowest.files_limit:,}"
    )
    bad = Finding(
        "open files",
        found,
        f"{needed:,}",
        Level.warn,
        f"ulimit -n {needed}, or LimitNOFILE of slurmd",
    )
    return bad.ok_if(lowest.files_limit >= needed)


def check_shared_memory(all_facts: list[Facts]) -> Finding:
    """Check /dev/shm, which NCCL uses between the GPUs of a node. The loader does not use it."""
    lowest = min(all_facts, key=lambda one: one.shm)
    ranks = (
        lowest.local_world_size if lowest.device == "cuda" and lowest.local_world_size > 1 else 0
    )
    needed = ranks * _SHM
    text = f"{format_bytes(needed)}, for NCCL" if needed else "none without NCCL"
    bad = Finding(
        "/dev/shm",
        format_bytes(lowest.shm),
        text,
        Level.warn,
        "docker run --shm-size=8g, or --ipc=host",
    )
    return bad.ok_if(lowest.shm >= needed)


def check_data_root(all_facts: list[Facts]) -> Finding:
    """Check that data.root has the same content on every node."""
    root = all_facts[0].config.get("data.root", "")
    seen = group_by_value((one.host, one.data) for one in all_facts if one.is_leader)
    lacking = seen.get("", [])
    needed = "the same images on every node"
    if lacking:
        remedy = "mount it on these nodes, or give a data.root that all nodes can read"
        return Finding(
            "data.root",
            f"{root} cannot be read on {shorten(lacking)}",
            needed,
            Level.fail,
            remedy,
        )
    bad = Finding(
        "data.root",
        f"{root} has different files: {describe(seen)}",
        needed,
        Level.fail,
        "copy it again, or use one shared folder",
    )
    found = (
        root
        if "not on a disk" not in seen
        else f"{all_facts[0].config.get('data.root', 'synthetic images')}"
    )
    return Finding("data.root", found, needed) if len(seen) == 1 else bad


def check_port(main: Facts, world_size: int) -> Finding:
    """Check the rendezvous port: a single process tries whether a larger run could listen on it."""
    number = int(main.env.get("MASTER_PORT", "29500"))
    if world_size > 1 or "RANK" in os.environ:
        return Finding(
            "port",
            f"{main.env.get('MASTER_ADDR')}:{number}, all ranks connected",
            "free, and used by this job only",
        )
    reason = why_busy(number)
    asked = "MASTER_PORT" in main.env
    level, remedy = (
        Level.fail if asked else Level.warn,
        "choose another port: MASTER_PORT, --master-port",
    )
    found = f"{number}: {reason}" if reason else f"{number} is free"
    return Finding("port", found, "free on the host of rank 0", level, remedy).ok_if(reason is None)
