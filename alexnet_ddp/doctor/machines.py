"""What the ranks' facts say about their machines: functions of all ranks' facts, judged by rank 0."""

import os

from alexnet_ddp.doctor.facts import Facts
from alexnet_ddp.doctor.findings import Finding, Level, by_value, shortened, size, tell
from alexnet_ddp.doctor.port import why_busy

_FILES = 4096  # images, shards, sockets to every rank, and what libraries open
_SHM = 64_000_000  # bytes a rank that NCCL maps: Docker's default is as much for all of them


def before_joining(everyone: list[Facts]) -> list[Finding]:
    """What must hold before the ranks form a group: each FAIL here would make them hang, or train different things."""
    return [devices(everyone), versions(everyone), same_command(everyone), *interfaces(everyone)]


def of_machines(everyone: list[Facts]) -> list[Finding]:
    """What a run asks of each machine beside that."""
    found = [
        threads(everyone),
        cores(everyone),
        open_files(everyone),
        shared_memory(everyone),
        data_root(everyone),
    ]
    return [launcher(everyone), *found, port(everyone[0], len(everyone))]


def devices(everyone: list[Facts]) -> Finding:
    """A device for each rank, of one kind."""
    needed = f"device={everyone[0].config['device']} on every rank, of one kind"
    without = [one for one in everyone if one.device not in ("cpu", "cuda")]
    if without:
        remedy = "give each node as many processes as it has GPUs, or device=cpu"
        return Finding(
            "devices", f"{without[0].who}: {without[0].device}", needed, Level.fail, remedy
        )
    kinds = by_value((one.who, f"{one.device} ({one.device_name})") for one in everyone)
    mixed = len({one.device for one in everyone}) > 1
    remedy = (
        "device=cpu for all, or GPUs on every node"
        if mixed
        else "the slowest sets the pace: use one kind"
    )
    bad = Finding("devices", tell(kinds), needed, Level.fail if mixed else Level.warn, remedy)
    nodes = sum(one.is_leader for one in everyone)
    counts = by_value((one.host, one.local_world_size) for one in everyone if one.is_leader)
    found = f"{len(everyone)} × {tell(kinds)}" + (
        f", {tell(counts)} on each of {nodes} nodes" if nodes > 1 else ""
    )
    return Finding("devices", found, needed) if len(kinds) == 1 else bad


def versions(everyone: list[Facts]) -> Finding:
    """The same on all ranks: collectives of different versions hang or disagree."""
    mine = everyone[0].versions
    names = sorted({name for one in everyone for name in one.versions})
    differ = [
        f"{name} " + tell(by_value((one.who, one.versions.get(name, "none")) for one in everyone))
        for name in names
        if len({one.versions.get(name) for one in everyone}) > 1
    ]
    found = "; ".join(differ) or ", ".join(f"{name} {mine[name]}" for name in names)
    remedy = "install the same versions on every node"
    return Finding("versions", found, "the same on every rank", Level.fail, remedy).unless(
        not differ
    )


def same_command(everyone: list[Facts]) -> Finding:
    """All ranks were started with the same knobs."""
    keys = sorted({key for one in everyone for key in one.config})
    differ = [
        f"{key}: " + tell(by_value((one.who, one.config.get(key)) for one in everyone))
        for key in keys
        if len({one.config.get(key) for one in everyone}) > 1
    ]
    found = "; ".join(differ[:3]) or f"{len(keys)} knobs"
    bad = Finding(
        "command",
        found,
        "the same on every rank",
        Level.fail,
        "start all nodes with the same command",
    )
    return bad.unless(not differ)


def interfaces(everyone: list[Facts]) -> list[Finding]:
    """The network that gloo and NCCL take, where the ranks are on several machines."""
    if len({one.network for one in everyone}) == 1:
        return [Finding("interface", "one machine", "any: 127.0.0.1 reaches all ranks")]
    return [bad for one in everyone if one.is_leader and (bad := own_interface(one))][:4] or [
        Finding("interface", _taken(everyone[0]), "one that reaches the other nodes")
    ]


def own_interface(one: Facts) -> Finding | None:
    """What is wrong with the network that a node of several would take. Looks at facts only: nothing was tried."""
    needed = "an interface that reaches the other nodes"
    variable = "GLOO_SOCKET_IFNAME" if one.device == "cpu" else "NCCL_SOCKET_IFNAME"
    remedy = f"{variable}={_others(one)} on every node, whichever joins them"
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
            found = f"{one.host}: its name resolves to {one.address or 'nothing'}, where gloo then listens"
            return Finding("interface", found, needed, Level.fail, f"mend /etc/hosts, or {remedy}")
    if chosen.removeprefix("=").split(",")[0] == "lo":
        return Finding(
            "interface", f"{found}, which reaches this machine alone", needed, Level.fail, remedy
        )
    return None


def _taken(one: Facts) -> str:
    variable = "GLOO_SOCKET_IFNAME" if one.device == "cpu" else "NCCL_SOCKET_IFNAME"
    return (
        f"{variable}={one.env[variable]}"
        if one.env.get(variable)
        else f"that of the host's name, {one.address}"
    )


def _others(one: Facts) -> str:
    return "|".join(name for name in one.interfaces if name != "lo") or "eth0"


