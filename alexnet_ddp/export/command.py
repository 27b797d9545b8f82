"""Export a run's model, and evaluate the exported file before the folder gets its name.

alexnet-ddp export run.name=X format=onnx output=DIR [preprocessing=true] [push=ORG/NAME]
"""

import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_ddp import cli
from alexnet_ddp.checkpoint.format import find_best
from alexnet_ddp.config import Config, ConfigError, DataConfig
from alexnet_ddp.config.export import ExportConfig, ExportFormat
from alexnet_ddp.config.option import key_of, shown, spec_of
from alexnet_ddp.data.effects import normalise
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.export.check import Comparison, compare
from alexnet_ddp.export.folder import (
    metrics_of,
    preprocessing_of,
    write_inputs,
    write_report,
)
from alexnet_ddp.export.formats import WithPreprocessing, open_model, require_libraries, write_model
from alexnet_ddp.export.hub import require_hub, upload
from alexnet_ddp.export.timm_folder import write_config
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.accuracy import interval_text
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.environment import read_ranks
from alexnet_ddp.runtime.errors import MachineError
from alexnet_ddp.runtime.files import require_folder_of, sync_directory
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.run_record import RunRecord, read_classes
from alexnet_ddp.runtime.startup import before_exit
from alexnet_ddp.tracking.exported import send_export
from alexnet_ddp.training.averaging import read_average
from alexnet_ddp.training.calibration import read_temperature
from alexnet_ddp.training.trained import Trained, read_trained

log = logging.getLogger(__name__)

_WAIT_S = 30.0  # longer than the difference between the starts of two ranks
_OF_WEIGHTS = ("checkpoint", "weights", "batch_norm_images")  # what a record states of them
_OWN_OPTIONS = (
    *("format", "output", "preprocessing", "push"),
    *("average", "batch_norm_images"),
)


def main(options: ExportConfig, overrides: list[str]) -> None:
    """Write options.output. Raises ConfigError, DataError, NoCheckpoint, MachineError, and
    WrongExport if the exported file does not compute the run's results. A failed upload keeps
    the folder.
    """
    _require_one_process()
    output = Path(options.output)
    _check_output(output)
    require_libraries(options.format)
    if options.push is not None:
        require_hub(options.push)
    kept = [one for one in overrides if key_of(one) not in _OWN_OPTIONS]
    cfg = cli.config_of_run(options.run_dir, kept)
    # TF32 rounds products to 10 bits, which would hide a difference.
    with distributed.session(cfg.device, tf32=False) as world:
        data = open_data(cfg.data, trained=read_classes(cfg.run_dir)["ids"])
        cfg = replace(cfg, data=data.normalised(cfg.data))
        _require_own_inputs(cfg.data, RunRecord(cfg.run_dir, cfg.run.name).options)
        trained, temperature = _trained(options, cfg, data, world)
        with _draft(output) as folder:
            result = _write(folder, options, cfg, trained, data, world)
            metrics = metrics_of(options.format, cfg.run.name, trained, result)
            metrics["temperature"] = temperature
            card = options.format is ExportFormat.huggingface or options.push is not None
            write_report(folder, options.format, cfg, metrics, len(data.train), card)
    origin = trained.origin["checkpoint"]
    ties = f" ({result.num_ties} ties differ)" if result.num_ties else ""
    say(
        f"{output}: {options.format.value} of {cfg.run.name} ({origin}), evaluated: "
        f"top-1 {metrics['top1']:.2f} % ({interval_text(metrics['top1_interval_95'], 2)} %)  "
        f"top-5 {metrics['top5']:.2f} % ({interval_text(metrics['top5_interval_95'], 2)} %)  of "
        f"{metrics['num_images']:,} images, as the run{ties}"
    )
    _compare_with_evaluation(cfg.run_dir / "evaluation.json", metrics, world.device.type)
    send_export(cfg.logger, cfg.run_dir, output, options.format.value, _about(metrics))
    if options.push is not None:
        title = f"{options.format.value} of {cfg.run.name} ({origin})"
        say(f"pushed to {upload(output, options.push, title)}")


