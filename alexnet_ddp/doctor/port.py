"""Ports: who listens where. Needs no torch: the launcher asks too, before it waits for minutes."""

import os
import socket
from pathlib import Path


def why_busy(port: int) -> str | None:
    """Why this host cannot listen on `port`, with the process that does where /proc tells; None: it can."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # ports of connections just ended are free
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"{error.strerror}{_holder(port)}"
    return None


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
                command = (
                    (process / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                    .strip()
                )
                return f"; process {process.name} has it: {command[:80]}"
        except OSError:  # gone, or another user's
            continue
    return ""
