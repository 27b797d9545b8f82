"""Check that the rendezvous port is free, before torchrun waits for minutes."""

import os
import re
import socket
import sys

from alexnet_ddp.doctor.port import why_busy


def check_port(arguments: list[str]) -> None:
    """Exit with 64 if this host must listen on the port of --rdzv-endpoint, but cannot."""
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
        print(
            f"node.sh: RDZV_ENDPOINT: port {port} of this host is not available ({reason}); "
            "choose another port, the same on every node",
            file=sys.stderr,
        )
        os._exit(64)


def _is_host(name: str, conf: str) -> bool:
    """True if torchrun will listen here: is_host=1, or else this host's name or address."""
    is_host = re.search(r"is_host=(\d)", conf)
    if is_host:
        return is_host[1] == "1"
    try:
        return name in (
            "localhost",
            socket.gethostname(),
            socket.gethostbyname(socket.gethostname()),
        )
    except OSError:
        return False