def launcher(everyone: list[Facts]) -> Finding:
    """srun and mpirun start processes; only torchrun tells them of each other."""
    tasks = max(
        int(everyone[0].env.get(name, "1"))
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    found = (
        f"{tasks} tasks, in worlds of {len(everyone)}"
        if tasks > 1
        else f"a world of {len(everyone)}"
    )
    remedy = (
        "start one torchrun a node: srun --ntasks-per-node=1 launch/node.sh, or slurm/train.sbatch"
    )
    bad = Finding("launcher", found, "all processes in one world", Level.fail, remedy)
    return bad.unless(tasks == 1 or "MASTER_ADDR" in everyone[0].env)


def threads(everyone: list[Facts]) -> Finding:
    """OMP_NUM_THREADS. torch's own number of threads is set by the run; numpy's, OpenCV's and MKL's are not."""

    def absurd(one: Facts) -> bool:
        value = one.env.get("OMP_NUM_THREADS", "1")
        return not value.isdecimal() or not 1 <= int(value) <= max(1, one.cores)

    bad = by_value(
        (one.who, f"OMP_NUM_THREADS={one.env['OMP_NUM_THREADS']}, {one.cores} cores")
        for one in everyone
        if absurd(one)
    )
    values = by_value((one.who, one.env.get("OMP_NUM_THREADS", "not set")) for one in everyone)
    found = (
        "; ".join(f"{what} on {shortened(who)}" for what, who in bad.items())
        or f"OMP_NUM_THREADS {tell(values)}"
    )
    share = max(1, everyone[0].cores // everyone[0].local_world_size)
    remedy = f"unset OMP_NUM_THREADS, or set it to {share}"
    needed = f"at most {everyone[0].cores}, the cores that a rank may use"
    return Finding("threads", found, needed, Level.warn, remedy).unless(not bad)


def cores(everyone: list[Facts]) -> Finding:
    """At least one core a rank."""
    leaders = [one for one in everyone if one.is_leader]
    share = by_value(
        (one.host, f"{one.cores}, for ranks: {one.local_world_size}") for one in leaders
    )
    few = any(one.cores < one.local_world_size for one in everyone)
    remedy = "start fewer processes on a node, or ask for more cores (--cpus-per-task)"
    return Finding("cores", tell(share), "at least 1 for each", Level.warn, remedy).unless(not few)


def open_files(everyone: list[Facts]) -> Finding:
    """ulimit -n."""
    needed = _FILES + 2 * len(everyone)  # a socket each way to every rank
    lowest = min(everyone, key=lambda one: one.files_limit)
    found = (
        f"{lowest.files_limit:,} (lowest, {lowest.who})"
        if len(everyone) > 1
        else f"{lowest.files_limit:,}"
    )
    bad = Finding(
        "open files",
        found,
        f"{needed:,}",
        Level.warn,
        f"ulimit -n {needed}, or LimitNOFILE of slurmd",
    )
    return bad.unless(lowest.files_limit >= needed)


def shared_memory(everyone: list[Facts]) -> Finding:
    """/dev/shm: for NCCL between the GPUs of a node. The loader has threads and needs none."""
    lowest = min(everyone, key=lambda one: one.shm)
    ranks = (
        lowest.local_world_size if lowest.device == "cuda" and lowest.local_world_size > 1 else 0
    )
    needed = ranks * _SHM
    text = (
        f"{size(needed)}, for NCCL" if needed else "none: the loader has threads, gloo uses sockets"
    )
    bad = Finding(
        "/dev/shm", size(lowest.shm), text, Level.warn, "docker run --shm-size=8g, or --ipc=host"
    )
    return bad.unless(lowest.shm >= needed)


def data_root(everyone: list[Facts]) -> Finding:
    """The same images on every node."""
    root = everyone[0].config.get("data.root", "")
    seen = by_value((one.host, one.data) for one in everyone if one.is_leader)
    lacking = seen.get("", [])
    needed = "the same images on every node"
    if lacking:
        remedy = "mount it there, or give the data.root that all nodes see"
        return Finding(
            "data.root",
            f"{root} cannot be read on {shortened(lacking)}",
            needed,
            Level.fail,
            remedy,
        )
    remedy = "copy it anew, or use one shared folder"
    bad = Finding(
        "data.root", f"{root} shows other files: {tell(seen)}", needed, Level.fail, remedy
    )
    found = (
        root
        if "not on a disk" not in seen
        else f"{everyone[0].config.get('data.root', 'synthetic images')}"
    )
    return Finding("data.root", found, needed) if len(seen) == 1 else bad


def port(main: Facts, world_size: int) -> Finding:
    """The port where ranks meet: ours once they did, else whether a run of several could have it."""
    number = int(main.env.get("MASTER_PORT", "29500"))
    if world_size > 1 or "RANK" in os.environ:
        return Finding(
            "port",
            f"{main.env.get('MASTER_ADDR')}:{number}, all ranks met",
            "free, and this job's alone",
        )
    reason = why_busy(number)
    asked = "MASTER_PORT" in main.env
    verdict, remedy = (
        Level.fail if asked else Level.warn,
        "choose another port: MASTER_PORT, --master-port",
    )
    found = f"{number}: {reason}" if reason else f"{number} is free"
    return Finding("port", found, "free on the host of rank 0", verdict, remedy).unless(
        reason is None
    )
