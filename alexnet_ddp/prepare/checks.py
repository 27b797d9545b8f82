"""Checks of a preparation before anything is written, and the lock on its root."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.prepare import Encoding, EngineConfig, PrepareConfig, WorkersConfig
from alexnet_ddp.data.sources.classes import (
    NAME,
    class_difference,
    numeric_order_note,
    same_looking,
)
from alexnet_ddp.data.sources.shard_index import ShardIndex, read_index
from alexnet_ddp.data.sources.shards import NPY_HEADER
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.prepare.plan import Plan, ShardTask
from alexnet_ddp.prepare.report import differences
from alexnet_ddp.prepare.sources import WHOLE
from alexnet_ddp.runtime.errors import DataError, MachineError
from alexnet_ddp.runtime.files import free_bytes, lock_file
from alexnet_ddp.runtime.printing import listed

log = logging.getLogger(__name__)

_BLOCK = 512  # bytes of a tar block: an image takes three, and its own bytes rounded up to blocks


def check_places(source: str, root: str, engine: EngineConfig) -> None:
    """Raise ConfigError if `root` cannot be written to, or not without damage to `source`."""
    # Shards in the source would be listed as images, or replace them.
    if os.path.realpath(source) == os.path.realpath(root):
        raise ConfigError(f"root ({root}) must not be the source itself; give another directory")
    for name, place in (("source", source), ("root", root)):
        if os.path.isfile(place):
            raise ConfigError(f"{name} ({place}) is a file; give a directory or a URL")
    is_one_process = isinstance(engine, WorkersConfig) and engine.workers == 1
    for place in (source, root):
        if place.startswith("memory://") and not is_one_process:
            raise ConfigError(
                f"{place} is in the memory of this process, which workers cannot read; "
                "use engine.workers=1"
            )


def check_classes(plans: list[Plan], index: ShardIndex | None) -> None:
    """Raise DataError unless a label means the same class in every split, old and new.

    index: of the shards that exist in root, or None.
    """
    first = plans[0].source.classes
    for plan in plans[1:]:
        differ = class_difference(
            plans[0].split, first, plan.split, plan.source.classes, "add or remove them"
        )
        if differ:
            raise DataError(
                f"{plans[0].split} and {plan.split} must have the same classes, but {differ}"
            )
    if index is None or index.classes == first:
        return
    others = ", ".join(sorted(set(index.splits) - {plan.split for plan in plans}))
    if not others:
        return
    shards = f"{plans[0].root} contains {others} shards"
    differ = class_difference(f"{others} there", index.classes, "the source", first)
    if differ:
        raise DataError(f"{shards} of other classes; give another root ({differ})")
    raise DataError(
        f"{shards} of another class order; give another root, or the class_order of those shards"
    )


def warn_about_names(cfg: PrepareConfig, classes: list[str]) -> None:
    """Warn about class names whose order or spelling is probably not what the user expects."""
    note = numeric_order_note(classes) if cfg.class_order == NAME else None
    if note:
        log.warning("%s; for that order give class_order=numeric", note)
    twins = same_looking(classes)
    if twins:
        log.warning(
            "several classes are named %s, in different Unicode forms: are they one class?",
            listed(twins),
        )


def check_replaceable(plan: Plan, cfg: PrepareConfig) -> None:
    """Raise ConfigError if root contains different shards and overwrite=true was not given."""
    index = read_index(Storage(plan.root))
    entry = index.splits.get(plan.split) if index else None
    if entry is not None and not is_same(plan, entry) and not cfg.overwrite:
        differ = ", ".join(differences(plan.identity, entry))
        raise ConfigError(
            f"{plan.root} contains {plan.split} shards of another plan ({differ}); "
            "give another root, or replace them with overwrite=true"
        )


def check_other_divisions(plans: list[Plan]) -> None:
    """Raise ConfigError if root keeps a split that val_fraction divided from images of `plans`.

    The images of that split would be in both splits.
    """
    root = Storage(plans[0].root)
    index = read_index(root)
    packed = {plan.split for plan in plans}
    planned = {name for plan in plans for name in plan.source.names}
    for split, entry in {} if index is None else index.splits.items():
        fraction = entry.get("val_fraction")
        if split in packed or fraction is None:
            continue
        common = sum(name in planned for name in _names(root, split))
        if common:
            rule = f"the {split} shards in root ({root.root}) are a part of a division"
            raise ConfigError(
                f"{rule} (val_fraction={fraction}), and {common:,} of their images are in the "
                f"source too; give val_fraction={fraction}, or another root"
            )


def is_divided(index: ShardIndex | None) -> bool:
    """True if val_fraction divided the images of a split in `index`."""
    entries = [] if index is None else index.splits.values()
    return any(entry.get("val_fraction") is not None for entry in entries)


def _names(root: Storage, split: str) -> list[str]:
    """CLASS/FILE of each image in the shards of a split."""
    return root.read(f"{split}.names.txt").decode(errors="surrogateescape").split("\n")[:-1]


def is_same(plan: Plan, entry: dict[str, Any]) -> bool:
    """True if the split `entry` of an index was made by an equal plan."""
    return all(entry.get(name) == value for name, value in plan.identity.items())


@contextmanager
def locked(root: Storage) -> Iterator[None]:
    """Lock `root` against other preparations on this machine. URLs cannot be locked.

    Raises MachineError if another preparation holds the lock.
    """
    if not root.is_local:
        yield
        return
    os.makedirs(root.root, exist_ok=True)
    folder = os.open(root.root, os.O_RDONLY)
    try:
        try:
            if not lock_file(folder):
                raise MachineError(
                    f"another preparation is writing to {root.root}; wait for it, or give another "
                    "root"
                )
        except OSError as error:  # some network file systems cannot lock folders
            log.warning(
                "%s cannot be locked (%s): do not start another preparation with this root",
                root.root,
                error.strerror,
            )
        yield
    finally:
        os.close(folder)


def bytes_needed(tasks: Iterable[ShardTask]) -> int | None:
    """Upper bound of the bytes of all shards of `tasks`; None if it depends on the compression."""
    total = 0
    for task in tasks:
        recipe = task.recipe
        if recipe.encoding is Encoding.raw:
            assert recipe.size is not None  # it is set for raw images
            sizes: Iterable[int] = [NPY_HEADER + recipe.size**2 * 3] * task.images
        elif recipe.keep_original and recipe.shorter_side is None and task.offsets[0] != WHOLE:
            sizes = task.sizes  # a folder's images may not be JPEGs, and grow when converted
        else:
            return None
        total += sum(3 * _BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)
    return total


def check_free_space(root: Storage, tasks: list[ShardTask]) -> None:
    """Raise MachineError if the disk of `root` is known to be too small for `tasks`."""
    needed = bytes_needed(tasks)
    if not needed or not root.is_local:
        return
    free = free_bytes(Path(root.root))
    if free < needed:
        raise MachineError(
            f"{root.root} has {free / 1e9:,.2f} GB free, the {len(tasks):,} shards to write need "
            f"{needed / 1e9:,.2f}; free some space, or give another root"
        )
