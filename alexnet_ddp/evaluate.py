"""Evaluate a run or a weights file: every validation image once, with any number of processes.

python -m alexnet_ddp.evaluate run.name=X [data.root=DIR] [calibrate=true]
python -m alexnet_ddp.evaluate model=alexnet model.weights=FILE data=imagenet data.root=DIR
"""

if __name__ == "__main__":  # torch, below, is imported after the configuration is valid
    from alexnet_ddp.runtime import startup

    startup.begin("evaluate")

    from alexnet_ddp import cli

    cli.run("evaluate", "alexnet_ddp.evaluate:main")

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from alexnet_ddp import cli
from alexnet_ddp.checkpoint.format import find_best, weights_of_run
from alexnet_ddp.config import Config, ConfigError, EvaluateConfig, Head
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.model import (
    build_model,
    load_weights,
    published_weights,
    wanted_transform,
    without_weights,
)
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import Preempted
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.terminal import Console, Table
from alexnet_ddp.tracking import read_classes
from alexnet_ddp.training.calibration import NUM_BINS, Outputs, fit, write_calibration
from alexnet_ddp.training.evaluation import Evaluation, evaluate
from alexnet_ddp.training.precision import check_precision
from alexnet_ddp.training.trained import read_trained

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here

_MAX_ROWS = 40  # classes in the table; evaluation.json contains all of them


def main(options: EvaluateConfig, overrides: list[str]) -> None:
    """Evaluate model.weights if it is given, else the best checkpoint of run.name.

    A run's result is also written to evaluation.json in its directory, and with calibrate=true its
    temperature to calibration.json. Raises ConfigError, DataError or, after a stop signal,
    Preempted.
    """
    cfg: Config = options
    file = cfg.model.weights
    if file is None:
        kept = [one for one in overrides if one.partition("=")[0].lstrip("+") != "calibrate"]
        cfg = cli.config_of_run(cfg.run_dir, kept)
    with distributed.session(cfg.device, cfg.trainer.tf32) as world:
        check_precision(cfg.trainer.precision, world)
        known = (
            distributed.on_all(lambda: read_classes(cfg.run_dir)["ids"], world)
            if file is None
            else None
        )
        data = distributed.first_on_node(lambda: open_data(cfg.data, trained=known), world)
        cfg = replace(cfg, data=data.normalised(cfg.data))
        model, origin, directory = _open_network(cfg, file, data, world)
        model.to(world.device).to(memory_format=torch.channels_last)
        loader = build_loader(cfg.data, data.val, None, world.num_cores, world.device)
        works = evaluation_batches(
            len(data.val), cfg.trainer.eval_batch_size, world.rank, world.world_size
        )
        batches, num_classes = loader.batches(works), len(data.val.classes)
        outputs = Outputs() if options.calibrate else None
        observe = outputs.add if outputs is not None else None
        result = evaluate(
            model, batches, cfg.trainer, num_classes, world, StopSignal(), observe=observe
        )
        if result is None:
            raise Preempted(
                "stopped before the evaluation was complete; start the same command again"
            )
        bad = sorted(one.reason for one in distributed.all_gather_objects(result.skipped))
        if bad:
            log.warning(
                "%d images could not be read and are not counted, such as %s", len(bad), bad[0]
            )
        if world.is_main:
            if file is None:  # before printing, which may fail: the reader of a pipe may have ended
                write_json(
                    cfg.run_dir / "evaluation.json",
                    _record(result, data.class_names, origin | {"bad_images": bad}),
                )
            _report(
                result, data.class_names, {"run": cfg.run.name} | origin if file is None else origin
            )
        if outputs is not None and directory is not None:
            _calibrate(outputs, cfg.run_dir, directory, world)


def _calibrate(outputs: Outputs, run_dir: Path, checkpoint: Path, world: World) -> None:
    """Collective. Write calibration.json and print what it changes. Raises DataError."""
    gathered = outputs.gather(world)
    found = distributed.from_main(lambda: None if gathered is None else fit(*gathered), world)
    if world.is_main and found is not None:
        write_calibration(run_dir, checkpoint, found)
        say(
            f"temperature {found.temperature:.4f}: expected calibration error ({NUM_BINS} bins) "
            f"{100 * found.ece_before:.2f} % before, {100 * found.ece_after:.2f} % after; loss "
            f"{found.loss_before:.4f} before, {found.loss_after:.4f} after"
        )


def _open_network(
    cfg: Config, file: str | None, data: ImageSets, world: World
) -> tuple[nn.Module, dict, Path | None]:
    """Collective. The network, its origin for the record, and the checkpoint if it is a run's.

    file: the weights to evaluate; None for those of the run, whose own model.weights are the ones
    that it started from.
    """
    if file is None:
        directory = distributed.from_main(lambda: find_best(cfg.run_dir / "checkpoints"), world)
        trained = distributed.on_all(lambda: read_trained(cfg, directory, data.val.classes), world)
        return trained.model, trained.origin, directory
    weights = distributed.first_on_node(
        partial(published_weights, cfg.model, data.val.classes), world
    ) or distributed.from_main(partial(weights_of_run, file, cfg.run.root), world)
    return *distributed.on_all(lambda: _from_file(cfg, data, *weights), world), None


def _from_file(
    cfg: Config, data: ImageSets, weights: str, known: list[str] | None
) -> tuple[nn.Module, dict]:
    """The network with the weights of a file, and their origin for the record.

    weights: the path of the file. known: its classes, if it is a run's. Raises ConfigError.
    """
    if cfg.model.head is Head.new:
        raise ConfigError("model.head=new would evaluate an untrained head; leave it auto")
    classes = data.val.classes
    model = build_model(without_weights(cfg.model), len(classes), cfg.data.image_size, cfg.seed)
    load_weights(model, Path(weights), classes, None, wanted_transform(cfg.model), known)
    return model, {"weights": weights}


def _record(result: Evaluation, names: list[str], origin: dict) -> dict:
    """The content of evaluation.json: origin, the metrics of metrics.jsonl, and counts per class.

    If classes share a name, their keys contain the label too.
    """
    counts = result.per_class.tolist()
    known = Counter(names)  # two WordNet ids are both "crane"
    keys = [f"{name} ({label})" if known[name] > 1 else name for label, name in enumerate(names)]
    classes = {
        key: dict(zip(("num_images", "correct1", "correct5"), row))
        for key, row in zip(keys, counts)
    }
    return {**origin, **result.row, "per_class": classes}


def _report(result: Evaluation, names: list[str], origin: dict) -> None:
    """Print a table of the classes, the worst first, and a line with the metrics."""
    table = Table(title=", ".join(f"{key} {value}" for key, value in origin.items()))
    for heading in ("class", "images", "top-1 %", "top-5 %"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    rows = [
        (name, n, 100 * c1 / n, 100 * c5 / n)
        for name, (n, c1, c5) in zip(names, result.per_class.tolist())
        if n
    ]
    rows.sort(key=lambda row: row[2])
    for name, n, top1, top5 in rows[:_MAX_ROWS]:
        table.add_row(name, f"{n:,}", f"{top1:.1f}", f"{top5:.1f}")
    Console().print(table)
    if len(rows) > _MAX_ROWS:
        say(f"... and {len(rows) - _MAX_ROWS} better classes")
    row = result.row
    counts = (
        f"(top-1: {row['val/correct1']:,}, top-5: {row['val/correct5']:,}, "
        f"of {row['val/num_images']:,} images)"
    )
    say(
        f"top-1 {row['val/top1']:.2f} %  top-5 {row['val/top5']:.2f} %  "
        f"loss {row['val/loss']:.4f}  {counts}"
    )
