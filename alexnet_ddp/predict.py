"""Predict the most probable classes of images with a trained run.

python -m alexnet_ddp.predict run.name=X images=PATH_OR_GLOB_OR_DIR [output=FILE.jsonl]
"""

if __name__ == "__main__":  # torch, below, is imported after the configuration is valid
    from alexnet_ddp.runtime import startup

    startup.begin("predict")

    from alexnet_ddp import cli

    cli.run("predict", "alexnet_ddp.predict:main")

import glob
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_ddp import cli
from alexnet_ddp.api import read_run
from alexnet_ddp.config import ConfigError, DataConfig, PredictConfig
from alexnet_ddp.data.decode import BadImage, centre_into
from alexnet_ddp.data.effects import normalise
from alexnet_ddp.data.image import read_file
from alexnet_ddp.data.sources.index import list_images
from alexnet_ddp.runtime.distributed import choose_device
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.terminal import Console, Table

log = logging.getLogger("alexnet_ddp")  # __name__ is __main__ here

_BATCH_SIZE = 64
_MAX_NAMED = 5  # bad files in the error message; each of the others gets a warning


def main(options: PredictConfig, overrides: list[str]) -> None:
    """Print a table of predictions, and write them to `output` as JSON lines if it is given.

    Raises DataError at the end if a file could not be read; it names these files.
    """
    run_dir = Path(options.run.root) / options.run.name
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise ConfigError(
            f"output ({options.output}) must be in an existing directory; create it first"
        )
    paths = find_images(options.images)
    plugins = [one for one in overrides if one.lstrip("+").startswith("plugins=")]
    run = read_run(run_dir, cli.config_of_run(run_dir, plugins, opens_data=False))
    device, names = choose_device(options.device, 0), run.classes
    model = run.model.to(device)
    bad: list[str] = []
    table = Table("image", "classes and their probabilities")
    lines: list[str] = []
    for path, probabilities in _probabilities(model, paths, run.config.data, device, bad):
        top = probabilities.topk(min(options.top_k, len(names)))
        found = [
            {"class": names[i], "probability": p}
            for p, i in zip(top.values.tolist(), top.indices.tolist())
        ]
        table.add_row(
            path, "  ".join(f"{entry['class']} {entry['probability']:.3f}" for entry in found)
        )
        lines.append(json.dumps({"image": path, "predictions": found}) + "\n")
    if options.output:  # before printing, which may fail: the reader of a pipe may have ended
        Path(options.output).write_text("".join(lines))
    if lines:
        Console().print(table)
    for line in bad[_MAX_NAMED:]:
        log.warning(line)
    if bad:
        raise DataError(
            f"{len(bad)} of {len(paths)} images cannot be read: {'; '.join(bad[:_MAX_NAMED])}"
        )


def find_images(pattern: str) -> list[str]:
    """Paths of images: those below a directory, one file, or the files that a glob matches.

    A directory is searched as for training. A file that is given, or matched by a glob, is used
    regardless of its suffix. Raises DataError.
    """
    if os.path.isdir(pattern):
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


@torch.inference_mode()
def _probabilities(
    model: nn.Module, paths: list[str], cfg: DataConfig, device: torch.device, bad: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, probabilities): float [num_classes], on the CPU.

    Files that cannot be read are appended to `bad`, with the reason.
    """
    for start in range(0, len(paths), _BATCH_SIZE):
        shown: list[str] = []
        pixels = np.empty((_BATCH_SIZE, cfg.image_size, cfg.image_size, 3), np.uint8)
        for path in paths[start : start + _BATCH_SIZE]:
            try:
                slot, how = pixels[len(shown)], cfg.eval_interpolation
                centre_into(slot, read_file(path), cfg.resized_side, how)
                shown.append(path)
            except (BadImage, OSError) as error:
                bad.append(f"{path}: {error}")
        if shown:
            images = torch.from_numpy(pixels[: len(shown)]).to(device)
            inputs = normalise(images, None, cfg.normalisation)
            yield from zip(shown, model(inputs).float().softmax(1).cpu())
