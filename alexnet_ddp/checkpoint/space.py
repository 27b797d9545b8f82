"""Is there room on the disk for the checkpoints of a run?"""

import logging
import shutil
from pathlib import Path

from alexnet_ddp.checkpoint import format as files
from alexnet_ddp.runtime.errors import CheckpointIOError

log = logging.getLogger(__name__)


def check_space(directory: Path, size: int, keep_last: int) -> None:
    """Room for a checkpoint of `size` bytes; a warning where there is none for all that are kept.

    Raises CheckpointIOError.
    """
    free, keeps = free_bytes(directory), keep_last + 2  # the best one, and the one being written
    if free < size:
        rule = f"{directory.parent} has {free / 1e6:,.0f} MB free, a checkpoint needs {size / 1e6:,.0f} MB"
        raise CheckpointIOError(f"{rule}; make room, or choose another run.root")
    there = sum(f.stat().st_size for d in files.listed(directory) for f in d.iterdir())
    if free + there < keeps * size:
        rule = f"checkpoint.keep_last={keep_last} takes up to {keeps * size / 1e6:,.0f} MB"
        log.warning(
            "%s, and %s has room for %s MB", rule, directory, f"{(free + there) / 1e6:,.0f}"
        )


def free_bytes(directory: Path) -> int:
    """Bytes, of the file system that holds `directory`, which need not exist yet."""
    there = next(d for d in (directory, *directory.parents) if d.exists())
    return shutil.disk_usage(there).free
