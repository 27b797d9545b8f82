"""Packs images into shuffled, verified shards, on one machine or on Spark.

    python -m alexnet_ddp.prepare source=/data/imagenet root=/data/shards
    python -m alexnet_ddp.prepare action=inspect root=/data/shards

Read `prepare` top to bottom: list, plan, write, verify, commit.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType

from alexnet_ddp.config.prepare import Action, LocalEngineConfig, PrepareConfig, Split
from alexnet_ddp.data.sources.classes import read_order
from alexnet_ddp.data.sources.shard_index import read_index
from alexnet_ddp.data.storage import SCRATCH, Storage, absolute
from alexnet_ddp.prepare import report
from alexnet_ddp.prepare.checks import (
    bytes_needed,
    check_classes,
    check_free_space,
    check_other_divisions,
    check_places,
    check_replaceable,
    is_divided,
    is_same,
    locked,
    warn_about_names,
)
from alexnet_ddp.prepare.commit import (
    commit,
    damaged_files,
    quarantine_lines,
    remove_temporary_files,
    withdraw,
)
from alexnet_ddp.prepare.engine import Engine, local_engine, with_progress
from alexnet_ddp.prepare.plan import Plan, ShardTask, make_plan
from alexnet_ddp.prepare.sources import Source, divided_source, open_source, splits_of
from alexnet_ddp.prepare.tables import COPIES
from alexnet_ddp.prepare.write import is_intact, read_quarantine, read_sidecar, write_shard
from alexnet_ddp.runtime.errors import DataError, MachineError, Preempted
from alexnet_ddp.runtime.startup import STOP_SIGNALS, ignore_stop_signals

log = logging.getLogger("alexnet_ddp")


def main(cfg: PrepareConfig, overrides: list[str]) -> None:
    """Run cfg.action. Raises ConfigError, DataError, MachineError or Preempted."""
    with _stops_and_disk_errors():
        match cfg.action:
            case Action.prepare:
                prepare(cfg)
            case Action.inspect:
                report.inspect(absolute(cfg.root))
            case Action.verify:
                report.verify(absolute(cfg.root), _engine(cfg))
            case Action.stats:
                report.stats(absolute(cfg.root))
            case Action.diff:
                assert cfg.other is not None  # action=diff requires it
                report.diff(absolute(cfg.root), absolute(cfg.other))
            case Action.sheet:
                from alexnet_ddp.prepare.sheet import sheet

                sheet(cfg)


def prepare(cfg: PrepareConfig) -> None:
    """Pack each split: list the images, plan the shards, write the missing ones, verify, commit."""
    root, source = absolute(cfg.root), cfg.source
    assert source is not None  # action=prepare requires it
    check_places(absolute(source), root, cfg.engine)
    sources = _sources(cfg, source, root)
    plans = [make_plan(cfg, root, split, found) for split, found in sources.items()]
    check_classes(plans, read_index(Storage(root)))
    warn_about_names(cfg, plans[0].source.classes)
    for plan in plans:
        check_replaceable(plan, cfg)
    check_other_divisions(plans)
    work = [(plan, list(plan.tasks())) for plan in plans]
    missing = [
        task for _, tasks in work for task in tasks if read_sidecar(Storage(root), task) is None
    ]
    check_free_space(Storage(root), missing)
    if cfg.dry_run:
        _log_dry_run(work, missing)
        return
    engine = _engine(cfg)
    with locked(Storage(root)):
        if cfg.val_fraction is not None or is_divided(read_index(Storage(root))):
            for plan in plans:  # parts of two divisions have images in common
                _forget_others(Storage(root), plan)
        for plan, tasks in work:
            _pack(plan, tasks, cfg, engine)
    report.summary(root)


def _sources(cfg: PrepareConfig, source: str, root: str) -> dict[str, Source]:
    """Return the images of each split to pack."""
    order = read_order(cfg.class_order)
    if cfg.val_fraction is not None:
        return divided_source(source, cfg.val_fraction, order, root)
    splits = [cfg.split.value] if cfg.split is not Split.all else _splits_of(source)
    return {split: open_source(source, split, order, root) for split in splits}


def _pack(plan: Plan, tasks: list[ShardTask], cfg: PrepareConfig, engine: Engine) -> None:
    root = Storage(plan.root)
    root.remove(SCRATCH)  # temporary files of a process that was killed
    _forget_others(root, plan)
    done = _written_before(root, plan, tasks, cfg, engine)
    pending = [task for task in tasks if task.shard not in done]
    log.info(
        "%s: %s; %d shards to write, %d exist",
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
    if pending and plan.source.copy is not None:
        plan.source.copy()
    try:
        with closing(
            with_progress(engine, write_shard, pending, f"packing {plan.split}")
        ) as summaries:
            for summary in summaries:
                quarantined += summary["quarantined"]
                _check_quarantine(quarantined, plan, tasks, cfg)
    finally:
        remove_temporary_files(root)
    commit(plan, tasks)
    root.remove(COPIES)


def _written_before(
    root: Storage, plan: Plan, tasks: list[ShardTask], cfg: PrepareConfig, engine: Engine
) -> dict[int, dict]:
    """Return the summaries of the valid shards, by number. Removes the sidecars of the others."""
    done = {task.shard: found for task in tasks if (found := read_sidecar(root, task)) is not None}
    if cfg.retry_quarantined:
        done = {shard: found for shard, found in done.items() if not found["quarantined"]}
    if cfg.verify and done:
        existing = [tasks[shard] for shard in done]
        for found in with_progress(engine, is_intact, existing, f"verifying {plan.split}"):
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


def _splits_of(source: str) -> list[str]:
    """The splits that `source` has. Warns if one is missing."""
    there = splits_of(source)
    if len(there) == 1:
        other = "val" if there == ["train"] else "train"
        remedy = "; val_fraction=0.15 divides it" if other == "val" else ""
        log.warning(
            "%s contains no %s images: only %s is packed; training needs both%s",
            source,
            other,
            there[0],
            remedy,
        )
    return there


def _log_dry_run(work: list[tuple[Plan, list[ShardTask]]], missing: list[ShardTask]) -> None:
    for plan, tasks in work:
        todo = [task for task in missing if task.split == plan.split]
        needed = bytes_needed(todo)
        size = "" if needed is None else f", {needed / 1e9:,.2f} GB"
        log.info(
            "%s: %s; %d shards to write%s, %d exist",
            plan.split,
            _headline(plan),
            len(todo),
            size,
            len(tasks) - len(todo),
        )
    log.info("dry_run=true: nothing was written to %s", work[0][0].root)


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
            f"{count} images of {plan.split} are bad, more than max_quarantine "
            f"({cfg.max_quarantine}); nothing was committed. Their names are in {root.path(name)}; "
            "fix them and start again with retry_quarantined=true, or allow more with "
            f"max_quarantine={count * 2}"
        )


def _forget_others(root: Storage, plan: Plan) -> None:
    """Remove the index entry and sidecars of other plans, whose shards have the same names."""
    index = read_index(root)
    if (
        index is not None
        and plan.split in index.splits
        and not is_same(plan, index.splits[plan.split])
    ):
        withdraw(root, plan.split)
    for folder in root.folders("_state"):
        if folder.startswith(f"{plan.split}-") and f"_state/{folder}" != plan.state():
            root.remove(f"_state/{folder}")


def _headline(plan: Plan) -> str:
    images, classes = len(plan.source), len(plan.source.classes)
    return f"{images:,} images of {classes:,} classes in {plan.num_shards:,} shards"


@contextmanager
def _stops_and_disk_errors() -> Iterator[None]:
    """Turn a stop signal into Preempted and an OSError into MachineError.

    After the first stop signal, further ones are ignored, so that the cleanup is not interrupted.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        ignore_stop_signals()
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup sets SIGHUP to SIG_IGN
                signal.signal(number, stop)
        yield
    except KeyboardInterrupt:
        raise Preempted("stopped; rerun the same command to resume") from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise MachineError(
            f"{place}{error.strerror or error}; fix it and rerun the same command to resume"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
