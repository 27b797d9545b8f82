"""Predict the most probable classes of images with a trained network.

python -m alexnet_ddp.predict run.name=X images=PATH_OR_GLOB_OR_DIR [output=FILE.jsonl]
python -m alexnet_ddp.predict export=DIR images=DIR
python -m alexnet_ddp.predict model=alexnet model.weights=FILE classes=FILE.txt images=DIR
torchrun --nproc_per_node=8 -m alexnet_ddp.predict run.name=X images=DIR output=FILE.csv
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np
import torch

from alexnet_ddp.api import TrainedRun
from alexnet_ddp.config import OnBadImage
from alexnet_ddp.config.predict import PredictConfig
from alexnet_ddp.data.effects import apply_effects
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.index import FileStore, SampleIndex
from alexnet_ddp.data.sources.scan import watched
from alexnet_ddp.predict.embeddings import LayerOutput, build_embedding_sink
from alexnet_ddp.predict.images import find_images
from alexnet_ddp.predict.network import check_choice, open_network
from alexnet_ddp.predict.output import Prediction, Sink, build_sink
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World, all_gather_objects
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.files import require_folder_of
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.runtime.tables import require_pyarrow

log = logging.getLogger(__name__)

_BATCH_SIZE = 64
_MAX_NAMED = 5  # bad files that get a warning; the output has all of them


def main(options: PredictConfig, overrides: list[str]) -> None:
    """Predict all images; write the predictions, the embeddings, or both, else print the former.

    Raises DataError if no image can be read, or with on_bad_image=raise if one cannot.
    """
    check_choice(options, overrides)
    with distributed.session(options.device) as world:
        distributed.from_main(lambda: _check_files(options), world)
        paths = distributed.from_main(lambda: find_images(options.images), world)
        run = open_network(options, overrides, world)
        options = replace(options, top_k=min(options.top_k, len(run.classes)))
        run.model.to(world.device).to(memory_format=torch.channels_last)  # as its inputs are
        layer, width = None, 0
        if options.embeddings is not None:
            layer, width = distributed.on_all(lambda: _open_layer(options, run), world)
        found = predict(run, paths, options, world, layer)
        if options.on_bad_image is OnBadImage["raise"]:
            found = _raise_for_bad(found)
        began = time.monotonic()
        num_bad, num_asked = _write(found, paths, options, width, world)
        if num_bad == len(paths):
            raise DataError(f"none of the {num_bad:,} images can be read, see the warnings")
        rate = len(paths) / (time.monotonic() - began)
        if world.is_main:
            _summarise(options, len(paths), num_bad, num_asked, rate)


def predict(
    run: TrainedRun,
    paths: FileStore,
    options: PredictConfig,
    world: World,
    layer: LayerOutput | None = None,
) -> Iterator[Prediction]:
    """Collective. Yield a Prediction for each of `paths`, in order, on all ranks.

    The ranks take the batches in turn. The result is the same for any number of ranks.
    options.top_k: at most the number of the run's classes. layer: of the run's model, for
    embeddings.
    """
    index = SampleIndex([], np.zeros(len(paths), np.int32), paths)
    cfg = replace(run.config.data, on_bad_image=OnBadImage.skip)
    loader = build_loader(cfg, index, None, world.num_cores, world.device)
    work = evaluation_batches(len(paths), _BATCH_SIZE, world.rank, world.world_size)
    with closing(loader), torch.inference_mode():
        for batch in loader.batches(work):
            mine = [Prediction(one.index, [], [], one.reason) for one in batch.bad]
            if len(batch.labels):
                logits = run.model(apply_effects(batch.images, batch.effects)).float()
                mine += _predictions(run, options, batch.indices.tolist(), logits, layer)
            yield from sorted(all_gather_objects(mine), key=lambda one: one.index)


def _predictions(
    run: TrainedRun,
    options: PredictConfig,
    indices: list[int],
    logits: torch.Tensor,
    layer: LayerOutput | None,
) -> Iterator[Prediction]:
    """The predictions of a batch. logits: float32 [n, classes]."""
    probabilities = (logits / (run.temperature or 1.0)).softmax(1)
    top = probabilities.topk(options.top_k)
    embeddings = [None] * len(indices) if layer is None else layer.rows()
    rows = zip(indices, top.indices.tolist(), top.values.tolist(), embeddings)
    for i, classes, values, embedding in rows:
        least = options.min_confidence
        asks = None if least is None else values[0] < least
        names = [run.classes[c] for c in classes]
        yield Prediction(i, names, values, asks=asks, embedding=embedding)


def _open_layer(options: PredictConfig, run: TrainedRun) -> tuple[LayerOutput, int]:
    """The layer of the embeddings, and the length of a row. Raises ConfigError."""
    layer = LayerOutput(run.model, options.layer)
    return layer, layer.width(run.model, run.config.data.image_size)


def _raise_for_bad(found: Iterable[Prediction]) -> Iterator[Prediction]:
    for one in found:
        if one.error is not None:
            raise DataError(f"{one.error}; leave it out with on_bad_image=skip")
        yield one


def _write(
    found: Iterable[Prediction], paths: FileStore, options: PredictConfig, width: int, world: World
) -> tuple[int, int]:
    """Write or print the predictions on rank 0. width: the length of an embedding.

    Returns the number of images that cannot be read, and of those to ask a person about.
    """
    num_bad = num_asked = 0
    with ExitStack() as stack:
        sinks = _open_sinks(stack, options, width, len(paths)) if world.is_main else []
        if world.is_main and (options.output or options.embeddings):
            found = watched(found, len(paths), "images")
        for one in found:
            num_bad += one.error is not None
            num_asked += one.asks is True
            for sink in sinks:
                sink.write(paths.name(one.index), one)
            if one.error is not None and num_bad <= _MAX_NAMED:
                log.warning(one.error)
    if num_bad > _MAX_NAMED:
        more = "the output lists them" if options.output else "output=FILE lists them"
        log.warning("%s more images cannot be read; %s", f"{num_bad - _MAX_NAMED:,}", more)
    return num_bad, num_asked


def _open_sinks(
    stack: ExitStack, options: PredictConfig, width: int, num_images: int
) -> list[Sink]:
    """The destinations of the predictions, which `stack` closes."""
    sinks = []
    if options.output is not None or options.embeddings is None:
        sinks.append(stack.enter_context(closing(build_sink(options, num_images))))
    if options.embeddings is not None:
        sinks.append(stack.enter_context(closing(build_embedding_sink(options.embeddings, width))))
    return sinks


def _summarise(
    options: PredictConfig, num_images: int, num_bad: int, num_asked: int, rate: float
) -> None:
    """Print a line about the run, unless there are only printed predictions."""
    files = [printable(file) for file in (options.output, options.embeddings) if file is not None]
    if not files and options.min_confidence is None:
        return
    bad = f", {num_bad:,} of them cannot be read" if num_bad else ""
    least = options.min_confidence
    asked = "" if least is None else f", {num_asked:,} to ask a person (min_confidence={least:g})"
    say("; ".join([f"{num_images:,} images{bad}{asked}", f"{rate:,.0f} images/s", *files]))


def _check_files(options: PredictConfig) -> None:
    """Raise ConfigError unless the files to write can be: existing folders, known libraries."""
    require_pyarrow("output", options.output)
    require_pyarrow("embeddings", options.embeddings)
    for name in ("output", "embeddings"):
        value = getattr(options, name)
        if value is not None:
            require_folder_of(name, value)
