"""The command line that trains a run again, with as many processes as it had."""

import shlex
from collections.abc import Mapping
from typing import Any

from alexnet_ddp.runtime.run_record import RunRecord


def command_of(run: RunRecord, name: str | None = None) -> str:
    """A command line that repeats the run under another name, which is NAME-again by default.

    Of a run on several nodes it is to be started on each of them, with one of them as HOST. "" if
    the run has recorded no command line. Raises ConfigError if its record cannot be read.
    """
    if "overrides" not in run.facts:
        return ""
    overrides = [str(one) for one in run.facts["overrides"]]
    kept = [one for one in overrides if not one.lstrip("+").startswith(("run.name=", "run.root="))]
    again = name or f"{run.directory.name}-again"
    module = ["-m", "alexnet_ddp.train", *_config_dir_arguments(run.facts)]
    words = [*_launcher(run.facts, again), *module, *kept, f"run.name={again}"]
    return shlex.join(words)


def _launcher(known: Mapping[str, Any], name: str) -> list[str]:
    """The program that starts as many ranks as those of a start of a run. name: of the new run.

    If the nodes had different numbers of ranks, each gets the number of the first.
    """
    num_ranks = known.get("world_size", 1)
    num_nodes = known.get("num_nodes", 1)  # not recorded by older versions
    if num_ranks == 1:
        return ["python"]
    if num_nodes == 1:
        return ["torchrun", f"--nproc_per_node={num_ranks}"]
    nodes = [f"--nnodes={num_nodes}", f"--nproc_per_node={known['local_world_size']}"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29500", f"--rdzv-id={name}"]
    return ["torchrun", *nodes, *rendezvous]


def _config_dir_arguments(known: Mapping[str, Any]) -> list[str]:
    """--config-dir of the command line of a start; empty if it was not given."""
    command_line, found = [str(word) for word in known.get("command", [])], list[str]()
    for word, following in zip(command_line, [*command_line[1:], ""]):
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            found = ["--config-dir", value if equals else following]
    return found
