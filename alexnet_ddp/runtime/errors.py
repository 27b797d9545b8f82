"""Exceptions for the foreseen ends of a run, each with an exit code and a one-line message.

A message contains the value, the rule and the remedy. Any other exception is a bug and is shown
with its trace.
"""

import os
import re
import sys
from pathlib import Path

from alexnet_ddp.runtime.printing import say


def is_rank_zero() -> bool:
    """Return whether this process is rank 0, which prints what concerns all ranks."""
    return os.environ.get("RANK", "") in ("", "0")


def write_exit_code(code: int) -> None:
    """Write the exit code to the launch script's file, because torchrun turns all but 0 into 1.

    Local rank 0 writes the code of its node. Another rank writes only a failure, and only if there
    is no code yet. A lost-peer code never overwrites a more specific one.
    """
    path = os.environ.get("ALEXNET_DDP_EXIT_CODE_FILE")
    if not path:
        return
    file = Path(path)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    lost_peer = PeerLost.exit_code
    try:
        written = file.read_text().strip() if file.exists() else ""
        has_reason = written not in ("", str(lost_peer))
        if (is_first and code != lost_peer) or (code and not has_reason):
            file.write_text(f"{code}\n")
    except OSError as error:  # the process still ends with its own code
        say(
            f"warning: {file} could not be written ({error.strerror}), "
            "so a launch script reports 1",
            sys.stderr,
        )


def was_asked_to_stop() -> bool:
    """Return whether a stop was requested from outside, as far as this process can know.

    False if a launch script runs this process and received no stop signal: then torchrun ends the
    process for another reason.
    """
    path = os.environ.get("ALEXNET_DDP_EXIT_CODE_FILE")
    return not path or os.path.exists(f"{path}.stop")


def write_start_step(step: int) -> None:
    """Write the step at which this run starts, from which the launch script measures progress."""
    path = os.environ.get("ALEXNET_DDP_START_FILE")
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(f"{step}\n")
        # Remove the exit code of workers that torchrun has replaced with this process.
        Path(os.environ["ALEXNET_DDP_EXIT_CODE_FILE"]).write_text("")


class RunError(Exception):
    """Base class of foreseen ends. The process and status.json report `exit_code`."""

    exit_code = 1
    only_here = False  # raised on this rank alone, so this rank must print it


class ConfigError(RunError, ValueError):
    """The configuration is invalid, or requires something that this machine lacks."""

    exit_code = 64


class DataError(RunError, ValueError):
    """The data set is missing, inconsistent or unreadable."""

    exit_code = 65


class NoCheckpoint(RunError):
    """A checkpoint is needed, and none is usable. A run never silently starts from scratch."""

    exit_code = 66


class Diverged(RunError):
    """A loss, a gradient or an output is not finite, or the replicas are no longer equal."""

    exit_code = 70


class WrongExport(RunError):
    """An exported model cannot be run, or computes other results than the model of the run."""

    exit_code = 70


class CheckpointIOError(RunError):
    """The last checkpoint of a run, or three in a row, could not be written."""

    exit_code = 74


class MachineError(RunError):
    """A disk, a store or the memory is full or fails, or a worker process was lost."""

    exit_code = 74


def code_for_caller(code: int) -> int:
    """Return the code to exit with: 0 for a stopped run that the sweep agent of wandb started.

    The agent counts a code above 0 as a failure, and ends after a few. A launch script translates
    the code itself.
    """
    is_stop = code in (Preempted.exit_code, StoppedByService.exit_code)
    by_agent = os.environ.get("WANDB_SWEEP_ID") and "ALEXNET_DDP_EXIT_CODE_FILE" not in os.environ
    return 0 if is_stop and by_agent else code


_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory"
    r"|could not create a memory|could not (create|execute) a primitive(?! descriptor)"  # oneDNN
)


def out_of_memory(error: BaseException) -> MachineError | None:
    """Return the error to end with if `error` is a failed allocation, else None.

    It recognises the errors of Python, numpy, and torch's allocators for CPU and GPU.
    """
    text = str(error)
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_memory and not _NO_MEMORY.search(text):
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
    """A stop signal arrived and the run was saved. Start it again to continue."""

    exit_code = 75


class StoppedByService(RunError):
    """A service such as wandb asked the run to stop for good. It was saved; nothing restarts it."""

    exit_code = 79


class PeerLost(RunError):
    """A rank, or the connection to it, was lost, or a rank hangs. Start the run again."""

    exit_code = 76


class TrialsFailed(RunError):
    """No trial of a sweep has a result. The exit code is that of the first trial."""

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class PeerFailed(RunError):
    """Another rank failed, and this rank ends with it. The message is the other rank's."""

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


# After these codes launch/common.sh does not start the run again.
FINAL_CODES = (
    0,
    ConfigError.exit_code,
    DataError.exit_code,
    NoCheckpoint.exit_code,
    Diverged.exit_code,
    MachineError.exit_code,
    Preempted.exit_code,
    StoppedByService.exit_code,
)
