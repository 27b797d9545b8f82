"""tests/cluster: hosts on one machine, of which nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import Hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")

PROJECT = Path(__file__).parents[1]


def processes_with(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:  # gone
            continue
    return found


def test_hosts_reach_each_other_by_name_until_a_link_is_cut():
    connect = ["bash", "-c", "exec 3<>/dev/tcp/n1/5000"]
    listen = "import socket; s = socket.create_server(('', 5000)); print(flush=True); s.accept()"
    with Hosts(2) as hosts:
        server = subprocess.Popen(
            hosts.command("n1", sys.executable, "-c", listen), stdout=subprocess.PIPE
        )
        server.stdout.readline()
        hosts.run("n2", *connect)
        assert server.wait(10) == 0
        server.stdout.close()
        assert hosts.run("n2", "hostname") == "n2"
        hosts.link("n2", up=False)
        with pytest.raises(subprocess.CalledProcessError):
            hosts.run("n2", "timeout", "0.3", *connect, stderr=subprocess.DEVNULL)


def test_nothing_is_left_of_hosts_whose_maker_is_killed(tmp_path):
    mark = f"MADE_BY={tmp_path}"
    lines = ["import time", "from tests.cluster import Hosts", "with Hosts(1) as hosts:"]
    text = "\n".join([*lines, "    print('up', flush=True)", "    time.sleep(60)"])
    env = {**os.environ, "MADE_BY": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    maker = subprocess.Popen(
        [sys.executable, "-c", text], env=env, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout.readline() == "up\n"
    assert len(processes_with(mark)) > 3
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    deadline = time.monotonic() + 10
    while processes_with(mark):
        assert time.monotonic() < deadline, processes_with(mark)
        time.sleep(0.05)
