"""Looks at validation images with the best weights of a run, and makes the pictures of the page."""

import logging
from base64 import b64encode
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_ddp.checkpoint.format import find_best
from alexnet_ddp.config import Config, OnBadImage, Precision
from alexnet_ddp.data.effects import apply_effects
from alexnet_ddp.data.image import BadImage, open_image, to_rgb
from alexnet_ddp.data.loader import Loader, build_loader
from alexnet_ddp.data.picture import jpeg, png
from alexnet_ddp.data.sampler import MicroBatch, evaluation_batches
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.report.activation import activation_maps, overlay
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import Preempted
from alexnet_ddp.runtime.run_record import read_classes
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.training.calibration import Outputs, Scores
from alexnet_ddp.training.class_metrics import unique_names
from alexnet_ddp.training.evaluation import Evaluation, evaluate
from alexnet_ddp.training.first_batch import FIRST_BATCH
from alexnet_ddp.training.trained import read_trained

log = logging.getLogger("alexnet_ddp")

_NUM_SHOWN = 12  # images of each kind
_SIDE = 160  # pixels of a picture
_BATCH_WIDTH = 1100  # pixels of the first batch
_MAX_FILTERS = 256
_GAP = 1  # pixels between filters


@dataclass(frozen=True)
class Shown:
    """An image of the page. picture, map: data URIs; map is None without class activation maps."""

    picture: str
    map: str | None
    name: str
    label: str
    predicted: str
    probability: float  # of the predicted class
    of_label: float  # the probability of the label
    loss: float

    @property
    def short_name(self) -> str:
        """The folder and the file, or the member of an archive."""
        return "/".join(self.name.rpartition(".tar:")[2].split("/")[-2:])


@dataclass(frozen=True)
class Filters:
    """The filters of the first convolution as one picture."""

    picture: str
    layer: str
    shape: tuple[int, ...]
    num_shown: int
    columns: int


@dataclass(frozen=True)
class Findings:
    """What the best weights do with validation images."""

    scores: Scores
    evaluation: Evaluation
    names: list[str]  # of the classes, unique, in the order of the labels
    checkpoint: str
    num_images: int  # of the validation images that were used
    num_val: int  # of all validation images
    num_train: int
    largest_losses: list[Shown]
    confident: list[Shown]
    filters: Filters | None


@torch.no_grad()
def examine(cfg: Config, max_images: int, world: World) -> Findings:
    """Collective. Evaluate the run's best weights on at most max_images validation images.

    They are a fixed choice. Images that cannot be read are left out. Raises RunError.
    """
    data = open_data(cfg.data, trained=read_classes(cfg.run_dir)["ids"])
    of_data = replace(data.normalised(cfg.data), on_bad_image=OnBadImage.skip)
    directory = find_best(cfg.run_dir / "checkpoints")
    trained = read_trained(replace(cfg, data=of_data), directory, data.val.classes)
    model = trained.model.to(world.device).to(memory_format=torch.channels_last).eval()
    # Of a WordNet class only the first of its synonyms.
    names = unique_names([name.split(",")[0] for name in data.class_names])
    val = data.val.subset(max_images)
    loader = build_loader(of_data, val, None, world.num_cores, world.device)
    with closing(loader):
        evaluation, scores = _evaluate(model, loader, cfg, val, world)
        pictures = _Pictures(model, loader, val, scores, names)
        largest = pictures.show(_largest_losses(scores))
        shown = {one.name for one in largest}
        rest = [
            k for k in _confident_mistakes(scores) if val.name(int(scores.indices[k])) not in shown
        ]
        confident = pictures.show(rest[:_NUM_SHOWN])
    return Findings(
        scores,
        evaluation,
        names,
        directory.name,
        len(val),
        len(data.val),
        len(data.train),
        largest,
        confident,
        first_filters(model),
    )


def first_batch(run_dir: Path) -> str | None:
    """batch.png of the run, reduced, as a data URI; None if there is none, or it is damaged."""
    file = run_dir / FIRST_BATCH
    if not file.is_file():
        return None
    try:
        pixels = np.asarray(to_rgb(open_image(file.read_bytes())))
        return data_uri(jpeg(pixels, _BATCH_WIDTH))
    except (BadImage, OSError) as error:
        log.warning("%s cannot be read: %s", file, error)
        return None


