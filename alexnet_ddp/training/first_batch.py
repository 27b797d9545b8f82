"""batch.png: the first images of a run as the network sees them, with their labels."""

import io
import logging
from pathlib import Path

import numpy as np

from alexnet_ddp.data.effects import apply_effects, to_pixels
from alexnet_ddp.data.loader import Batch, Loader
from alexnet_ddp.data.picture import draw
from alexnet_ddp.data.sampler import GlobalBatchSampler, MicroBatch
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.files import write_bytes

log = logging.getLogger(__name__)

FIRST_BATCH = "batch.png"
_COUNT = 32  # images


def write_first_batch(
    run_dir: Path, loader: Loader, sampler: GlobalBatchSampler, class_names: list[str]
) -> np.ndarray | None:
    """Write run_dir/batch.png: up to 32 images of the first global batch.

    They are cropped, augmented, mixed and normalised as in training. class_names: by label.
    Return the picture, uint8 [height, width, 3]; None if it cannot be made, which is logged,
    because the run does not need it.
    """
    indices = sampler.batch(0)
    shown = MicroBatch(0, 0, indices[:_COUNT], True, int(indices[-1]))
    try:
        (batch,) = loader.batches([shown])
        pixels = to_pixels(apply_effects(batch.images, batch.effects), batch.effects.normalisation)
        title = f"{run_dir.name}: {len(pixels)} of the {len(indices)} images of the first step"
        picture = draw(list(pixels), _labels(batch, class_names), title)
        out = io.BytesIO()
        picture.save(out, "PNG")
        write_bytes(run_dir / FIRST_BATCH, out.getvalue())
        return np.asarray(picture)
    except DataError as error:  # the first step reports it, or leaves the image out
        log.info("%s is not written: %s", FIRST_BATCH, error)
    except OSError as error:
        log.warning("%s cannot be written: %s", run_dir / FIRST_BATCH, error.strerror or error)
    return None


def _labels(batch: Batch, class_names: list[str]) -> list[str]:
    """The class of each image; if images are mixed, the one with the larger share, after it."""
    names = [name.split(",")[0] for name in class_names]
    labels, mixing = batch.labels.tolist(), batch.effects.mixing
    if mixing is None:
        return [names[label] for label in labels]
    pairs = zip(labels, mixing.labels.tolist(), mixing.share.tolist())
    return [
        f"{max(share, 1 - share):.0%} {names[own if share >= 0.5 else other]}"
        for own, other, share in pairs
    ]
