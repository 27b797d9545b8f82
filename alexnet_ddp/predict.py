"""Show images to a trained run: the most probable classes of each.

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
from alexnet_ddp.checkpoint import files
from alexnet_ddp.checkpoint.find import find_best
from alexnet_ddp.config import Config, ConfigError, DataConfig, PredictConfig
from alexnet_ddp.data.decode import BadImage, centre_into
from alexnet_ddp.data.effects import normalise
from alexnet_ddp.data.image import read_file
from alexnet_ddp.data.sources.index import list_images
from alexnet_ddp.model import build_model, load_checkpoint, without_weights
from alexnet_ddp.runtime.distributed import choose_device
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.terminal import Console, Table
from alexnet_ddp.tracking import read_classes

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
    cfg = cli.config_of_run(run_dir, [])
    device = choose_device(ask.device, 0)
    model, names = _trained(cfg, run_dir)
    model = model.to(device).eval()
    bad: list[str] = []
    table = Table("image", "classes and their probabilities")
    lines: list[str] = []
    for path, probabilities in _probabilities(model, paths, cfg.data, device, bad):
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


def _trained(cfg: Config, run_dir: Path) -> tuple[nn.Module, list[str]]:
    """The network of the best checkpoint, and the names of its classes: later ones of the run may have others."""
    best = find_best(run_dir / "checkpoints")
    state = files.read_state(best)
    names = (files.classes_of(best, state) or read_classes(run_dir))["names"]
    start = without_weights(cfg.model, state.get("transform_input", False))
    model = build_model(start, len(names), cfg.data.image_size, cfg.seed)
    load_checkpoint(model, files.read_tensors(best, files.stem_of_weights(best)), str(best))
    return model, names


@torch.inference_mode()
def _probabilities(
    model: nn.Module, paths: list[str], cfg: DataConfig, device: torch.device, bad: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Each readable image with its softmax, float [num_classes] on the CPU; the others go to `bad` with the reason."""
    for start in range(0, len(paths), _BATCH):
        shown, slots = [], np.empty((_BATCH, cfg.image_size, cfg.image_size, 3), np.uint8)
        for path in paths[start : start + _BATCH]:
            try:
                centre_into(slots[len(shown)], read_file(path), cfg.eval_resize)
                shown.append(path)
            except (BadImage, OSError) as error:
                bad.append(f"{path}: {error}")
        if shown:
            images = torch.from_numpy(slots[: len(shown)]).to(device)
            yield from zip(shown, model(normalise(images, None)).float().softmax(1).cpu())
