"""Examine the machines that a run would be on: what is found, what the run needs, what to do about the difference.

    python -m alexnet_ddp.doctor [the overrides of the run]
    torchrun --nproc_per_node=8 -m alexnet_ddp.doctor experiment=alexnet data.root=DIR

Less than a minute; it trains nothing, and leaves nothing behind but the caches that a training makes too. Exit code 0
where nothing FAILs, else 64.
"""

import itertools
import logging
import os
import socket
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from alexnet_ddp.config import (
    AutoParallelConfig,
    ConfigError,
    DDPConfig,
    DoctorConfig,
    Hook,
    HybridConfig,
)
from alexnet_ddp.config.compose import to_plain
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import build_sampler, rank_slice
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.doctor import links, machines, meeting, storage, trial
from alexnet_ddp.doctor.facts import Facts, look
from alexnet_ddp.doctor.finding import Finding, Level, seconds, size
from alexnet_ddp.doctor.online import judge_wandb
from alexnet_ddp.doctor.trial import Trial
from alexnet_ddp.model import build_model, set_dropout_keys, without_weights
from alexnet_ddp.parallel import check_parallel
from alexnet_ddp.parallel.layers import worth_splitting
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import RunError, out_of_memory
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.terminal import Console, Table
from alexnet_ddp.training.optim import build_optimizer, state_by_name
from alexnet_ddp.training.precision import autocast, check_precision

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here

_OPEN_S = 12.0  # to find images, and to load some; a training waits longer for its first look at a large folder


@dataclass
class Report:
    """What is known so far; complete on rank 0."""

    findings: list[Finding]
    sums: list[links.Sum]
    links: list[links.Link]
    world_size: int
    is_complete: bool = False

    @property
    def failed(self) -> list[str]:
        return list(dict.fromkeys(f.check for f in self.findings if f.verdict is Level.fail))


def main(cfg: DoctorConfig, overrides: list[str]) -> None:
    """Facts, a meeting at the store, measurements by all ranks, a table. Raises ConfigError where something FAILs."""
    mine = look(cfg, to_plain(cfg))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    store = meeting.meet(mine, cfg.join_timeout_s)
    everyone, found = meeting.judge_together(
        store, mine, world_size, machines.before_joining, cfg.join_timeout_s
    )
    report = Report(found, [], [], world_size)
    failed = report.failed
    report.is_complete = not failed
    if report.is_complete:  # else the ranks would hang, or measure something else
        with ExitStack() as stack:
            try:
                world = stack.enter_context(
                    distributed.session(
                        cfg.device, cfg.trainer.tf32, store, timedelta(seconds=cfg.join_timeout_s)
                    )
                )
            except RuntimeError as error:
                raise meeting.cannot_join(mine, error) from error
            _examine(cfg, world, everyone, report)
            failed = distributed.broadcast(report.failed)
    if mine.rank == 0:
        _show(report, cfg)
    if failed:
        raise ConfigError(f"doctor: FAIL: {', '.join(failed)}; the table says what to do")