def _compare_with_evaluation(file: Path, metrics: dict[str, Any], device: str) -> None:
    """Log a line if an evaluation of the same weights and centre crops has different counts."""
    try:
        known = json.loads(file.read_bytes())
        run = metrics["run"]
        of_same = all(known.get(key) == run.get(key) for key in _OF_WEIGHTS)
        if not of_same or "crops" in known:
            return
        before = [int(known[f"val/{name}"]) for name in ("correct1", "correct5", "num_images")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # there is none, or it is damaged
    now = [metrics[name] for name in ("correct1", "correct5", "num_images")]
    if now != before:
        text = "top-1 {:,} and top-5 {:,} of {:,} images"
        log.info(
            "%s has %s of this checkpoint, the export on %s in fp32 has %s: the evaluation "
            "had another device or precision (rounding), other options of data, or other images",
            *(file, text.format(*before), device, text.format(*now)),
        )


def _about(metrics: dict[str, Any]) -> dict[str, Any]:
    """What wandb shows of the exported model."""
    names = ("format", "num_images", "top1", "top1_interval_95", "top5", "top5_interval_95", "loss")
    found = {name: metrics[name] for name in names}
    return found | {name: metrics["run"][name] for name in ("checkpoint", "step")}


def _trained(
    options: ExportConfig, cfg: Config, data: ImageSets, world: World
) -> tuple[Trained, float | None]:
    """The network to export: of the best checkpoint, or a mean; and its temperature, if known."""
    classes = data.val.classes
    if options.average is not None:
        num_images, train = options.batch_norm_images, data.train
        found = read_average(cfg, options.average, num_images, classes, lambda: train, world)
        found.model.cpu().to(memory_format=torch.contiguous_format)
        return found, None
    best = find_best(cfg.run_dir / "checkpoints")
    return read_trained(cfg, best, classes), read_temperature(cfg.run_dir, best)


def _require_own_inputs(data: DataConfig, recorded: dict[str, Any]) -> None:
    """Raise ConfigError unless images are prepared as in the evaluations of the run.

    The check of the exported file cannot notice it: both models would get the other inputs.
    recorded: the options of the run. One that it did not know had the effect of null.
    """
    for name in ("image_size", "eval_resize", "eval_interpolation", "mean", "std"):
        option, unset = f"data.{name}", spec_of(type(data), name).as_unset
        known, value = recorded.get(option) or unset, getattr(data, name) or unset
        if known is not None and value != known:
            rule = f"is not that of the run ({shown(known)}), whose preprocessing is exported"
            raise ConfigError(f"{option} ({shown(value)}) {rule}; leave {option} out")


def _require_one_process() -> None:
    """Raise ConfigError under torchrun with several ranks."""
    ranks = read_ranks(os.environ)
    if ranks.world_size > 1:
        if ranks.rank != 0:
            time.sleep(_WAIT_S)  # until rank 0 has reported: torchrun stops all when one ends
        rule = f"export takes one process, not {ranks.world_size}"
        raise ConfigError(f"{rule}; start it without torchrun")


def _check_output(output: Path) -> None:
    if os.path.lexists(output):
        raise ConfigError(f"output ({output}) exists; give another folder, or remove it first")
    require_folder_of("output", output)


@contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, which becomes `output` when the block ends.

    If the block raises, or a stop signal arrives, it is removed. Raises MachineError for an error
    of the disk.
    """
    output = output.absolute()
    draft = output.with_name(f".{output.name}.tmp-{os.getpid()}")

    def remove() -> None:
        for _ in range(100):  # after a stop signal, the main thread may add files meanwhile
            shutil.rmtree(draft, ignore_errors=True)
            if not draft.exists():
                return

    try:
        with before_exit(remove):
            draft.mkdir()
            yield draft
            sync_directory(draft)
            draft.rename(output)
            sync_directory(output.parent)
    except OSError as error:
        rule = f"output ({output}) could not be written ({error.strerror or error})"
        raise MachineError(f"{rule}; free some space, or give another folder") from error
    finally:
        remove()


def _write(
    folder: Path,
    options: ExportConfig,
    cfg: Config,
    trained: Trained,
    data: ImageSets,
    world: World,
) -> Comparison:
    """Write the model and its inputs into `folder`; return the comparison with the run's model."""
    how = preprocessing_of(cfg.data, options.preprocessing)
    write_inputs(folder, trained, how)
    network = trained.model.eval()
    if options.format is ExportFormat.huggingface:
        write_config(folder, trained.config, network, trained.names, how)
    written, example = _interface(copy.deepcopy(network), how)
    classes = {"ids": trained.ids, "names": trained.names}
    write_model(options.format, written, example, classes, folder)
    del written
    model = network.to(world.device).to(memory_format=torch.channels_last)
    loader = build_loader(cfg.data, data.val, None, world.num_cores, world.device)
    works = evaluation_batches(len(data.val), cfg.trainer.eval_batch_size, 0, 1)
    runner = open_model(options.format, folder, world.num_cores)
    try:
        return compare(
            model,
            runner,
            loader.batches(works),
            lambda images: _prepared(images, how),
            options.preprocessing,
        )
    finally:
        loader.close()


def _interface(network: nn.Module, how: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The module to export, and an input of two images for it: torch may treat 1 as a constant."""
    images = torch.zeros(2, how["size"], how["size"], 3, dtype=torch.uint8)
    if how["normalised_by"] == "model":
        normalisation = (tuple(how["mean"]), tuple(how["std"]))
        return WithPreprocessing(network, normalisation).eval(), _prepared(images, how)
    return network, _prepared(images, how)


def _prepared(images: Tensor, how: dict[str, Any]) -> Tensor:
    """The exported model's input for uint8 images [n, size, size, 3], by preprocessing.json."""
    if how["normalised_by"] == "model":
        return images.permute(0, 3, 1, 2).contiguous()
    normalisation = (tuple(how["mean"]), tuple(how["std"]))
    return normalise(images, None, normalisation).contiguous()
