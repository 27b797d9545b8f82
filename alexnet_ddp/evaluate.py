"""Evaluate a run or a weights file: every validation image once, with any number of processes.

python -m alexnet_ddp.evaluate run.name=X [data.root=DIR] [metrics=true] [calibrate=true]
python -m alexnet_ddp.evaluate model=alexnet model.weights=FILE data=imagenet data.root=DIR
python -m alexnet_ddp.evaluate model=alexnet model.weights=IMAGENET1K_V1 images=DIR
"""

if __name__ == "__main__":  # torch, below, is imported after the configuration is valid
    from alexnet_ddp.runtime import startup

    startup.begin("evaluate")

    from alexnet_ddp import cli

    cli.run("evaluate", "alexnet_ddp.evaluate:main", cli.without_data_options)

import logging
import os
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_ddp import cli
from alexnet_ddp.checkpoint.format import classes_beside, find_step, weights_of_run
from alexnet_ddp.config import Config, ConfigError
from alexnet_ddp.config.evaluate import (
    EvaluateConfig,
    refuse_auto_mean,
    refuse_ignored_data,
)
from alexnet_ddp.config.option import key_of
from alexnet_ddp.config.run import refuse_two_networks
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.labelled import open_labelled
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.data.views import CENTRE, EvalViews, evaluation_views
from alexnet_ddp.model import (
    build_model,
    load_weights,
    published_weights,
    wanted_transform,
    without_weights,
)
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.accuracy import (
    interval_text,
    intervals_text,
    metric_interval,
    percent_interval,
)
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import MachineError, Preempted
from alexnet_ddp.runtime.files import require_folder_of, write_json
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.run_record import read_classes
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.tables import NUMBER, TEXT, open_table, require_pyarrow
from alexnet_ddp.runtime.terminal import Console, Table
from alexnet_ddp.training.averaging import read_average
from alexnet_ddp.training.calibration import (
    NUM_BINS,
    Outputs,
    Scores,
    fit,
    require_finite,
    write_calibration,
)
from alexnet_ddp.training.class_metrics import (
    CLASS_COLUMNS,
    ClassMetrics,
    class_metrics,
    class_rows,
    confusions,
    image_rows,
    require_sklearn,
    unique_names,
)
from alexnet_ddp.training.evaluation import Evaluation, evaluate
from alexnet_ddp.training.named_weights import read_weights
from alexnet_ddp.training.precision import check_precision
from alexnet_ddp.training.trained import Trained, read_trained

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here

_MAX_ROWS = 40  # classes in the table; evaluation.json contains all of them
_MAX_CONFUSIONS = 5  # printed pairs of classes


def main(options: EvaluateConfig, overrides: list[str]) -> None:
    """Evaluate model.weights if it is given, else a checkpoint of run.name, or their mean.

    The result is also written to `output`, by default the directory of the run: evaluation.json,
    and with metrics=true evaluation_classes.csv. With images=DIR these are evaluation_images.json
    and evaluation_images_classes.csv. calibrate=true writes calibration.json to the run. Raises
    ConfigError, DataError, Diverged or, after a stop signal, Preempted.
    """
    file, cfg = options.model.weights, _config(options, overrides)
    with distributed.session(cfg.device, cfg.trainer.tf32) as world:
        distributed.from_main(lambda: _check_files(options), world)
        check_precision(cfg.trainer.precision, world)
        named = None
        if file is not None and options.images is not None:
            named = _read_named(cfg, options.classes, world)
        data = _open_data(options, cfg, named, world)
        cfg = replace(cfg, data=data.normalised(cfg.data))
        if named is None:
            model, origin, directory = _open_network(cfg, file, options, data, world)
        else:
            model, origin, directory = named.model, named.origin, None
        origin |= _chosen(options)
        if options.only_present:
            model = PresentClasses(model, data.val.labels, len(data.val.classes))
        model.to(world.device).to(memory_format=torch.channels_last)
        views = evaluation_views(options.crops, options.flip)
        needs_outputs = options.calibrate or options.metrics or options.predictions is not None
        outputs = Outputs() if needs_outputs else None
        found = _evaluate(model, origin, data.val, cfg, outputs, world, views=views)
        distributed.from_main(lambda: _finish(found, data, options, _folder(options)), world)
        if options.calibrate and directory is not None:
            _calibrate(found.scores, cfg.run_dir, directory, world)


def _config(options: EvaluateConfig, overrides: list[str]) -> Config:
    """The options of the evaluation: with a run, those of its training that are not given."""
    refuse_ignored_data(options, overrides)
    if options.model.weights is not None:
        refuse_two_networks(options.run, "model.weights", overrides)
        return options
    own = {one.name for one in fields(EvaluateConfig)} - {one.name for one in fields(Config)}
    kept = [one for one in overrides if key_of(one) not in own]
    opens_data = options.images is None or options.average is not None
    cfg = cli.config_of_run(options.run_dir, kept, opens_data=opens_data)
    refuse_auto_mean(options, cfg.data)
    return cfg


