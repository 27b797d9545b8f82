"""Pack images into shuffled, verified shards, on one machine or on Spark.

    python -m alexnet_ddp.prepare source=/data/imagenet root=/data/shards
    python -m alexnet_ddp.prepare action=inspect root=/data/shards

Read `prepare` top to bottom: list, plan, write, verify, commit.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_ddp import cli
from alexnet_ddp.config import Action, ConfigError, LocalEngineConfig, PrepareConfig, Split
from alexnet_ddp.data.packing import report
from alexnet_ddp.data.packing.commit import commit, withdraw
from alexnet_ddp.data.packing.local import run_local
from alexnet_ddp.data.packing.plan import Plan, ShardTask, make_plan
from alexnet_ddp.data.packing.source import open_source, splits_of
from alexnet_ddp.data.packing.write import is_intact, read_sidecar, write_shard
from alexnet_ddp.data.shards import ShardIndex, read_index
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.errors import DataError, Preempted

Engine = Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]

log = logging.getLogger("alexnet_ddp")


def main(cfg: PrepareConfig, overrides: list[str]) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        match cfg.action:
            case Action.prepare:
                prepare(cfg)
            case _:
                report.ACTIONS[cfg.action](cfg)
    except KeyboardInterrupt:
        raise Preempted("stopped; what is written stays, and the same command goes on") from None


def prepare(cfg: PrepareConfig) -> None:
    """Each split in turn: list, plan, write what is missing, verify, commit."""
    root = absolute(cfg.root)
    there = splits_of(cfg.source)
    splits = there if cfg.split is Split.all else [cfg.split.value]
    plans = [make_plan(cfg, root, split, open_source(cfg.source, split)) for split in splits]
    _check_classes(plans, read_index(Storage(root)))
    for plan in plans:
        _check_replaceable(plan, cfg)
    if cfg.dry_run:
        for plan in plans:
            todo = [task for task in plan.tasks() if read_sidecar(Storage(root), task) is None]
            log.info("%s: %s; %d shards to write", plan.split, _headline(plan), len(todo))
        return
    engine = _engine(cfg)
    for plan in plans:
        _pack(plan, cfg, engine)
    report.summary(root)


def _pack(plan: Plan, cfg: PrepareConfig, engine: Engine) -> None:
    root, tasks = Storage(plan.root), list(plan.tasks())
    index = read_index(root)
    if index is not None and plan.split in index.splits and not _same(plan, index.splits[plan.split]):
        withdraw(root, plan.split)
    _forget_others(root, plan)
    done = {task.shard: found for task in tasks if (found := read_sidecar(root, task)) is not None}
    if cfg.retry_quarantined:
        done = {shard: found for shard, found in done.items() if not found["quarantined"]}
    for shard in {task.shard for task in tasks} - done.keys():
        root.remove(f"{tasks[shard].sidecar}.json")
    if cfg.verify and done:
        what = f"verifying {plan.split}"
        for found in _watched(engine, is_intact, [tasks[shard] for shard in done], what):
            if not found["intact"]:
                log.warning("%s is not what was written: writing it again", root.path(tasks[found["shard"]].stem))
                root.remove(f"{tasks[found['shard']].sidecar}.json")
                del done[found["shard"]]
    pending = [task for task in tasks if task.shard not in done]
    log.info("%s: %s; %d shards to write, %d are there", plan.split, _headline(plan), len(pending), len(done))
    quarantined = sum(found["quarantined"] for found in done.values())
    _check_quarantine(quarantined, plan, cfg)
    if not pending and index is not None and plan.split in index.splits:
        return
    if pending:
        withdraw(root, plan.split)
    with closing(_watched(engine, write_shard, pending, f"packing {plan.split}")) as summaries:
        for summary in summaries:
            quarantined += summary["quarantined"]
            _check_quarantine(quarantined, plan, cfg)
    commit(plan, tasks)


def _engine(cfg: PrepareConfig) -> Engine:
    match cfg.engine:
        case LocalEngineConfig():
            return partial(run_local, cfg.engine.workers or os.cpu_count() or 1)
        case _:
            from alexnet_ddp.data.packing.spark import choose_engine

            return choose_engine(cfg)


def _watched(engine: Engine, fn: Callable, tasks: list[ShardTask], what: str) -> Iterator[dict]:
    """The summaries as they come, with a progress bar in images where stderr is a terminal."""
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=sum(len(t.rows) for t in tasks), rate="")
        with closing(engine(fn, tasks)) as results:
            for result in results:
                count = result["images"] + result.get("quarantined", 0)
                bar.advance(task, count)
                speed = bar.tasks[0].speed
                bar.update(task, rate=f"{speed:,.0f} images/s" if speed else "")
                yield result


def _check_quarantine(count: int, plan: Plan, cfg: PrepareConfig) -> None:
    if count > cfg.max_quarantine:
        raise DataError(
            f"{count} images of {plan.split} are bad, max_quarantine is {cfg.max_quarantine}: nothing was committed. "
            f"Their names are in {plan.root}/{plan.state()}/{plan.split}-*.json; mend them and start again with "
            f"retry_quarantined=true, or allow more with max_quarantine={count * 2}"
        )


def _check_classes(plans: list[Plan], index: ShardIndex | None) -> None:
    """The labels of all splits must mean the same."""
    first = plans[0].source.classes
    for plan in plans[1:]:
        if plan.source.classes != first:
            differ = sorted(set(first) ^ set(plan.source.classes))
            raise DataError(
                f"{plans[0].split} and {plan.split} must have the same classes; only one of them has "
                f"{', '.join(differ[:5])}"
            )
    others = set(index.splits) - {plan.split for plan in plans} if index else set()
    if others and index.classes != first:
        raise DataError(f"{plans[0].root} holds {', '.join(sorted(others))} shards of other classes; give another root")


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
    """Shards of another plan have the same names: their sidecars must not vouch for ours."""
    for folder in root.folders("_state"):
        if folder.startswith(f"{plan.split}-") and f"_state/{folder}" != plan.state():
            root.remove(f"_state/{folder}")


def _headline(plan: Plan) -> str:
    return f"{len(plan.source):,} images of {len(plan.source.classes):,} classes in {plan.num_shards:,} shards"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run("prepare", main)
