"""The ranks meet at the store before they join a group: who is missing is then told, not waited for.

gloo on a wrong interface, or a rank that never came, would show as a hang and an error that names nobody.
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
from alexnet_ddp.doctor.findings import Finding, Level, shortened
from alexnet_ddp.doctor.port import why_busy
from alexnet_ddp.runtime.errors import ConfigError


def meet(mine: Facts, timeout_s: float) -> dist.Store:
    """torchrun's store, or one of this process without torchrun. Raises ConfigError where it cannot be had."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    hosts_it = mine.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    reason = why_busy(port) if hosts_it else None
    if reason is not None:
        remedy = "choose another MASTER_PORT, the same on every node"
        raise ConfigError(f"MASTER_PORT={port} of {mine.host} cannot be had ({reason}); {remedy}")
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, None, hosts_it, timeout, wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        remedy = "MASTER_ADDR and MASTER_PORT must name rank 0's host and a port that is open to all nodes"
        raise _mine(
            ConfigError(f"{mine.who} does not reach {_place()} ({_why(error)}); {remedy}")
        ) from error
    store = dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if store.add(f"seen/{mine.rank}", 1) > 1:
        remedy = "give one of them another port, or wait until the other has ended"
        raise _mine(
            ConfigError(
                f"rank {mine.rank} came twice to {_place()}: two jobs have one port; {remedy}"
            )
        )
    return store


def judge_together(
    store: dist.Store,
    mine: Facts,
    world_size: int,
    judge: Callable[[list[Facts]], list[Finding]],
    timeout_s: float,
) -> tuple[list[Facts], list[Finding]]:
    """Collective. The facts of all ranks, on rank 0, and what judge(these) found, on every rank.

    Raises ConfigError, naming who did not come. Rank 0 reads and judges alone: a thousand ranks that read a thousand
    facts would ask the store a million times.
    """
    store.set(f"facts/{mine.rank}", json.dumps(asdict(mine)))
    keys = [f"facts/{rank}" for rank in range(world_size)]
    try:
        if mine.rank == 0:
            store.wait(keys, timedelta(seconds=timeout_s))
            everyone = [Facts(**json.loads(store.get(key))) for key in keys]
            found = judge(everyone)
            store.set("findings", json.dumps([asdict(finding) for finding in found]))
            with suppress(
                dist.DistError, RuntimeError
            ):  # the store may end with us: not before they read
                store.wait(
                    [f"read/{rank}" for rank in range(1, world_size)], timedelta(seconds=timeout_s)
                )
            return everyone, found
        store.wait(
            ["findings"], timedelta(seconds=timeout_s + 5)
        )  # rank 0 tells who is missing, and needs time to
    except (dist.DistError, RuntimeError) as error:
        missing = [
            f"rank {rank}"
            for rank, key in enumerate(keys)
            if mine.rank == 0 and not store.check([key])
        ]
        who = (
            f"{shortened(missing)} of {world_size} did not come"
            if missing
            else "rank 0 did not answer"
        )
        remedy = "look at the output of those nodes, or give doctor a longer join_timeout_s"
        raise ConfigError(f"{who} to {_place()} within {timeout_s:.0f} s; {remedy}") from error
    told = json.loads(store.get("findings"))
    store.set(f"read/{mine.rank}", "")
    return [], [Finding(**finding | {"verdict": Level(finding["verdict"])}) for finding in told]


def cannot_join(mine: Facts, error: Exception) -> ConfigError:
    """What to say where all ranks met at the store, but their group does not come about."""
    remedy = "open all TCP ports between the nodes, or name the network that joins them in GLOO_SOCKET_IFNAME"
    return _mine(
        ConfigError(f"{mine.who} met the others, but cannot join them ({_why(error)}); {remedy}")
    )


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _why(error: Exception) -> str:
    """The first line, without the places in torch's source."""
    return re.sub(r"\[/[^\]]*\] ?", "", str(error).splitlines()[0]).strip()[:160]


def _mine(error: ConfigError) -> ConfigError:
    """Said by the rank that raises it: nobody else can."""
    error.only_here = True
    return error
