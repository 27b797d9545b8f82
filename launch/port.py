"""The port where the nodes of a run meet: that it is free is checked before torchrun waits for minutes."""

import os
import re
import socket
import sys

from alexnet_ddp.doctor.port import why_busy


def check_port(arguments: list[str]) -> None:
    """Exit with 64 where this host is to listen on the port of --rdzv-endpoint and another process does."""
    options = dict(
        argument.split("=", 1)
        for argument in arguments
        if argument.startswith("--rdzv-") and "=" in argument
    )
    endpoint = re.fullmatch(r"\[?(.+?)\]?:(\d+)", options.get("--rdzv-endpoint", ""))
    if endpoint is None or not _is_host(endpoint[1], options.get("--rdzv-conf", "")):
        return
    port = int(endpoint[2])
    reason = why_busy(port)
    if reason is not None:
        rule = f"RDZV_ENDPOINT: port {port} of this host cannot be had ({reason})"
        print(f"node.sh: {rule}; choose another port, the same on every node", file=sys.stderr)
        os._exit(64)


def _is_host(name: str, conf: str) -> bool:
    """As torchrun has it: who is told so, or else whose name or address it is."""
    told = re.search(r"is_host=(\d)", conf)
    if told:
        return told[1] == "1"
    try:
        return name in (
            "localhost",
            socket.gethostname(),
            socket.gethostbyname(socket.gethostname()),
        )
    except OSError:
        return False
