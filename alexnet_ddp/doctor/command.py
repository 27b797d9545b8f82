"""Checks the machines on which a run would start: what is found, what is needed, and the remedy.

    python -m alexnet_ddp.doctor [the overrides of the run]
    torchrun --nproc_per_node=8 -m alexnet_ddp.doctor experiment=alexnet data.root=DIR

Takes less than a minute and trains nothing. It leaves only the caches that a training creates too.
The exit code is 0 if no check FAILs, else 64.
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
    Method,
)
from alexnet_ddp.config.compose import to_plain
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import build_sampler, rank_slice
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.doctor import links, machines, outputs, rendezvous, speed
from alexnet_ddp.doctor.facts import Facts, collect_facts
from alexnet_ddp.doctor.findings import Finding, Level, format_bytes, format_seconds
from alexnet_ddp.doctor.outputs import check_wandb
from alexnet_ddp.doctor.speed import Measurement
from alexnet_ddp.model import (
    Adapters,
    Backbone,
    build_model,
    set_dropout_keys,
    without_weights,
)
from alexnet_ddp.parallel import check_parallel, worth_splitting
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import RunError, out_of_memory
from alexnet_ddp.runtime.files import existing_parent, write_json
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.terminal import Console, Table
from alexnet_ddp.training.optim import build_optimizer, state_by_name
from alexnet_ddp.training.precision import autocast, check_precision

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here

_OPEN_S = 12.0  # to list the images, and to load some; a training waits longer for a large folder


@dataclass
class Report:
    """The results so far; complete on rank 0. is_complete: the collective measurements ran."""

    findings: list[Finding]
    all_reduces: list[links.AllReduce]
    links: list[links.Link]
    world_size: int
    is_complete: bool = False

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return list(dict.fromkeys(f.check for f in self.findings if f.level is Level.fail))


def main(cfg: DoctorConfig, overrides: list[str]) -> None:
    """Collect facts, exchange them, measure on all ranks, print a table.

    Raises ConfigError if a check FAILs.
    """
    mine = collect_facts(cfg, to_plain(cfg))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    store = rendezvous.connect(mine, cfg.join_timeout_s)
    all_facts, found = rendezvous.exchange_facts(
        store, mine, world_size, machines.check_compatibility, cfg.join_timeout_s
    )
    report = Report(found, [], [], world_size)
    failed = report.failed
    report.is_complete = not failed
    if report.is_complete:  # otherwise the ranks would hang, or measure different things
        with ExitStack() as stack:
            try:
                world = stack.enter_context(
                    distributed.session(
                        cfg.device, cfg.trainer.tf32, store, timedelta(seconds=cfg.join_timeout_s)
                    )
                )
            except RuntimeError as error:
                raise rendezvous.join_error(mine, error) from error
            _run_checks(cfg, world, all_facts, report)
            failed = distributed.broadcast(report.failed)
    if mine.rank == 0:
        _print_report(report, cfg)
    if failed:
        raise ConfigError(f"doctor: FAIL: {', '.join(failed)}; the table names the remedies")


def _run_checks(cfg: DoctorConfig, world: World, all_facts: list[Facts], report: Report) -> None:
    """Collective. Measure on all ranks, and add the findings to rank 0's `report`.

    all_facts: on rank 0 the facts of all ranks.
    """
    ranks = distributed.all_gather_objects([(world.local_rank, socket.gethostname())])
    leaders = [rank for rank, (local_rank, _) in enumerate(ranks) if local_rank == 0]

    def host_of(rank: int) -> str:
        return ranks[rank][1]

    log.info(
        "doctor: links and all-reduce, ranks: %d, nodes: %d ...", world.world_size, len(leaders)
    )
    report.links = links.time_links(world, leaders)
    report.all_reduces = links.time_all_reduce(world)
    offsets = links.measure_clock_offsets(world, leaders)
    log.info("doctor: a step and the loader ...")
    measured = distributed.all_gather_objects([_measure(cfg, world)])
    log.info("doctor: the disk ...")
    folder, blind = _compare_run_dirs(cfg, world)
    if world.is_main:
        main = measured[0]
        report.findings += machines.check_machines(all_facts)
        report.findings.append(links.check_links(report.links, host_of))
        share = -(-cfg.trainer.global_batch_size // world.world_size)
        rate = speed.slowest(m.train_images_per_s for m in measured)
        step_s = share / rate if main.train_images_per_s and rate else None
        report.findings.append(
            links.check_gradients(report.all_reduces, *_bytes_sent(cfg, main), step_s)
        )
        report.findings.append(links.check_clocks(offsets, host_of))
        report.findings += speed.check_ranks(measured, all_facts)
        disk = outputs.measure_disk(cfg.run_dir, main.checkpoint_bytes)
        report.findings += outputs.check_disk(disk, main.checkpoint_bytes, cfg.checkpoint)
        report.findings.append(outputs.check_visibility(folder, blind))
        report.findings.append(check_wandb(cfg.logger))


def _measure(cfg: DoctorConfig, world: World) -> Measurement:
    """Collective. Measure the step and the loader on all ranks at once, as in a training."""
    data, error = None, ""
    for is_first in (True, False):  # the first rank of a node creates files and caches
        if is_first == (world.local_rank == 0):
            try:
                data = speed.with_timeout(_OPEN_S, lambda: open_data(cfg.data, may_make=True))
            except RunError as e:
                error = str(e)
        distributed.any_rank(False, world)
    result = Measurement(error=error)
    try:
        check_precision(cfg.trainer.precision, world)
        result = replace(
            _measure_model(cfg, world, len(data.train.classes) if data else 1000), error=error
        )
        if data is not None:
            cfg = replace(cfg, data=data.normalised(cfg.data))
            result = replace(result, images=data.train.fingerprint())
            result = replace(
                result,
                load_images_per_s=speed.with_timeout(
                    _OPEN_S, lambda: _measure_loader(cfg, world, data)
                ),
            )
    except RunError as e:
        result = replace(result, error=str(e))
    except (RuntimeError, MemoryError) as e:
        shortage = out_of_memory(e)
        if shortage is None:
            raise
        result = replace(result, error=str(shortage))
    return replace(result, peak_memory=speed.peak_memory())


def _measure_model(cfg: DoctorConfig, world: World, num_classes: int) -> Measurement:
    """Measure forward and backward passes over random images, one micro-batch each."""
    model = build_model(without_weights(cfg.model), num_classes, cfg.data.image_size, cfg.seed)
    check_parallel(cfg.parallel, model, world)
    model.to(world.device).to(memory_format=torch.channels_last).train()
    if cfg.finetune.method is Method.head:
        Backbone(model).freeze()
    weights = model.state_dict()
    if cfg.finetune.adapts:
        adapters = Adapters(model, cfg.finetune, cfg.seed, cfg.data.image_size)
        weights = adapters.merged_state() | adapters.state_dict()
    optimizer = build_optimizer(cfg.optimizer, model)
    state = [*weights.values(), *state_by_name(optimizer, model).values()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    n = _images_per_pass(cfg, world)
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

    return Measurement(
        train_images_per_s=speed.measure_step(one_pass, n, device),
        gradient_bytes=sum(p.numel() * p.element_size() for p in parameters),
        can_split=bool(worth_splitting(model)),
        checkpoint_bytes=sum(x.numel() * x.element_size() for x in state),
    )


def _images_per_pass(cfg: DoctorConfig, world: World) -> int:
    mine = rank_slice(cfg.trainer.global_batch_size, world.rank, world.world_size)
    return max(1, min(mine.stop - mine.start, cfg.trainer.micro_batch_size or mine.stop))


def _measure_loader(cfg: DoctorConfig, world: World, data: ImageSets) -> float:
    augment = build_augment(
        cfg.augment, cfg.seed, cfg.data.image_size, cfg.data.resized_side, data.colour_basis
    )
    loader = build_loader(cfg.data, data.train, augment, world.num_cores, world.device)
    works = build_sampler(cfg, data.train).micro_batches(
        range(10**9), world.rank, world.world_size, 64
    )
    try:
        return speed.measure_loader(batch.labels for batch in loader.batches(works))
    finally:
        loader.close()


def _compare_run_dirs(cfg: DoctorConfig, world: World) -> tuple[str, list[str]]:
    """Collective. Return rank 0's folder of run.root, and the hosts that do not see its files."""
    mark = distributed.broadcast(outputs.create_marker(cfg.run_dir) if world.is_main else None)
    sees = mark is None or world.local_rank != 0 or outputs.is_visible(mark)
    blind = distributed.all_gather_objects([] if sees else [socket.gethostname()])
    if world.is_main and mark is not None:
        mark.unlink()
    return str(existing_parent(cfg.run_dir)), blind


