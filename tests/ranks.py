"""Real gloo processes for tests: run_ranks(fn, world_size) calls fn in each and returns what they returned."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["torch", "torchvision", "alexnet_ddp.engine", "alexnet_ddp.checkpoint.store"])


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """fn(*args), a function of a module, in `world_size` processes with torchrun's environment. Results by rank.

    A rank that raises fails the test with its trace; so does one that does not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def _rank(pipe: Any, fn: Callable[..., Any], args: tuple, rank: int, world_size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        pipe.send((fn(*args), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
