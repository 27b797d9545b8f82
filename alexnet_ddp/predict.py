"""Predict the most probable classes of images with a trained run.

python -m alexnet_ddp.predict run.name=X images=PATH_OR_GLOB_OR_DIR [output=FILE.jsonl]
torchrun --nproc_per_node=8 -m alexnet_ddp.predict run.name=X images=DIR output=FILE.csv
"""

if __name__ == "__main__":  # torch, below, is imported after the configuration is valid
    from alexnet_ddp.runtime import startup

    startup.begin("predict")

    from alexnet_ddp import cli

    cli.run("predict", "alexnet_ddp.predict:main")

import csv
import glob
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch

from alexnet_ddp import cli
from alexnet_ddp.api import TrainedRun, read_run
from alexnet_ddp.config import ConfigError, OnBadImage, PredictConfig
from alexnet_ddp.data.effects import apply_effects
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.index import FileStore, SampleIndex, list_images
from alexnet_ddp.data.sources.scan import watched
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World, all_gather_objects
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.runtime.terminal import Console, Table

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here

STDIN = "-"
_BATCH_SIZE = 64
_MAX_NAMED = 5  # bad files that get a warning; the output has all of them
_MAX_TABLE = 100  # images; more are printed as lines, as they come


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, in order; or why it cannot be read."""

    index: int  # of the image, in the order of the paths
    classes: list[str]
    probabilities: list[float]
    error: str | None = None


def main(options: PredictConfig, overrides: list[str]) -> None:
    """Predict all images, and write them to `output` if it is given; else print them.

    Raises DataError if no image can be read, or with on_bad_image=raise if one cannot.
    """
    run_dir = Path(options.run.root) / options.run.name
    with distributed.session(options.device) as world:
        distributed.from_main(lambda: check_output(options.output), world)
        paths = distributed.from_main(lambda: find_images(options.images), world)
        plugins = [one for one in overrides if one.lstrip("+").startswith("plugins=")]
        run = distributed.on_all(
            lambda: read_run(run_dir, cli.config_of_run(run_dir, plugins, opens_data=False)), world
        )
        found = predict(run, paths, options.top_k, world)
        if options.on_bad_image is OnBadImage["raise"]:
            found = _raise_for_bad(found)
        began = time.monotonic()
        if world.is_main:
            num_bad = _write(found, paths, options)
        else:
            num_bad = sum(one.error is not None for one in found)
        if num_bad == len(paths):
            raise DataError(f"none of the {num_bad:,} images can be read, see the warnings")
        seconds = time.monotonic() - began
        if world.is_main and options.output:
            bad = f", {num_bad:,} of them cannot be read" if num_bad else ""
            rate = f"{len(paths) / seconds:,.0f} images/s"
            say(f"{len(paths):,} images{bad}; {rate}; {printable(options.output)}")


def predict(run: TrainedRun, paths: list[str], top_k: int, world: World) -> Iterator[Prediction]:
    """Collective. Yield a Prediction for each path, in order, on all ranks.

    The ranks take the batches in turn. The result is the same for any number of ranks.
    """
    index = SampleIndex([], np.zeros(len(paths), np.int32), FileStore.pack("", paths))
    cfg = replace(run.config.data, on_bad_image=OnBadImage.skip)
    loader = build_loader(cfg, index, None, world.num_cores, world.device)
    model, names = run.model.to(world.device), run.classes
    work = evaluation_batches(len(paths), _BATCH_SIZE, world.rank, world.world_size)
    with closing(loader), torch.inference_mode():
        for batch in loader.batches(work):
            mine = [Prediction(one.index, [], [], one.reason) for one in batch.bad]
            if len(batch.labels):
                logits = model(apply_effects(batch.images, batch.effects)).float()
                top = logits.softmax(1).topk(min(top_k, len(names)))
                rows = zip(batch.indices.tolist(), top.indices.tolist(), top.values.tolist())
                mine += [Prediction(i, [names[c] for c in classes], p) for i, classes, p in rows]
            yield from sorted(all_gather_objects(mine), key=lambda one: one.index)


def _raise_for_bad(found: Iterable[Prediction]) -> Iterator[Prediction]:
    for one in found:
        if one.error is not None:
            raise DataError(f"{one.error}; leave it out with on_bad_image=skip")
        yield one


def _write(found: Iterable[Prediction], paths: list[str], options: PredictConfig) -> int:
    """Write or print the predictions. Return the number of images that cannot be read."""
    num_bad = 0
    if options.output:
        found = watched(found, len(paths), "images")
    with closing(build_sink(options.output, options.top_k, len(paths))) as sink:
        for one in found:
            sink.write(paths[one.index], one)
            if one.error is not None:
                num_bad += 1
                if num_bad <= _MAX_NAMED:
                    log.warning(one.error)
    if num_bad > _MAX_NAMED:
        more = "the output lists them" if options.output else "output=FILE lists them"
        log.warning("%s more images cannot be read; %s", f"{num_bad - _MAX_NAMED:,}", more)
    return num_bad


# --- output -------------------------------------------------------------------------------------


class Sink(Protocol):
    """A destination of predictions, which are written as they come."""

    def write(self, path: str, one: Prediction) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """{"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}, or an "error"."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, path: str, one: Prediction) -> None:
        found = [
            {"class": name, "probability": p} for name, p in zip(one.classes, one.probabilities)
        ]
        what = {"predictions": found} if one.error is None else {"error": one.error}
        self._file.write(json.dumps({"image": path} | what) + "\n")

    def close(self) -> None:
        self._file.close()


