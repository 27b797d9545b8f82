"""Starts launch/torchrun.py in server.py, and takes its place: it passes on signals, and ends as it ends.

    python -I -S tests/drills/preloaded/client.py .../launch/torchrun.py [torchrun's arguments]

PRELOADED_SERVERS is a folder with the socket of a server for each host name. If the client is killed, the server kills
torchrun. Without a server, or in other namespaces than the server's, the client becomes torchrun.py of this folder.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TextIO

FOLDER = Path(__file__).parent
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NO_SERVER = (FileNotFoundError, ConnectionRefusedError)  # for example after a reboot of the host
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)


def namespaces() -> list[str]:
    """What a process inherits and a fork of the server would not have."""
    kinds = ("mnt", "net", "pid", "user", "uts", "ipc")
    return [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds] + [
        Path("/proc/self/cgroup").read_text()
    ]


def main() -> None:
    folder = os.environ.get("PRELOADED_SERVERS")
    if folder:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        with socket.socket(socket.AF_UNIX) as server, contextlib.suppress(*NO_SERVER):
            server.connect(str(Path(folder, socket.gethostname())))
            lines = server.makefile("rw")
            socket.send_fds(server, [b"\0"], [0, 1, 2])
            if json.loads(lines.readline()) == namespaces():
                lines.write(json.dumps(request()) + "\n")
                lines.flush()
                stand_in(int(lines.readline()), lines, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.execv(sys.executable, [sys.executable, str(FOLDER / "torchrun.py"), *sys.argv[1:]])


def request() -> dict[str, object]:
    umask = os.umask(0)
    os.umask(umask)
    return {
        "args": sys.argv[1:],
        "env": dict(os.environ),
        "cwd": os.getcwd(),
        "umask": umask,
        "cores": sorted(os.sched_getaffinity(0)),
        "limits": [(limit, resource.getrlimit(limit)) for limit in LIMITS],
        "ignored": [n for n in PASSED_ON if signal.getsignal(n) == signal.SIG_IGN],
    }


def stand_in(pid: int, lines: TextIO, before: set[int]) -> None:
    """Pass on signals to the process `pid` until it ends; end in the same way."""
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, as torchrun.py
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = int(lines.readline() or 1)  # no answer: the server has ended
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