def _read_named(cfg: Config, classes: str | None, world: World) -> Trained:
    """Collective. As read_weights; weights of a run also have its readable names of the classes."""
    found = read_weights(cfg, classes, world)
    file = Path(found.origin["weights"])
    known = distributed.from_main(lambda: classes_beside(file), world)
    if known is None or known["ids"] != found.ids:
        return found
    return replace(found, names=known["names"])


def _open_data(
    options: EvaluateConfig, cfg: Config, named: Trained | None, world: World
) -> ImageSets:
    """Collective. The images to evaluate on: those of `images`, else those of `data`.

    named: the network of model.weights, if it is given with images.
    """
    if named is not None:
        ids, names = named.ids, named.names
    elif options.model.weights is not None:
        return distributed.first_on_node(lambda: open_data(cfg.data), world)
    else:
        known = distributed.on_all(lambda: read_classes(cfg.run_dir), world)
        ids, names = known["ids"], known["names"]
    if options.images is None:
        return distributed.first_on_node(lambda: open_data(cfg.data, trained=ids), world)
    opened = partial(open_labelled, options.images, ids, names, options.class_map)
    val = distributed.first_on_node(opened, world)
    return ImageSets(val, val, names)


def _chosen(options: EvaluateConfig) -> dict:
    """The options of this evaluation that change its result, if they are given."""
    found: dict[str, object] = {}
    if options.images is not None:
        found |= {"images": options.images, "only_present": options.only_present}
    if options.crops > 1 or options.flip:
        found |= {"crops": options.crops, "flip": options.flip or options.crops == 10}
    return found


class PresentClasses(nn.Module):
    """A network in which only the classes of some labels have a probability above 0."""

    mask: Tensor  # float32 [classes], to add to the logits

    def __init__(self, network: nn.Module, labels: np.ndarray, num_classes: int) -> None:
        super().__init__()
        self.network = network
        mask = torch.full((num_classes,), -torch.inf)
        mask[np.unique(labels)] = 0
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> Tensor:
        """float [n, 3, size, size] -> float [n, classes]"""
        return self.network(images) + self.mask


@dataclass(frozen=True)
class Found:
    """An evaluation, where the network comes from, and what all ranks have found."""

    evaluation: Evaluation
    origin: dict
    bad: list[Skipped]  # images that could not be read, in their order
    scores: Scores | None  # on rank 0, if they were asked for