def first_filters(model: nn.Module) -> Filters | None:
    """The filters of the first convolution, if they are finite and take an RGB image; else None.

    Each filter is stretched to the whole range of brightness.
    """
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    name, layer = next(layers, (None, None))
    if name is None or layer is None or layer.weight.shape[1] != 3:
        return None
    weights = layer.weight.detach().double().cpu()[:_MAX_FILTERS].permute(0, 2, 3, 1).numpy()
    if not np.isfinite(weights).all():
        return None
    low, high = (edge(weights, axis=(1, 2, 3), keepdims=True) for edge in (np.min, np.max))
    pixels = (255 * (weights - low) / np.maximum(high - low, 1e-12)).round().astype(np.uint8)
    num, height, width, _ = pixels.shape
    columns = next((c for c in (16, 12, 8) if num % c == 0), 16)
    rows = -(-num // columns)
    sheet = np.full(
        (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 128, np.uint8
    )
    for k, one in enumerate(pixels):
        top, left = (
            _GAP + place * (side + _GAP) for place, side in zip(divmod(k, columns), (height, width))
        )
        sheet[top : top + height, left : left + width] = one
    shape = tuple(layer.weight.shape)
    return Filters(data_uri(png(sheet), "png"), name, shape, num, columns)


def data_uri(content: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


class _Pictures:
    """Loads images again, as the network sees them, with their class activation maps."""

    def __init__(
        self, model: nn.Module, loader: Loader, val: SampleIndex, scores: Scores, names: list[str]
    ) -> None:
        self._model, self._loader, self._val = model, loader, val
        self._scores, self._names = scores, names

    def show(self, places: list[int]) -> list[Shown]:
        """places: positions in the scores."""
        if not places:
            return []
        indices = self._scores.indices[places].numpy()
        (batch,) = self._loader.batches([MicroBatch(0, 0, indices, True)])
        shares = self._scores.logits[places].double().softmax(1)
        found = shares.argmax(1)
        inputs = apply_effects(batch.images, batch.effects).float()
        maps = activation_maps(self._model, inputs, found.to(inputs.device))
        pixels = batch.images.cpu().numpy()
        return [
            self._one(
                k, place, pixels[k], None if maps is None else maps[k], shares[k], int(found[k])
            )
            for k, place in enumerate(places)
        ]

    def _one(
        self,
        k: int,
        place: int,
        pixels: np.ndarray,
        values: np.ndarray | None,
        shares: Tensor,
        found: int,
    ) -> Shown:
        label = int(self._scores.labels[place])
        heat = None if values is None else data_uri(jpeg(overlay(pixels, values), _SIDE))
        return Shown(
            data_uri(jpeg(pixels, _SIDE)),
            heat,
            self._val.name(int(self._scores.indices[place])),
            self._names[label],
            self._names[found],
            float(shares[found]),
            float(shares[label]),
            -float(shares[label].clamp_min(1e-300).log()),
        )


def _evaluate(
    model: nn.Module, loader: Loader, cfg: Config, val: SampleIndex, world: World
) -> tuple[Evaluation, Scores]:
    """Collective. Raises Preempted after a stop signal."""
    outputs = Outputs()
    # Metrics of plugins are not shown, and a CPU computes in fp32.
    trainer = replace(cfg.trainer, metrics=[])
    if world.device.type == "cpu":
        trainer = replace(trainer, precision=Precision.fp32)
    works = evaluation_batches(len(val), trainer.eval_batch_size, world.rank, world.world_size)
    batches, stop = loader.batches(works), StopSignal()
    found = evaluate(model, batches, trainer, len(val.classes), world, stop, observe=outputs.add)
    scores = outputs.gather(world)
    if found is None or scores is None:
        raise Preempted("stopped before the images were evaluated; start the same command again")
    return found, scores


def _largest_losses(scores: Scores) -> list[int]:
    """Positions of the images with the largest losses, the largest first."""
    shares = scores.logits.double().log_softmax(1)
    losses = -shares.gather(1, scores.labels[:, None])[:, 0]
    return losses.argsort(descending=True, stable=True)[:_NUM_SHOWN].tolist()


def _confident_mistakes(scores: Scores) -> list[int]:
    """Positions of wrong predictions, the most probable first: twice as many as are shown."""
    highest, found = scores.logits.double().softmax(1).max(1)
    highest[found == scores.labels] = -1.0
    order = highest.argsort(descending=True, stable=True)[: 2 * _NUM_SHOWN].tolist()
    return [k for k in order if highest[k] >= 0]
