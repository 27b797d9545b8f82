"""Show images to a trained run: the most probable classes of each.

python -m alexnet_ddp.predict run.name=X images=PATH_OR_GLOB_OR_DIR [output=FILE.jsonl]
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from alexnet_ddp.runtime import startup

    startup.begin("predict")

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

_BATCH = 64
_MOST_NAMED = 5  # bad files in the last line; the others get a line each


def main(ask: PredictConfig, overrides: list[str]) -> None:
    """Print a table, write JSON lines where asked to. Images that cannot be read are named, and end it with code 65."""
    run_dir = Path(ask.run.root) / ask.run.name
    if ask.output and not Path(ask.output).absolute().parent.is_dir():
        raise ConfigError(
            f"output ({ask.output}) must lie in a directory that exists; make it first"
        )
    paths = find_images(ask.images)
    plugins = [o for o in overrides if o.lstrip("+").startswith("plugins=")]
    run = read_run(run_dir, cli.config_of_run(run_dir, plugins))
    device, names = choose_device(ask.device, 0), run.classes
    model = run.model.to(device)
    bad: list[str] = []
    table = Table("image", "classes and their probabilities")
    lines: list[str] = []
    for path, probabilities in _probabilities(model, paths, run.config.data, device, bad):
        top = probabilities.topk(min(ask.top_k, len(names)))
        found = [
            {"class": names[i], "probability": p}
            for p, i in zip(top.values.tolist(), top.indices.tolist())
        ]
        table.add_row(
            path, "  ".join(f"{entry['class']} {entry['probability']:.3f}" for entry in found)
        )
        lines.append(json.dumps({"image": path, "predictions": found}) + "\n")
    if ask.output:  # before anything is printed: the reader of a pipe may go
        Path(ask.output).write_text("".join(lines))
    if lines:
        Console().print(table)
    for line in bad[_MOST_NAMED:]:
        log.warning(line)
    if bad:
        raise DataError(
            f"{len(bad)} of {len(paths)} files are no images: {'; '.join(bad[:_MOST_NAMED])}"
        )


def find_images(pattern: str) -> list[str]:
    """The images below a directory, as training finds them; or a file; or the files that a glob matches.

    A file that is named, by itself or by a glob, is taken whatever its suffix. Raises DataError.
    """
    if os.path.isdir(pattern):
        found, notes = list_images(pattern)
    else:
        matched = [pattern] if os.path.lexists(pattern) else _matches(pattern)
        found = [path for path in matched if os.path.isfile(path)]
        is_deep = "**" in pattern  # it matches folders on its way to the files
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
            f"images ({pattern}) names no image{why}; give a file, a directory, or a glob in quotes"
        )
    for note in notes:
        log.warning(note)
    return found


def _matches(pattern: str) -> list[str]:
    """What a glob matches, sorted. Leading folders that exist are taken literally, brackets included."""
    folder, rest = pattern, ""
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest) if rest else name
    found = sorted(glob.glob(os.path.join(glob.escape(folder), rest), recursive=True))
    for path in found if "**" in rest else ():
        parents = [os.path.realpath(parent) for parent in Path(os.path.abspath(path)).parents]
        if len(set(parents)) < len(parents):  # glob follows such a link 40 times
            raise DataError(
                f"{path} is below a link to a folder that contains it; remove that link, or name the folders"
            )
    return found


@torch.inference_mode()
def _probabilities(
    model: nn.Module, paths: list[str], cfg: DataConfig, device: torch.device, bad: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Each readable image with its softmax, float [num_classes] on the CPU; the others go to `bad` with the reason."""
    for start in range(0, len(paths), _BATCH):
        shown, slots = [], np.empty((_BATCH, cfg.image_size, cfg.image_size, 3), np.uint8)
        for path in paths[start : start + _BATCH]:
            try:
                slot, how = slots[len(shown)], cfg.eval_interpolation
                centre_into(slot, read_file(path), cfg.eval_resize, how)
                shown.append(path)
            except (BadImage, OSError) as error:
                bad.append(f"{path}: {error}")
        if shown:
            images = torch.from_numpy(slots[: len(shown)]).to(device)
            inputs = normalise(images, None, cfg.normalisation)
            yield from zip(shown, model(inputs).float().softmax(1).cpu())


if __name__ == "__main__":
    cli.run("predict", main)