def _evaluate(
    model: nn.Module,
    origin: dict,
    val: SampleIndex,
    cfg: Config,
    outputs: Outputs | None,
    world: World,
    *,
    views: EvalViews = CENTRE,
) -> Found:
    """Collective. Evaluate on all images of `val`. Raises Preempted after a stop signal."""
    loader = build_loader(cfg.data, val, None, world.num_cores, world.device, views=views)
    num_images = max(1, cfg.trainer.eval_batch_size // len(views))  # of a forward pass
    works = evaluation_batches(len(val), num_images, world.rank, world.world_size)
    result = evaluate(
        model,
        loader.batches(works),
        cfg.trainer,
        len(val.classes),
        world,
        StopSignal(),
        observe=None if outputs is None else outputs.add,
        num_views=len(views),
    )
    if result is None:
        raise Preempted("stopped before the evaluation was complete; start the same command again")
    bad = sorted(distributed.all_gather_objects(result.skipped), key=lambda one: one.index)
    if bad:
        log.warning(
            "%d images could not be read and are not counted, such as %s", len(bad), bad[0].reason
        )
    return Found(result, origin, bad, None if outputs is None else outputs.gather(world))


def _folder(options: EvaluateConfig) -> Path | None:
    """The folder of evaluation.json; None if nothing but the predictions is written."""
    if options.output is not None:
        return Path(options.output)
    return None if options.model.weights is not None else options.run_dir


def _check_files(options: EvaluateConfig) -> None:
    """Create the folder `output`. Raise ConfigError if a requested file cannot be written."""
    if options.output is not None:
        try:
            Path(options.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:  # FileExistsError: it is a file
            rule = f"output ({options.output}) cannot be created ({error.strerror})"
            raise ConfigError(f"{rule}; give another one") from error
    folders = [_folder(options), options.run_dir if options.calibrate else None]
    for folder in folders:
        if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            remedy = "change its permissions" if options.calibrate else "give another output=DIR"
            raise ConfigError(f"the results cannot be written to {folder}: no permission; {remedy}")
    if options.metrics:
        require_sklearn()
    if options.predictions is not None:
        require_pyarrow("predictions", options.predictions)
        require_folder_of("predictions", options.predictions)


def _finish(found: Found, data: ImageSets, options: EvaluateConfig, folder: Path | None) -> None:
    """Write the files, then print the results: a reader of a pipe may have ended.

    folder: see _folder(). Raises ConfigError, MachineError if a file cannot be written, and
    Diverged if outputs that are needed are not finite.
    """
    metrics = None
    if found.scores is not None:
        _require_finite(found.scores, found.origin, options)
        metrics = class_metrics(found.scores) if options.metrics else None
    names = unique_names(data.class_names)
    if folder is not None:
        stem = "evaluation" if options.images is None else "evaluation_images"
        try:
            _write_evaluation(folder, stem, found, metrics, data.val.classes, names)
        except OSError as error:
            rule = f"the results cannot be written to {folder} ({error.strerror})"
            raise MachineError(f"{rule}; free some space, or fix its permissions") from error
    if options.predictions is not None and found.scores is not None:
        candidates = len(np.unique(data.val.labels)) if options.only_present else len(names)
        top_k = min(options.top_k, candidates)
        _write_predictions(options.predictions, found.scores, found.bad, data.val, names, top_k)
    of_run = {} if options.model.weights is not None else {"run": options.run_dir.name}
    _report(found.evaluation, data.class_names, of_run | found.origin)
    for line in [] if metrics is None else _metric_lines(metrics, names):
        say(line)


def _write_evaluation(
    folder: Path,
    stem: str,
    found: Found,
    metrics: ClassMetrics | None,
    ids: list[str],
    names: list[str],
) -> None:
    """Write STEM.json and, with metrics, STEM_classes.csv to `folder`.

    Raises ConfigError or OSError.

    ids, names: of the classes; the names are unique.
    """
    record, table = _record(found, names), folder / f"{stem}_classes.csv"
    if metrics is None:
        table.unlink(missing_ok=True)  # it may be of another checkpoint than the new STEM.json
    else:
        record |= {"metrics": metrics.summary, "confusions": confusions(metrics, names)}
        _write_classes(table, metrics, ids, names, found.evaluation.per_class)
    write_json(folder / f"{stem}.json", record)


def _require_finite(scores: Scores, origin: dict, options: EvaluateConfig) -> None:
    """Raise Diverged if an output is not finite. origin: of the network."""
    remedy = "choose another checkpoint with at_step=STEP"
    if options.average is not None:
        remedy = "choose other checkpoints with average=[STEP,STEP]"
    if options.model.weights is not None:
        remedy = "give another file"
    network = str(origin.get("checkpoint", options.model.weights))
    require_finite(scores.logits, network, remedy)


def _write_classes(
    file: Path, found: ClassMetrics, ids: list[str], names: list[str], counts: Tensor
) -> None:
    """Write the table of the classes. Raises ConfigError."""
    with closing(open_table("metrics", str(file), CLASS_COLUMNS)) as table:
        for row in class_rows(found, ids, names, counts):
            table.write(row)


def _write_predictions(
    file: str,
    scores: Scores,
    bad: list[Skipped],
    images: SampleIndex,
    names: list[str],
    top_k: int,
) -> None:
    """Write a row for each image of `images`, in their order. Raises ConfigError.

    top_k: at most the number of classes.
    """
    columns: dict[str, str | int] = {"image": TEXT, "label": TEXT}
    for k in range(1, top_k + 1):
        columns |= {f"class_{k}": TEXT, f"probability_{k}": NUMBER}
    columns |= {"loss": NUMBER, "error": TEXT}
    reasons, rows = {one.index: one.reason for one in bad}, image_rows(scores, names, top_k)
    with closing(open_table("predictions", file, columns)) as table:
        for i, label in enumerate(images.labels.tolist()):
            about = {"image": images.name(i), "label": names[label]}
            table.write(about | ({"error": reasons[i]} if i in reasons else next(rows)))


def _metric_lines(found: ClassMetrics, names: list[str]) -> list[str]:
    """The means over classes, and the most frequent confusions."""
    one = found.summary
    intervals = one["intervals_95"]
    shares = {
        "balanced accuracy": (one["balanced_accuracy"], intervals["balanced_accuracy"]),
        "F1 (macro)": (one["f1"]["macro"], intervals["f1_macro"]),
        "AUROC (macro)": (one["auroc_macro"], intervals["auroc_macro"]),
        "average precision (macro)": (one["average_precision_macro"], None),
        "Cohen's kappa": (one["cohen_kappa"], None),
        "calibration error": (one["expected_calibration_error"], None),
    }
    known = [
        f"{name} {value:.4f}" + ("" if ends is None else f" ({interval_text(ends, 4)})")
        for name, (value, ends) in shares.items()
        if value is not None
    ]
    wrong = found.confusion * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS].tolist()
    pairs = [divmod(k, len(names)) for k in order if wrong.flat[k]]
    note = "  (95 % intervals in brackets)" if any(ends for _, ends in shares.values()) else ""
    return [f"{'  '.join(known)}{note}"] + [
        f"{wrong[i, j]:,} of {found.confusion[i].sum():,} {names[i]} are taken for {names[j]}"
        for i, j in pairs
    ]


def _calibrate(scores: Scores | None, run_dir: Path, checkpoint: Path, world: World) -> None:
    """Collective. Write calibration.json and print what it changes. Raises DataError.

    scores: on rank 0, None on other ranks.
    """
    found = distributed.from_main(
        lambda: None if scores is None else fit(scores.logits, scores.labels), world
    )
    if world.is_main and found is not None:
        write_calibration(run_dir, checkpoint, found)
        say(
            f"temperature {found.temperature:.4f}: expected calibration error ({NUM_BINS} bins) "
            f"{100 * found.ece_before:.2f} % before, {100 * found.ece_after:.2f} % after; loss "
            f"{found.loss_before:.4f} before, {found.loss_after:.4f} after"
        )


def _open_network(
    cfg: Config, file: str | None, options: EvaluateConfig, data: ImageSets, world: World
) -> tuple[nn.Module, dict, Path | None]:
    """Collective. The network, its origin for the record, and the checkpoint if it is one of a run.

    file: the weights to evaluate; None for those of the run, whose own model.weights are the ones
    that it started from.
    """
    if options.average is not None:
        trained = read_average(
            cfg,
            options.average,
            options.batch_norm_images,
            data.val.classes,
            lambda: _training_images(options, cfg, data),
            world,
        )
        return trained.model, trained.origin, None
    if file is None:
        checkpoints = cfg.run_dir / "checkpoints"
        directory = distributed.from_main(lambda: find_step(checkpoints, options.at_step), world)
        trained = distributed.on_all(lambda: read_trained(cfg, directory, data.val.classes), world)
        return trained.model, trained.origin, directory
    weights = distributed.first_on_node(
        partial(published_weights, cfg.model, data.val.classes), world
    ) or distributed.from_main(partial(weights_of_run, file, cfg.run.root), world)
    return *distributed.on_all(lambda: _from_file(cfg, data, *weights), world), None


def _training_images(options: EvaluateConfig, cfg: Config, data: ImageSets) -> SampleIndex:
    """Those of the run; `data` are other images if options.images is given."""
    if options.images is None:
        return data.train
    return open_data(cfg.data, trained=data.val.classes).train


def _from_file(
    cfg: Config, data: ImageSets, weights: str, known: list[str] | None
) -> tuple[nn.Module, dict]:
    """The network with the weights of a file, and their origin for the record.

    weights: the path of the file. known: its classes, if it is a run's. Raises ConfigError.
    """
    classes = data.val.classes
    model = build_model(without_weights(cfg.model), len(classes), cfg.data.image_size, cfg.seed)
    load_weights(model, Path(weights), classes, None, wanted_transform(cfg.model), known)
    return model, {"weights": weights}


def _record(found: Found, names: list[str]) -> dict:
    """The content of evaluation.json: origin, the metrics of metrics.jsonl, and counts per class.

    names: unique.
    """
    row = found.evaluation.row
    classes = {
        name: dict(zip(("num_images", "correct1", "correct5"), counts))
        for name, counts in zip(names, found.evaluation.per_class.tolist())
    }
    bad = {"bad_images": sorted(one.reason for one in found.bad)}
    intervals = {f"val/top{k}_interval_95": metric_interval(row, f"val/top{k}") for k in (1, 5)}
    return {**found.origin, **bad, **row, **intervals, "per_class": classes}


def _report(result: Evaluation, names: list[str], origin: dict) -> None:
    """Print a table of the classes, the worst first, and a line with the metrics."""
    table = Table(title=", ".join(f"{key} {value}" for key, value in origin.items()))
    for heading in ("class", "images", "top-1 %", "95 % interval", "top-5 %", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    rows = [(name, *counts) for name, counts in zip(names, result.per_class.tolist()) if counts[0]]
    rows.sort(key=lambda row: row[2] / row[1])
    for name, n, *correct in rows[:_MAX_ROWS]:
        cells = [cell for count in correct for cell in _cells(count, n)]
        table.add_row(name, f"{n:,}", *cells)
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
        f"loss {row['val/loss']:.4f}  {counts}  "
        f"{intervals_text(row, num_decimals=2)}"
    )


def _cells(num_correct: int, num_images: int) -> tuple[str, str]:
    """A share of images in percent, and its 95 % interval."""
    interval = percent_interval(num_correct, num_images)
    return f"{100 * num_correct / num_images:.1f}", interval_text(interval)
