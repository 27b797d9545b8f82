"""Pack images into shuffled, verified shards, on one machine or on Spark.

    python -m alexnet_ddp.prepare source=/data/imagenet root=/data/shards
    python -m alexnet_ddp.prepare action=inspect root=/data/shards

Read `prepare` top to bottom: list, plan, write, verify, commit.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

from alexnet_ddp.config import Action, ConfigError, LocalEngineConfig, PrepareConfig, Split
from alexnet_ddp.data.sources.classes import (
    NAME,
    class_difference,
    numeric_order_note,
    read_order,
    same_looking,
)
from alexnet_ddp.data.sources.scan import listed
from alexnet_ddp.data.sources.shard_index import ShardIndex, read_index
from alexnet_ddp.data.storage import SCRATCH, Storage, absolute
from alexnet_ddp.prepare import report
from alexnet_ddp.prepare.checks import bytes_needed, check_places, check_room, claimed
from alexnet_ddp.prepare.commit import commit, damaged_files, quarantine_lines, withdraw
from alexnet_ddp.prepare.engine import Engine, local_engine, watched
from alexnet_ddp.prepare.plan import Plan, ShardTask, make_plan
from alexnet_ddp.prepare.report import verify
from alexnet_ddp.prepare.sources import open_source, splits_of
from alexnet_ddp.prepare.write import is_intact, read_quarantine, read_sidecar, write_shard
from alexnet_ddp.runtime.errors import DataError, MachineError, Preempted
from alexnet_ddp.runtime.startup import STOP_SIGNALS

log = logging.getLogger("alexnet_ddp")


def main(cfg: PrepareConfig, overrides: list[str]) -> None:
    with _foreseen_ends():
        match cfg.action:
            case Action.prepare:
                prepare(cfg)
            case Action.inspect:
                report.inspect(absolute(cfg.root))
            case Action.verify:
                verify(absolute(cfg.root), _engine(cfg))
            case Action.stats:
                report.stats(absolute(cfg.root))
            case Action.diff:
                report.diff(absolute(cfg.root), absolute(cfg.other))
            case Action.sheet:
                from alexnet_ddp.prepare.sheet import sheet

                sheet(cfg)


def prepare(cfg: PrepareConfig) -> None:
    """Each split in turn: list, plan, write what is missing, verify, commit."""
    root = absolute(cfg.root)
    check_places(absolute(cfg.source), root, cfg.engine)
    order = read_order(cfg.class_order)
    plans = [
        make_plan(cfg, root, split, open_source(cfg.source, split, order)) for split in _splits(cfg)
    ]
    _check_classes(plans, read_index(Storage(root)))
    _warn_of_names(cfg, plans[0].source.classes)
    for plan in plans:
        _check_replaceable(plan, cfg)
    works = [(plan, list(plan.tasks())) for plan in plans]
    missing = [
        task for _, tasks in works for task in tasks if read_sidecar(Storage(root), task) is None
    ]
    check_room(Storage(root), missing)
    if cfg.dry_run:
        _say_what_would_be_done(works, missing)
        return
    engine = _engine(cfg)
    with claimed(Storage(root)):
        for plan, tasks in works:
            _pack(plan, tasks, cfg, engine)
    report.summary(root)


def _pack(plan: Plan, tasks: list[ShardTask], cfg: PrepareConfig, engine: Engine) -> None:
    root = Storage(plan.root)
    root.remove(SCRATCH)  # drafts of a run that was killed
    _forget_others(root, plan)
    done = _written_before(root, plan, tasks, cfg, engine)
    pending = [task for task in tasks if task.shard not in done]
    log.info(
        "%s: %s; %d shards to write, %d are there",
        plan.split,
        _headline(plan),
        len(pending),
        len(done),
    )
    quarantined = sum(found["quarantined"] for found in done.values())
    if not pending and _is_committed(root, plan.split, cfg.verify):
        return
    withdraw(root, plan.split)
    _check_quarantine(quarantined, plan, tasks, cfg)
    try:
        with closing(watched(engine, write_shard, pending, f"packing {plan.split}")) as summaries:
            for summary in summaries:
                quarantined += summary["quarantined"]
                _check_quarantine(quarantined, plan, tasks, cfg)
    finally:
        root.remove(SCRATCH)  # the workers are gone
    commit(plan, tasks)


def _written_before(
    root: Storage, plan: Plan, tasks: list[ShardTask], cfg: PrepareConfig, engine: Engine
) -> dict[int, dict]:
    """Summaries of the shards that need not be written (again). The sidecars of all others are removed."""
    done = {task.shard: found for task in tasks if (found := read_sidecar(root, task)) is not None}
    if cfg.retry_quarantined:
        done = {shard: found for shard, found in done.items() if not found["quarantined"]}
    if cfg.verify and done:
        there = [tasks[shard] for shard in done]
        for found in watched(engine, is_intact, there, f"verifying {plan.split}"):
            if not found["intact"]:
                log.warning(
                    "%s is not what was written: writing it again",
                    root.path(tasks[found["shard"]].stem),
                )
                del done[found["shard"]]
    for task in tasks:
        if task.shard not in done:
            root.remove(f"{task.sidecar}.json")
    return done


def _is_committed(root: Storage, split: str, read: bool) -> bool:
    index = read_index(root)
    if index is None or split not in index.splits:
        return False
    damaged = damaged_files(root, index, split, read)
    for name in damaged:
        log.warning("%s is not what was written: writing it again", root.path(name))
    return not damaged


def _splits(cfg: PrepareConfig) -> list[str]:
    if cfg.split is not Split.all:
        return [cfg.split.value]
    there = splits_of(cfg.source)
    if len(there) == 1:
        other = "val" if there == ["train"] else "train"
        log.warning(
            "%s holds no %s images: only %s is packed; training needs both",
            cfg.source,
            other,
            there[0],
        )
    return there


def _say_what_would_be_done(
    works: list[tuple[Plan, list[ShardTask]]], missing: list[ShardTask]
) -> None:
    for plan, tasks in works:
        todo = [task for task in missing if task.split == plan.split]
        needed = bytes_needed(todo)
        size = "" if needed is None else f", {needed / 1e9:,.2f} GB"
        there = len(tasks) - len(todo)
        log.info(
            "%s: %s; %d shards to write%s, %d are there",
            plan.split,
            _headline(plan),
            len(todo),
            size,
            there,
        )
    log.info("dry_run=true: nothing was written to %s", works[0][0].root)


def _engine(cfg: PrepareConfig) -> Engine:
    match cfg.engine:
        case LocalEngineConfig():
            return local_engine(cfg.engine.workers)
        case _:
            from alexnet_ddp.prepare.spark import choose_engine

            return choose_engine(cfg)


def _check_quarantine(count: int, plan: Plan, tasks: list[ShardTask], cfg: PrepareConfig) -> None:
    if count > cfg.max_quarantine:
        root, name = Storage(plan.root), f"{plan.split}.quarantine.jsonl"
        root.write(
            name, quarantine_lines([row for task in tasks for row in read_quarantine(root, task)])
        )
        raise DataError(
            f"{count} images of {plan.split} are bad, max_quarantine is {cfg.max_quarantine}: they were not committed. "
            f"Their names are in {root.path(name)}; mend them and start again with retry_quarantined=true, or allow "
            f"more with max_quarantine={count * 2}"
        )


def _check_classes(plans: list[Plan], index: ShardIndex | None) -> None:
    """The labels of all splits must mean the same."""
    first = plans[0].source.classes
    for plan in plans[1:]:
        differ = class_difference(
            plans[0].split, first, plan.split, plan.source.classes, "add or remove them"
        )
        if differ:
            raise DataError(
                f"{plans[0].split} and {plan.split} must have the same classes, but {differ}"
            )
    others = ", ".join(sorted(set(index.splits) - {plan.split for plan in plans})) if index else ""
    if others and index.classes != first:
        differ = class_difference(f"{others} there", index.classes, "the source", first)
        remedy = (
            "give another root"
            if differ
            else "give another root, or the class_order of those shards"
        )
        what = "other classes" if differ else "another class order"
        detail = f" ({differ})" if differ else ""
        raise DataError(f"{plans[0].root} holds {others} shards of {what}; {remedy}{detail}")


def _warn_of_names(cfg: PrepareConfig, classes: list[str]) -> None:
    note = numeric_order_note(classes) if cfg.class_order == NAME else None
    if note:
        log.warning("%s; for that order give class_order=numeric", note)
    twins = same_looking(classes)
    if twins:
        log.warning(
            "several classes are named %s, in different Unicode forms: are they one class?",
            listed(twins),
        )


def _check_replaceable(plan: Plan, cfg: PrepareConfig) -> None:
    index = read_index(Storage(plan.root))
    entry = index.splits.get(plan.split) if index else None
    if entry is not None and not _same(plan, entry) and not cfg.overwrite:
        differ = ", ".join(report.differences(plan.identity, entry))
        raise ConfigError(
            f"{plan.root} holds {plan.split} shards that were made otherwise ({differ}); give another root, or "
            "replace them with overwrite=true"
        )


def _same(plan: Plan, entry: dict[str, Any]) -> bool:
    return all(entry.get(name) == value for name, value in plan.identity.items())


def _forget_others(root: Storage, plan: Plan) -> None:
    """Shards of another plan have the same names: neither the index nor sidecars may vouch for ours."""
    index = read_index(root)
    if (
        index is not None
        and plan.split in index.splits
        and not _same(plan, index.splits[plan.split])
    ):
        withdraw(root, plan.split)
    for folder in root.folders("_state"):
        if folder.startswith(f"{plan.split}-") and f"_state/{folder}" != plan.state():
            root.remove(f"_state/{folder}")


def _headline(plan: Plan) -> str:
    return f"{len(plan.source):,} images of {len(plan.source.classes):,} classes in {plan.num_shards:,} shards"


@contextmanager
def _foreseen_ends() -> Iterator[None]:
    """A stop signal and a failing disk end it with one line. A second signal does not disturb the end of the first."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup's
                signal.signal(number, stop)
        yield
    except KeyboardInterrupt:
        raise Preempted("stopped; what is written stays, and the same command goes on") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise MachineError(
            f"{where}{error.strerror or error}; mend it, and the same command goes on"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
