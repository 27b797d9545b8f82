"""Forks launch/torchrun.py from a process that has imported what the ranks import.

    python tests/drills/preloaded/server.py FOLDER

The socket in FOLDER has the name of the host.

One import serves all jobs of a pytest worker. client.py asks for a start and takes its place in the process tree. The
server ends with its standard input. Environment, directory, files, limits and cores of a start are the client's.
"""

import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torchrun  # beside this file, as is the next
from client import namespaces


def serve(path: Path) -> None:
    selector = selectors.DefaultSelector()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    return
                if key.fileobj is listener:
                    accept(listener, selector)
                else:
                    key.data(key.fileobj)


def accept(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    """Fork what a client asks for. Its pid, and later its exit code, are the answers."""
    client, _ = listener.accept()
    lines = client.makefile("rw")
    lines.write(json.dumps(namespaces()) + "\n")
    lines.flush()
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    request = lines.readline()
    if not request:  # it starts its own Python
        client.close()
        return
    pid = os.fork()
    if pid == 0:
        be_torchrun(json.loads(request), files)
    for file in files:
        os.close(file)
    lines.write(f"{pid}\n")
    lines.flush()
    process = os.pidfd_open(pid)

    def report(_: Any) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        selector.unregister(process)
        os.close(process)
        if client in selector.get_map():
            selector.unregister(client)
            lines.write(f"{code}\n")
            lines.flush()
        client.close()

    def kill(_: Any) -> None:  # the client was killed
        selector.unregister(client)
        os.kill(pid, signal.SIGKILL)

    selector.register(process, selectors.EVENT_READ, report)
    selector.register(client, selectors.EVENT_READ, kill)


def be_torchrun(request: dict[str, Any], files: list[int]) -> None:
    """Become the process that the client would have become. Does not return."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.sched_setaffinity(0, request["cores"])
    for limit, values in request["limits"]:
        resource.setrlimit(limit, values)
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ |= request["env"]
    sys.path[1:1] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["torchrun.py", *request["args"]]
    torchrun.end_as("torchrun", torchrun.main)


if __name__ == "__main__":
    from alexnet_ddp.runtime import startup  # noqa: F401 (launch/torchrun.py takes it from here)

    torchrun.import_all()
    gc.freeze()
    serve(Path(sys.argv[1], socket.gethostname()))
