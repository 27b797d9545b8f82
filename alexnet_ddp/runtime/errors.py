"""How a run can end, as exceptions: each carries its exit code, and its message is one line for the user.

A message says the value, the rule and the remedy. Anything else that is raised is a bug and keeps its trace.
"""

import os
import re
import sys
from pathlib import Path

from alexnet_ddp.runtime.printing import say


def speaks_for_all() -> bool:
    """True in the process that prints what concerns all ranks."""
    return os.environ.get("RANK", "") in ("", "0")


def write_exit_code(code: int) -> None:
    """Tell the launch script how this process ends: torchrun turns every code but 0 into 1.

    Local rank 0 speaks for its node; another rank only where it fails and nobody has spoken. Whoever lost a peer knows
    no reason: the one that the peer gave, full memory for instance, stands.
    """
    path = os.environ.get("ALEXNET_DDP_EXIT_CODE_FILE")
    if not path:
        return
    file, is_first = Path(path), os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        reason = (file.read_text().strip() if file.exists() else "").replace(
            str(PeerLost.exit_code), ""
        )
        if (is_first and code != PeerLost.exit_code) or (code and not reason):
            file.write_text(f"{code}\n")
    except OSError as error:  # the process still ends with its own code
        say(
            f"warning: {file} could not be written ({error.strerror}), so a launch script reports 1",
            sys.stderr,
        )


def was_asked_to_stop() -> bool:
    """False if a launch script runs this process and had no stop signal: torchrun ends it for another reason."""
    path = os.environ.get("ALEXNET_DDP_EXIT_CODE_FILE")
    return not path or os.path.exists(f"{path}.stop")


def write_start_step(step: int) -> None:
    """Tell the launch script that the run goes on from the checkpoint of `step`: its measure of progress."""
    path = os.environ.get("ALEXNET_DDP_START_FILE")
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(f"{step}\n")
        Path(os.environ["ALEXNET_DDP_EXIT_CODE_FILE"]).write_text(
            ""
        )  # of workers that torchrun has replaced by us


class RunError(Exception):
    """Base of the ends that a run can foresee. `exit_code` is what the process and status.json report."""

    exit_code = 1
    only_here = False  # raised on this rank alone, so this rank has to print it


class ConfigError(RunError, ValueError):
    """The configuration is wrong, or asks for what this machine cannot do."""

    exit_code = 64


class DataError(RunError, ValueError):
    """The data set is missing, inconsistent or unreadable."""

    exit_code = 65


class NoCheckpoint(RunError):
    """Checkpoints exist, but none is usable: a run never silently starts afresh."""

    exit_code = 66


class Diverged(RunError):
    """A loss or a gradient is not finite, or the replicas are not equal any more."""

    exit_code = 70


class CheckpointIOError(RunError):
    """Checkpoints could not be written three times in a row."""

    exit_code = 74


class MachineError(RunError):
    """A disk, a store or the memory is full or fails, or a worker process was lost: no image is to blame."""

    exit_code = 74


def out_of_memory(error: BaseException) -> MachineError | None:
    """What to end with where `error` is a failed allocation, of Python, numpy, torch's CPU allocator or a GPU's."""
    name, text = type(error).__name__, str(error)
    signs = r"can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory|could not create a memory"
    if (
        not isinstance(error, MemoryError)
        and name != "OutOfMemoryError"
        and not re.search(signs, text)
    ):
        return None
    found = re.search(r"allocate ([\d.]+) ?(bytes|[KMGT]i?B)", text)
    size = "more than there is" if found is None else f"{found[1]} {found[2]}"
    if found and found[2] == "bytes":
        size = f"{int(found[1]) / 1e6:,.1f} MB"
    remedy = "lower trainer.micro_batch_size, or start fewer processes on that node"
    shortage = MachineError(
        f"rank {os.environ.get('RANK', '0')} has no memory left: it asked for {size}; {remedy}"
    )
    shortage.only_here = True
    return shortage


class Preempted(RunError):
    """A stop signal arrived and the run was saved: start it again to go on."""

    exit_code = 75


class PeerLost(RunError):
    """A rank, or the way to it, is gone, or it hangs: start the run again."""

    exit_code = 76


class PeerFailed(RunError):
    """Another rank failed and says why; this one only leaves with it."""

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
