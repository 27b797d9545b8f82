"""What TensorBoard and wandb show of the last evaluation: classes, and the largest losses."""

import logging
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alexnet_ddp.config import DataConfig
from alexnet_ddp.data.loader import Batch, build_loader
from alexnet_ddp.data.picture import draw, jpeg
from alexnet_ddp.data.sampler import MicroBatch
from alexnet_ddp.data.sources.sets import ImageSets
from alexnet_ddp.runtime.distributed import World, all_gather
from alexnet_ddp.runtime.errors import RunError
from alexnet_ddp.tracking import ClassResults, Examples, Tracker
from alexnet_ddp.training.metrics import Confusion

log = logging.getLogger(__name__)

NUM_SHOWN = 16  # images
_SIDE = 256  # pixels, at most
_MAX_CONFUSION = 1000  # classes: the counts of all pairs take 8 MB


@dataclass(frozen=True)
class Mistake:
    """An image with a large loss. probability: of the predicted class."""

    index: int
    label: int
    predicted: int
    probability: float
    loss: float


class LargestLosses:
    """Keeps the NUM_SHOWN images of an evaluation with the largest losses, on the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rows = torch.zeros(0, 5, dtype=torch.float64, device=world.device)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add the images of a batch. logits: [n, classes]. No host wait."""
        shares = logits.double().log_softmax(1)
        losses = -shares.gather(1, batch.labels[:, None])[:, 0]
        highest, found = shares.max(1)
        columns = (losses, batch.indices, batch.labels, found, highest.exp())
        rows = torch.cat([self._rows, torch.stack([one.double() for one in columns], dim=1)])
        self._rows = rows[rows[:, 0].topk(min(NUM_SHOWN, len(rows))).indices]

    def gather(self) -> list[Mistake]:
        """Collective. Return the largest losses of all ranks, the largest first."""
        mine = self._rows.new_full((NUM_SHOWN, 5), -1)
        mine[: len(self._rows)] = self._rows
        rows = all_gather(mine, self._world).flatten(0, 1).tolist()
        found = [
            Mistake(int(index), int(label), int(predicted), probability, loss)
            for loss, index, label, predicted, probability in rows
            if index >= 0
        ]
        return sorted(found, key=lambda one: (-one.loss, one.index))[:NUM_SHOWN]


class LastEvaluation:
    """Collects what is shown of an evaluation on all ranks."""

    def __init__(self, cfg: DataConfig, data: ImageSets, world: World) -> None:
        self._cfg, self._data, self._world = cfg, data, world
        num_classes = len(data.class_names)
        counts_pairs = num_classes <= _MAX_CONFUSION
        self._confusion = Confusion(num_classes, world.device) if counts_pairs else None
        self._losses = LargestLosses(world)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add the images of a batch. logits: float32 [n, classes]. No host wait."""
        if self._confusion is not None:
            self._confusion.add(batch, logits)
        self._losses.add(batch, logits)

    def show(self, tracker: Tracker, step: int, per_class: Tensor) -> None:
        """Collective. per_class: Evaluation.per_class. Images are read again on rank 0."""
        counts = self._confusion.read().numpy() if self._confusion is not None else None
        mistakes = self._losses.gather()
        if self._world.is_main:
            names = self._data.class_names
            tracker.classes(ClassResults(step, names, per_class.numpy(), counts))
            examples = self._examples(step, mistakes)
            if examples is not None:
                tracker.examples(examples)

    def _examples(self, step: int, mistakes: list[Mistake]) -> Examples | None:
        """The pictures of the images; None if one cannot be read now, which is logged."""
        val, world = self._data.val, self._world
        indices = np.array([one.index for one in mistakes], dtype=np.int64)
        loader = build_loader(self._cfg, val, None, world.num_cores, world.device)
        try:
            with closing(loader):
                (batch,) = loader.batches([MicroBatch(0, 0, indices, True)])
                pixels, read = batch.images.cpu().numpy(), batch.indices.tolist()
        except RunError as error:  # the run does not need them
            log.warning("the images with the largest losses are not shown: %s", error)
            return None
        shown = [one for one in mistakes if one.index in read]
        names = [name.split(",")[0] for name in self._data.class_names]
        title = f"the {len(shown)} of {len(val):,} validation images with the largest losses"
        labels = [f"{names[one.label]}? {names[one.predicted]}" for one in shown]
        return Examples(
            step,
            np.asarray(draw(list(pixels), labels, title)),
            [jpeg(image, _SIDE) for image in pixels],
            [self._caption(one, names) for one in shown],
        )

    def _caption(self, one: Mistake, names: list[str]) -> str:
        # The folder and the file, or the member of an archive.
        file = "/".join(self._data.val.name(one.index).rpartition(".tar:")[2].split("/")[-2:])
        found = f"predicted {names[one.predicted]} ({one.probability:.0%})"
        return f"loss {one.loss:.2f}: label {names[one.label]}, {found}, {file}"
