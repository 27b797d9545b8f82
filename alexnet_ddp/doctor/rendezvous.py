"""The ranks exchange facts through the store before they form a process group.

A missing rank, or gloo on the wrong network interface, would otherwise be a hang and then an error
that names no rank.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from alexnet_ddp.doctor.facts import Facts
from alexnet_ddp.doctor.findings import Finding, Level, shorten
from alexnet_ddp.doctor.port import why_busy
from alexnet_ddp.runtime.errors import ConfigError


def connect(mine: Facts, timeout_s: float) -> dist.Store:
    """Connect to torchrun's store; without torchrun, create a store in this process.

    Raises ConfigError if the port is busy, the store cannot be reached, or a second job uses it.
    """
    if "RANK" not in os.environ:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    is_host = mine.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    reason = why_busy(port) if is_host else None
    if reason is not None:
        raise ConfigError(
            f"MASTER_PORT={port} of {mine.host} cannot be used ({reason}); "
            "choose another MASTER_PORT, the same on every node"
        )
    timeout = timedelta(seconds=timeout_s)
    try:
        server = dist.TCPStore(address, port, None, is_host, timeout, wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise _only_here(
            f"{mine.name} cannot reach {_endpoint()} ({_reason(error)}); MASTER_ADDR and "
            "MASTER_PORT must name rank 0's host and a port that is open to all nodes"
        ) from error
    store = dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    if store.add(f"seen/{mine.rank}", 1) > 1:
        raise _only_here(
            f"rank {mine.rank} connected twice to {_endpoint()}: two jobs use one port; "
            "give one of them another port, or wait until the other has ended"
        )
    return store


def exchange_facts(
    store: dist.Store,
    mine: Facts,
    world_size: int,
    check: Callable[[list[Facts]], list[Finding]],
    timeout_s: float,
) -> tuple[list[Facts], list[Finding]]:
    """Collective. Return (the facts of all ranks on rank 0, else []; the findings of `check`).

    Only rank 0 reads all facts and runs `check`: N ranks that read N facts would send N^2 requests.
    Raises ConfigError that names the ranks that did not connect in time.
    """
    store.set(f"facts/{mine.rank}", json.dumps(asdict(mine)))
    keys = [f"facts/{rank}" for rank in range(world_size)]
    try:
        if mine.rank == 0:
            store.wait(keys, timedelta(seconds=timeout_s))
            all_facts = [Facts(**json.loads(store.get(key))) for key in keys]
            found = check(all_facts)
            store.set("findings", json.dumps([asdict(finding) for finding in found]))
            # The store may end with this process, so wait until the others have read the findings.
            with suppress(dist.DistError, RuntimeError):
                readers = [f"read/{rank}" for rank in range(1, world_size)]
                store.wait(readers, timedelta(seconds=timeout_s))
            return all_facts, found
        # Longer than rank 0 waits: it reports the missing ranks.
        store.wait(["findings"], timedelta(seconds=timeout_s + 5))
    except (dist.DistError, RuntimeError) as error:
        raise _timed_out(store, mine, keys, timeout_s) from error
    received = json.loads(store.get("findings"))
    store.set(f"read/{mine.rank}", "")
    return [], [Finding(**finding | {"level": Level(finding["level"])}) for finding in received]


def join_error(mine: Facts, error: Exception) -> ConfigError:
    """The error if all ranks reached the store, but cannot form a process group."""
    return _only_here(
        f"{mine.name} reached the store, but cannot join the process group ({_reason(error)}); "
        "open all TCP ports between the nodes, or name their common network in GLOO_SOCKET_IFNAME"
    )


def _timed_out(store: dist.Store, mine: Facts, keys: list[str], timeout_s: float) -> ConfigError:
    problem = "rank 0 did not answer at"
    if mine.rank == 0:
        missing = [f"rank {rank}" for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            problem = f"{shorten(missing)} of {len(keys)} did not connect to"
    return ConfigError(
        f"{problem} {_endpoint()} within {timeout_s:.0f} s; "
        "look at the output of those nodes, or give doctor a longer join_timeout_s"
    )


def _endpoint() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _reason(error: Exception) -> str:
    """The first line of an error, without the locations in torch's source."""
    return re.sub(r"\[/[^\]]*\] ?", "", str(error).splitlines()[0]).strip()[:160]


def _only_here(message: str) -> ConfigError:
    """An error that this rank must print, as no other rank knows it."""
    error = ConfigError(message)
    error.only_here = True
    return error
