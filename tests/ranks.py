"""Real processes for tests, forked from one that has imported torch already.

run_ranks(fn, world_size) calls fn in each and returns what they returned; run_command() runs a command of the package.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torchvision",
        "alexnet_ddp.training.step",
        "alexnet_ddp.checkpoint.manager",
    ]
)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """fn(*args), a function of a module, in `world_size` processes with torchrun's environment. Results by rank.

    A rank that raises fails the test with its trace; so does one that does not end in time.
    """
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        parent, child = SPAWN.Pipe()
        process = SPAWN.Process(target=_rank, args=(child, fn, args, rank, world_size, port))
        process.start()
        pipes.append(parent)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} of {world_size} did not end in {timeout_s} s")
            results.append(pipe.recv())
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    errors = [f"rank {r}:\n{error}" for r, (_, error) in enumerate(results) if error]
    assert not errors, "\n".join(errors)
    return [value for value, _ in results]


def _rank(
    pipe: Any, fn: Callable[..., Any], args: tuple, rank: int, world_size: int, port: int
) -> None:
    os.environ |= _torchrun_env(rank, world_size, port)
    try:
        pipe.send((fn(*args), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def run_command(
    module: str, arguments: list[str], ranks: int, cwd: Path, env: dict[str, str]
) -> CompletedProcess:
    """`python -m MODULE ARGUMENTS`, or with ranks > 0 as many processes with torchrun's environment.

    stdout contains stderr. Returns the code of the process; of several ranks 0 or 1, as torchrun does, which stops the
    others if one fails.
    """
    with started(module, arguments, ranks, cwd, env) as command:
        code = command.wait(180)
        return CompletedProcess([module, *arguments], code, command.said())


class Command:
    """The processes of a command that `started` has started."""

    def __init__(self, name: str, processes: list[Any], ranks: int, out: Path) -> None:
        self._name, self._processes, self._ranks, self._out = name, processes, ranks, out

    def is_running(self) -> bool:
        return any(process.exitcode is None for process in self._processes)

    def send_signal(self, number: int) -> None:
        """To every process, as torchrun passes on a stop signal."""
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, timeout_s: float) -> int:
        """The code that run_command returns."""
        _wait_for_all(self._processes, timeout_s)
        codes = [process.exitcode for process in self._processes]
        assert None not in codes, f"{self._name} did not end in {timeout_s} s:\n{self.said()}"
        return int(any(codes)) if self._ranks else codes[0]

    def said(self) -> str:
        return self._out.read_text()


@contextmanager
def started(
    module: str, arguments: list[str], ranks: int, cwd: Path, env: dict[str, str]
) -> Iterator[Command]:
    """Start what run_command runs. What is left of it at the end of the block is killed.

    Each process saves the seconds that importing torch takes. Use a real command line if the start of the interpreter
    or a launcher is the subject.
    """
    port = _free_port() if ranks else 0
    rank_envs = [
        _torchrun_env(rank, ranks, port) | {"OMP_NUM_THREADS": "1"} for rank in range(ranks)
    ] or [{}]
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        out.touch()
        more = [(str(out), module, arguments, str(cwd), env | rank_env) for rank_env in rank_envs]
        processes = [SPAWN.Process(target=_command, args=args) for args in more]
        for process in processes:
            process.start()
        try:
            yield Command(module, processes, ranks, out)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait_for_all(processes: list[Any], timeout_s: float) -> None:
    """Until all have ended, or the time is over. If one fails, the others get SIGTERM."""
    end, running, stopped = time.monotonic() + timeout_s, list(processes), False
    while running and time.monotonic() < end:
        wait([process.sentinel for process in running], end - time.monotonic())
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in processes) and not stopped:
            stopped = True  # once: a second signal would end a run without a checkpoint
            for process in running:
                process.terminate()


def _command(out: str, module: str, arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= env
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _torchrun_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return env | {
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
