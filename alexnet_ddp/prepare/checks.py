"""Before anything is written: a root is one preparation's at a time, and must have room for what will come."""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alexnet_ddp.config import ConfigError, Encoding, EngineConfig
from alexnet_ddp.data.sources.shards import NPY_HEADER
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.plan import ShardTask
from alexnet_ddp.prepare.sources import WHOLE
from alexnet_ddp.runtime.errors import MachineError

log = logging.getLogger(__name__)

_BLOCK = 512  # bytes of a tar: an image is three of them and its own, filled up


def check_places(source: str, root: str, engine: EngineConfig) -> None:
    """Raises ConfigError where root could not be written to, or not without harm."""
    if os.path.realpath(source) == os.path.realpath(
        root
    ):  # shards would be taken for images, or replace them
        raise ConfigError(f"root ({root}) must not be the source itself; give another directory")
    for name, place in (("source", source), ("root", root)):
        if os.path.isfile(place):
            raise ConfigError(f"{name} ({place}) is a file; give a directory or a URL")
    for place in (source, root):
        if place.startswith("memory://") and getattr(engine, "workers", None) != 1:
            raise ConfigError(
                f"{place} is in the memory of this process, which workers do not see; use engine.workers=1"
            )


@contextmanager
def claimed(root: Storage) -> Iterator[None]:
    """Raises MachineError where another preparation of this machine is at work in root. URLs cannot be claimed."""
    if not root.is_local:
        yield
        return
    os.makedirs(root.root, exist_ok=True)
    folder = os.open(root.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "wait for it, or give another root"
            raise MachineError(f"another preparation is at work in {root.root}; {rule}") from None
        except OSError as error:  # a network file system that cannot lock folders
            log.warning(
                "%s cannot be locked (%s): start no other preparation in it",
                root.root,
                error.strerror,
            )
        yield
    finally:
        os.close(folder)


def bytes_needed(tasks: Iterable[ShardTask]) -> int | None:
    """What the shards of `tasks` take, at most; None where that depends on how well the images compress."""
    total = 0
    for task in tasks:
        recipe = task.recipe
        if recipe.encoding is Encoding.raw:
            sizes: Iterable[int] = [NPY_HEADER + recipe.size**2 * 3] * task.images
        elif recipe.keep_original and recipe.shorter_side is None and task.offsets[0] != WHOLE:
            sizes = task.sizes  # an image in another format than JPEG may grow
        else:
            return None
        total += sum(3 * _BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)
    return total


def check_room(root: Storage, tasks: list[ShardTask]) -> None:
    """Raises MachineError where the disk of root cannot hold the shards of `tasks`, as far as that can be said."""
    needed = bytes_needed(tasks)
    if not needed or not root.is_local:
        return
    there = next(path for path in (Path(root.root), *Path(root.root).parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MachineError(
            f"{root.root} has {free / 1e9:,.2f} GB free, the {len(tasks):,} shards to write need {needed / 1e9:,.2f}; "
            "make room, or give another root"
        )