class Csv:
    """Columns: image, class_1, probability_1, ..., error."""

    def __init__(self, file: IO[str], top_k: int) -> None:
        self._file, self._top_k = file, top_k
        self._rows = csv.writer(file)
        pairs = [name for k in range(top_k) for name in (f"class_{k + 1}", f"probability_{k + 1}")]
        self._rows.writerow(["image", *pairs, "error"])

    def write(self, path: str, one: Prediction) -> None:
        cells = [c for pair in zip(one.classes, one.probabilities) for c in pair]
        cells += [""] * (2 * self._top_k - len(cells))
        self._rows.writerow([path, *cells, one.error or ""])

    def close(self) -> None:
        self._file.close()


class Lines:
    """Prints one line for each image."""

    def write(self, path: str, one: Prediction) -> None:
        if one.error is None:
            say(f"{printable(path)}  {_shown(one)}")

    def close(self) -> None:
        """Does nothing."""


class Page:
    """Prints a table of all images at the end."""

    def __init__(self) -> None:
        self._table = Table("image", "classes and their probabilities")
        self._is_empty = True

    def write(self, path: str, one: Prediction) -> None:
        if one.error is None:
            self._table.add_row(path, _shown(one))
            self._is_empty = False

    def close(self) -> None:
        if not self._is_empty:
            Console().print(self._table)


def build_sink(output: str | None, top_k: int, num_images: int) -> Sink:
    """The sink for `output`, by its suffix; without it, one that prints. See check_output."""
    if output is None:
        return Page() if num_images <= _MAX_TABLE else Lines()
    try:
        file = open(output, "w", newline="", errors="surrogateescape")  # noqa: SIM115 (a sink's)
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise ConfigError(f"output ({output}) {rule}; choose another file") from error
    return Csv(file, top_k) if output.endswith(".csv") else JsonLines(file)


def check_output(output: str | None) -> None:
    """Raise ConfigError unless `output` is None, or a .jsonl or .csv in an existing directory."""
    if output is None:
        return
    if not output.endswith((".jsonl", ".csv")):
        raise ConfigError(f"output ({output}) must end in .jsonl or .csv, which choose the format")
    if not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"output ({output}) must be in an existing directory; create it first")


def _shown(one: Prediction) -> str:
    pairs = zip(one.classes, one.probabilities)
    return "  ".join(f"{name} {probability:.3f}" for name, probability in pairs)


# --- images -------------------------------------------------------------------------------------


def find_images(pattern: str) -> list[str]:
    """Paths of images: those below a directory, one file, or the files that a glob matches.

    "-" reads one path per line from standard input. A directory is searched as for training. A
    file that is given, or matched by a glob, is used regardless of its suffix. Raises DataError.
    """
    if pattern == STDIN:
        found, notes = _lines_of_stdin(), list[str]()
    elif os.path.isdir(pattern):
        found, notes = list_images(pattern)
    else:
        matched = [pattern] if os.path.lexists(pattern) else _matches(pattern)
        found = [path for path in matched if os.path.isfile(path)]
        is_deep = "**" in pattern  # "**" matches the folders above the files, too
        others = [
            p for p in matched if not os.path.isfile(p) and not (is_deep and os.path.isdir(p))
        ]
        notes = (
            [f"ignored {len(others):,} entries (not regular files), such as {others[0]}"]
            if others
            else []
        )
    if not found:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(
            f"images ({pattern}) matches no image{why}; "
            "use a file, a directory, or a glob in quotes"
        )
    for note in notes:
        log.warning(note)
    return found


def _lines_of_stdin() -> list[str]:
    """The lines of standard input that are not empty, with any bytes that a path may have."""
    text = io.TextIOWrapper(sys.stdin.buffer, errors="surrogateescape", newline="\n")
    return [line for line in text.read().split("\n") if line]


def _matches(pattern: str) -> list[str]:
    """The sorted matches of a glob. Leading folders that exist are literal, with their brackets."""
    folder, rest = pattern, ""
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest) if rest else name
    found = sorted(glob.glob(os.path.join(glob.escape(folder), rest), recursive=True))
    for path in found if "**" in rest else ():
        parents = [os.path.realpath(parent) for parent in Path(os.path.abspath(path)).parents]
        if len(set(parents)) < len(parents):  # glob would follow such a link 40 times
            raise DataError(
                f"{path} is below a link to a folder that contains it; "
                "remove that link, or list the folders"
            )
    return found
