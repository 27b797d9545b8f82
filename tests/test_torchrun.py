"""launch/torchrun.py with real processes: a stop signal at the moments at which torchrun alone loses it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

# It ends after NUM_SIGNALS times SIGTERM, otherwise after a minute.
RANK = """
import os, pathlib, signal, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
pathlib.Path("started-" + os.environ["RANK"]).touch()
end = time.monotonic() + 60
while len(signals) < int(os.environ["NUM_SIGNALS"]) and time.monotonic() < end:
    time.sleep(0.05)
    pathlib.Path("signals-" + os.environ["RANK"]).write_text(str(len(signals)))
"""

# Runs launch/torchrun.py. MOMENT decides when the process sends SIGTERM to itself. `ranks` lists the
# processes of the ranks.
LAUNCHER = """
import os, pathlib, runpy, signal, subprocess, sys, time

moment, sys.argv = sys.argv[1], sys.argv[2:]

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if rank := (options.get("env") or {}).get("LOCAL_RANK"):
            with open("ranks", "a") as file:
                print(self.pid, file=file)
            if moment == "start " + rank:
                os.kill(os.getpid(), signal.SIGTERM)

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def sleep(seconds):
    global moment
    if moment == "finalizer" and len(list(pathlib.Path().glob("started-*"))) == 2:
        moment = ""
        Finalized()
    real_sleep(seconds)

real_sleep, time.sleep, subprocess.Popen = time.sleep, sleep, Popen
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start 0", "start 1", "finalizer"])
def test_a_stop_signal_reaches_every_rank(moment, tmp_path):
    process = start(moment, num_signals=1, folder=tmp_path)
    errors = process.communicate(timeout=50)[1]
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    ranks = [int(line) for line in (tmp_path / "ranks").read_text().split()]
    assert len(ranks) == 2
    wait_until(lambda: not any(map(is_running, ranks)), f"the end of {ranks}\n{errors}")
    if moment == "finalizer":
        assert signals(tmp_path) == ["1", "1"]


@pytest.mark.slow
def test_a_second_stop_signal_is_passed_on_while_the_ranks_save(tmp_path):
    process = start("none", num_signals=2, folder=tmp_path)
    wait_until(lambda: signals(tmp_path) == ["0", "0"], "the ranks")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: signals(tmp_path) == ["1", "1"], "the first signal")
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=20)[1]
    assert (process.returncode, signals(tmp_path)) == (1, ["2", "2"]), errors


def start(moment: str, num_signals: int, folder: Path) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    (folder / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, "launcher.py", moment, str(PROJECT / "launch/torchrun.py")]
    command += ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    command += ["--signals-to-handle=SIGQUIT", "rank.py"]
    env = os.environ | {"PYTHONPATH": str(PROJECT), "NUM_SIGNALS": str(num_signals)}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def signals(folder: Path) -> list[str]:
    """The number of signals that each rank has received; [] until both have started."""
    files = [folder / f"signals-{rank}" for rank in (0, 1)]
    return [file.read_text() for file in files] if all(file.exists() for file in files) else []


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False