def _examine(cfg: DoctorConfig, world: World, everyone: list[Facts], report: Report) -> None:
    """Collective. everyone: on rank 0 the facts of all ranks."""
    ranks = distributed.gather_objects([(world.local_rank, socket.gethostname())])
    leaders = [rank for rank, (local_rank, _) in enumerate(ranks) if local_rank == 0]

    def host_of(rank: int) -> str:
        return ranks[rank][1]

    log.info(
        "doctor: links and sums between %d ranks on %d nodes ...", world.world_size, len(leaders)
    )
    report.links = links.time_links(world, leaders)
    report.sums = links.time_sums(world)
    skews = links.time_clocks(world, leaders)
    log.info("doctor: a step and the loader ...")
    trials = distributed.gather_objects([_try(cfg, world)])
    log.info("doctor: the disk ...")
    folder, blind = _who_sees_the_run(cfg, world)
    if world.is_main:
        main = trials[0]
        report.findings += machines.of_machines(everyone)
        report.findings.append(links.judge_links(report.links, host_of))
        share = -(-cfg.trainer.global_batch_size // world.world_size)
        step_s = main.computes and share / trial.slowest(trials, "computes")
        report.findings.append(links.judge_sums(report.sums, *_sent(cfg, main), step_s))
        report.findings.append(links.judge_clocks(skews, host_of))
        report.findings += trial.judge(trials, everyone)
        disk = storage.try_disk(cfg.run_dir, main.checkpoint_bytes)
        report.findings += storage.judge_disk(disk, main.checkpoint_bytes, cfg.checkpoint)
        report.findings.append(storage.judge_marks(folder, blind))
        report.findings.append(judge_wandb(cfg.logger))


def _try(cfg: DoctorConfig, world: World) -> Trial:
    """Collective. All ranks at once, as in a training."""
    data, error = None, ""
    for is_first in (True, False):  # the node's first rank may make files and caches
        if is_first == (world.local_rank == 0):
            try:
                data = trial.within(_OPEN_S, lambda: open_data(cfg.data, may_make=True))
            except RunError as e:
                error = str(e)
        distributed.any_rank(False, world)
    tried = Trial(error=error)
    try:
        check_precision(cfg.trainer.precision, world)
        tried = replace(
            _try_model(cfg, world, len(data.train.classes) if data else 1000), error=error
        )
        if data is not None:
            tried = replace(tried, images=data.train.fingerprint())
            tried = replace(
                tried, loads=trial.within(_OPEN_S, lambda: _try_loader(cfg, world, data))
            )
    except RunError as e:
        tried = replace(tried, error=str(e))
    except (RuntimeError, MemoryError) as e:
        shortage = out_of_memory(e)
        if shortage is None:
            raise
        tried = replace(tried, error=str(shortage))
    return replace(tried, peak_memory=trial.peak_memory())


def _try_model(cfg: DoctorConfig, world: World, num_classes: int) -> Trial:
    """A forward and backward pass over random images, as many as a rank sees at once in a step."""
    model = build_model(without_weights(cfg.model), num_classes, cfg.data.image_size, cfg.seed)
    check_parallel(cfg.parallel, model, world)
    model.to(world.device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(cfg.optimizer, model)
    state = [*model.state_dict().values(), *state_by_name(optimizer, model).values()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    n = _images_a_pass(cfg, world)
    size, device = cfg.data.image_size, world.device
    images = torch.rand(n, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(n, device=device) % num_classes
    step = itertools.count()

    def one_pass(n: int) -> None:
        set_dropout_keys(
            model, cfg.seed, next(step), torch.arange(n, dtype=torch.int32, device=device)
        )
        with autocast(cfg.trainer.precision, world):
            logits = model(images[:n])
        nn.functional.cross_entropy(logits.float(), labels[:n]).backward()

    return Trial(
        computes=trial.images_per_s(one_pass, n, device),
        gradient_bytes=sum(p.numel() * p.element_size() for p in parameters),
        can_split=bool(worth_splitting(model)),
        checkpoint_bytes=sum(x.numel() * x.element_size() for x in state),
    )


def _images_a_pass(cfg: DoctorConfig, world: World) -> int:
    mine = rank_slice(cfg.trainer.global_batch_size, world.rank, world.world_size)
    return max(1, min(mine.stop - mine.start, cfg.trainer.micro_batch_size or mine.stop))


def _try_loader(cfg: DoctorConfig, world: World, data: ImageSets) -> float:
    augment = build_augment(
        cfg.augment, cfg.seed, cfg.data.image_size, cfg.data.eval_resize, data.colour_basis
    )
    loader = build_loader(cfg.data, data.train, augment, world.num_cores, world.device)
    works = build_sampler(cfg, data.train).work(range(10**9), world.rank, world.world_size, 64)
    try:
        return trial.loaded_per_s(batch.labels for batch in loader.batches(works))
    finally:
        loader.close()


def _who_sees_the_run(cfg: DoctorConfig, world: World) -> tuple[str, list[str]]:
    """Collective. (rank 0's folder, the hosts that do not see what it writes there)."""
    mark = distributed.broadcast(storage.leave_mark(cfg.run_dir) if world.is_main else None)
    sees = mark is None or world.local_rank != 0 or storage.sees(mark)
    blind = distributed.gather_objects([] if sees else [socket.gethostname()])
    if world.is_main and mark is not None:
        mark.unlink()
    return str(storage.existing(cfg.run_dir)), blind


def _sent(cfg: DoctorConfig, tried: Trial) -> tuple[int, str | None]:
    """(bytes of gradients that a step sums over all ranks, the choice that sends another, smaller, number)."""
    gradient_bytes = tried.gradient_bytes
    match cfg.parallel:
        case DDPConfig(hook=Hook.none):
            return gradient_bytes, None
        case DDPConfig(hook=Hook.fp16 | Hook.bf16):
            return gradient_bytes // 2, None
        case AutoParallelConfig() if not tried.can_split:  # it takes ddp
            return gradient_bytes, None
        case DDPConfig():
            return gradient_bytes, f"parallel.hook={cfg.parallel.hook.value}"
        case HybridConfig():
            return gradient_bytes, "parallel=hybrid"
        case _:
            return gradient_bytes, "parallel=auto"


def _show(report: Report, cfg: DoctorConfig) -> None:
    """JSON, if the user asks for it, and the table."""
    if cfg.json is not None:
        found = {"findings": report.findings, "all_reduce": report.sums, "links": report.links}
        write_json(
            Path(cfg.json),
            redact({key: [asdict(one) for one in value] for key, value in found.items()}),
        )
    console = Console(width=160)
    table = Table("", "check", "found", "needed", "remedy")
    colours = {Level.ok: "green", Level.warn: "yellow", Level.fail: "bold red"}
    for f in report.findings:
        cells = map(redact, (f.check, f.found, f.needed, f.remedy))
        table.add_row(f.verdict.value, *cells, style=colours[f.verdict])
    console.print(table)
    if warned := [f.check for f in report.findings if f.verdict is Level.warn]:
        say(f"warnings: {', '.join(warned)}")
    if not report.is_complete:
        say("links, loader and disk were not looked at: ranks like these would hang")
    if report.sums:
        table = Table("message", "time", "bus", title=f"all-reduce over {report.world_size} ranks")
        for s in report.sums:
            table.add_row(
                size(s.num_bytes), seconds(s.seconds), f"{size(s.bus_rate(report.world_size))}/s"
            )
        console.print(table)
