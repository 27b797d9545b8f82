"""Hosts with shaped links, and teams of ranks on them, for benchmarks/communication.py.

A host is a network namespace on this machine (tests/cluster), pinned to its share of the cores. A
team is the processes of one variant, one per host. They are started once, and sleep while another
team takes steps.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster import Hosts, why_not  # noqa: E402

__all__ = [
    "LINKS",
    "OUR_MALLOC",
    "ROOT",
    "Field",
    "Hosts",
    "Team",
    "field",
    "has_lightning",
    "why_not",
]

LINKS = {"unshaped": None, "1 Gbit/s": "1gbit", "100 Mbit/s": "100mbit"}
# launch/ sets these for our users; the peers' users have the defaults.
OUR_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
FIRST_PORT = 29500


class Team:
    """The ranks of one variant. For the protocol see one_rank.py."""

    def __init__(self, ranks: list[subprocess.Popen]) -> None:
        self._ranks = ranks
        self._answers()  # wait until all are ready

    def steps(self, count: int) -> dict[str, float]:
        """Take `count` steps. Returns per step: seconds of the slowest rank, mean MB sent."""
        for rank in self._ranks:
            rank.stdin.write(f"{count}\n")
            rank.stdin.flush()
        answers = self._answers()
        sent = sum(answer["sent"] for answer in answers) / len(answers)
        return {
            "seconds": max(answer["seconds"] for answer in answers) / count,
            "sent": sent / 1e6 / count,
        }

    def seconds(self, count: int) -> Callable[[], float]:
        return lambda: self.steps(count)["seconds"]

    def megabytes(self, count: int) -> Callable[[], float]:
        return lambda: self.steps(count)["sent"]

    def close(self) -> None:
        for rank in self._ranks:
            rank.stdin.close()
        for rank in self._ranks:
            if rank.wait():
                sys.exit(f"a rank ended with {rank.returncode}; see the messages above")
            rank.stdout.close()

    def _answers(self) -> list[dict[str, float]]:
        lines = [rank.stdout.readline() for rank in self._ranks]
        if not all(lines):
            sys.exit("a rank ended before it answered; see the messages above")
        return [json.loads(line) for line in lines]


class Field:
    """Hosts, and the teams that are started on them. All processes end with it."""

    def __init__(self, hosts: Hosts, num_ranks: int) -> None:
        self._hosts, self._num_ranks = hosts, num_ranks
        self._port, self._rate = FIRST_PORT, None

    def link(self, rate: str | None) -> None:
        """Shape all links, in both directions. No message may be in transit."""
        if rate != self._rate:
            for i in range(self._num_ranks):
                self._hosts.rate(f"n{i + 1}", rate)
            self._rate = rate

    def team(self, request: dict) -> Team:
        """Start one rank on each host; wait until all are ready."""
        self._port += 1
        return Team([self._start(request, rank) for rank in range(self._num_ranks)])

    def _start(self, request: dict, rank: int) -> subprocess.Popen:
        world = {
            "RANK": rank,
            "WORLD_SIZE": self._num_ranks,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
        }
        world |= {
            "MASTER_ADDR": "10.77.0.11",
            "MASTER_PORT": self._port,
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
        env |= {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        env |= OUR_MALLOC if request["kind"] in ("ours", "compute") else {}
        command = [
            sys.executable,
            str(Path(__file__).with_name("one_rank.py")),
            json.dumps(request),
        ]
        return subprocess.Popen(
            self._hosts.command(f"n{rank + 1}", *command),
            env=env | {key: str(value) for key, value in world.items()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def has_lightning() -> bool:
    return importlib.util.find_spec("lightning") is not None


@contextmanager
def field(num_ranks: int) -> Iterator[Field]:
    with Hosts(max(2, num_ranks)) as hosts:  # a single host would get all cores
        yield Field(hosts, num_ranks)