def _bytes_sent(cfg: DoctorConfig, result: Measurement) -> tuple[int, str | None]:
    """Return the bytes of gradients that a step all-reduces, and the option that sends fewer.

    The option is None if all of these bytes are sent.
    """
    gradient_bytes = result.gradient_bytes
    match cfg.parallel:
        case DDPConfig(hook=Hook.none):
            return gradient_bytes, None
        case DDPConfig(hook=Hook.fp16 | Hook.bf16):
            return gradient_bytes // 2, None
        case AutoParallelConfig() if not result.can_split:  # parallel=auto then selects ddp
            return gradient_bytes, None
        case DDPConfig():
            return gradient_bytes, f"parallel.hook={cfg.parallel.hook.value}"
        case HybridConfig():
            return gradient_bytes, "parallel=hybrid"
        case _:
            return gradient_bytes, "parallel=auto"


def _print_report(report: Report, cfg: DoctorConfig) -> None:
    """Write cfg.json if it is given, and print the table."""
    if cfg.json is not None:
        content = {
            "findings": [finding.to_json() for finding in report.findings],
            "all_reduce": [asdict(measurement) for measurement in report.all_reduces],
            "links": [asdict(link) for link in report.links],
        }
        write_json(Path(cfg.json), redact(content))
    console = Console(width=160)
    table = Table("", "check", "found", "needed", "remedy")
    colours = {Level.ok: "green", Level.warn: "yellow", Level.fail: "bold red"}
    for f in report.findings:
        cells = map(redact, (f.check, f.found, f.needed, f.remedy))
        table.add_row(f.level.value, *cells, style=colours[f.level])
    console.print(table)
    if warned := [f.check for f in report.findings if f.level is Level.warn]:
        say(f"warnings: {', '.join(warned)}")
    if not report.is_complete:
        say("links, loader and disk were not checked: with these failures the ranks would hang")
    if report.all_reduces:
        table = Table("message", "time", "bus", title=f"all-reduce over {report.world_size} ranks")
        for s in report.all_reduces:
            table.add_row(
                format_bytes(s.num_bytes),
                format_seconds(s.seconds),
                f"{format_bytes(s.bus_rate(report.world_size))}/s",
            )
        console.print(table)
