"""The port where the nodes of a run meet: that it is free is checked before torchrun waits for minutes."""

import os
import re
import socket
import sys
from pathlib import Path


def check_port(arguments: list[str]) -> None:
    """Exit with 64 where this host is to listen on the port of --rdzv-endpoint and another process does."""
    options = dict(
        argument.split("=", 1) for argument in arguments if argument.startswith("--rdzv-") and "=" in argument
    )
    endpoint = re.fullmatch(r"\[?(.+?)\]?:(\d+)", options.get("--rdzv-endpoint", ""))
    if endpoint is None or not _is_host(endpoint[1], options.get("--rdzv-conf", "")):
        return
    port = int(endpoint[2])
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of connections just ended are free
        try:
            probe.bind(("", port))
        except OSError as error:
            rule = f"RDZV_ENDPOINT: port {port} of this host cannot be had ({error.strerror}{_holder(port)})"
            print(f"node.sh: {rule}; choose another port, the same on every node", file=sys.stderr)
            os._exit(64)


def _is_host(name: str, conf: str) -> bool:
    """As torchrun has it: who is told so, or else whose name or address it is."""
    told = re.search(r"is_host=(\d)", conf)
    if told:
        return told[1] == "1"
    try:
        return name in ("localhost", socket.gethostname(), socket.gethostbyname(socket.gethostname()))
    except OSError:
        return False


def _holder(port: int) -> str:
    """Which process listens there, where /proc and its rights say so."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # listens
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) in inodes for link in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"; process {process.name} has it: {command[:80]}"
        except OSError:  # gone, or another user's
            continue
    return ""
