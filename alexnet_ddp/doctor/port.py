"""Finds the process that listens on a port. Without torch, since launch/port.py imports it."""

import os
import socket
from pathlib import Path


def why_busy(port: int) -> str | None:
    """Return why this host cannot listen on `port`; None if it can.

    Names the process that listens on it, if /proc shows it.
    """
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        # Without this, ports of connections that have just been closed would count as busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"{error.strerror}{_holder(port)}"
    return None


def _holder(port: int) -> str:
    """Return `; process PID has it: COMMAND`; "" if /proc does not show the process."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                is_listening = fields[3] == "0A"
                if is_listening and int(fields[1].rpartition(":")[2], 16) == port:
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
        except OSError:  # the process has ended, or belongs to another user
            continue
    return ""
