"""finetune.cache_features: the frozen backbone runs once over all images, the head then trains."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from alexnet_ddp.config import ConfigError, OnBadImage
from alexnet_ddp.data.features import FeatureFile, FeatureLoader, FeatureWriter, modification_times
from alexnet_ddp.data.loader import Batch, build_loader
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.scan import watched
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.model.head import find_head, head_parameters
from alexnet_ddp.parallel import evaluation_mode
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.errors import MachineError
from alexnet_ddp.runtime.files import user_cache
from alexnet_ddp.training.precision import autocast
from alexnet_ddp.training.setup import RunSetup

_FORMAT = 1  # of the files; part of their name
_NUM_PROBES = 2  # random inputs that show what the network computes

log = logging.getLogger(__name__)


class HeadFeatures:
    """The head of a network, and loaders of its inputs for all images.

    head: the layer, of which `model` is still a part. shape: of one input. train, val: loaders.

    Collective. Computes the inputs with all ranks, unless the user's cache on this node has them.
    model: with its final weights, on the device. on_phase: see TrainStep. Raises ConfigError for a
    network that does not end with its head, DataError for a bad image (data.on_bad_image=raise),
    MachineError if the features cannot be kept.
    """

    def __init__(self, setup: RunSetup, model: nn.Module, on_phase: Callable[[str], None]) -> None:
        self._setup, self._model, self._on_phase = setup, model, on_phase
        self._name = find_head(model)
        self.head = model.get_submodule(self._name)
        self.shape, self._norms = distributed.on_all(self._probe, setup.world)
        self.train = self._loader("training images", setup.data.train)
        self.val = self._loader("validation images", setup.data.val)

    def _loader(self, what: str, index: SampleIndex) -> FeatureLoader:
        """Collective. A loader of the features of `index`, which are computed if necessary."""
        world = self._setup.world
        accepts_bad = self._setup.cfg.data.on_bad_image is OnBadImage.skip
        file = distributed.from_main(partial(self._file, index), world)
        is_first = world.local_rank == 0
        found = distributed.on_all(lambda: file.open(True, accepts_bad), world, is_first)
        if distributed.any_rank(is_first and found is None, world):
            shape = " x ".join(map(str, self.shape))
            log.info(
                "finetune.cache_features: computing %s values for each of %s %s, in %s",
                *(shape, f"{len(index):,}", what, file.data),
            )
            self._compute(what, index, file)
        else:
            log.info("finetune.cache_features: the values of %s are in %s", what, file.data)
        features = file.open(False, accepts_bad)
        missing = None if features else MachineError(f"{file.data} is gone; start again")
        distributed.raise_together(missing, world)
        assert features is not None
        return FeatureLoader(features, index.labels, world.device)

    def _compute(self, what: str, index: SampleIndex, file: FeatureFile) -> None:
        """Collective. Compute the features of `index`; one rank of each node writes `file`.

        The batches are the same for every number of ranks, and so is their rounding.
        """
        world, skipped = self._setup.world, list[Skipped]()
        create = partial(FeatureWriter, file)
        writer = distributed.on_all(create, world, takes_part=world.local_rank == 0)
        cfg, size = self._setup.cfg, self._setup.cfg.trainer.eval_batch_size
        loader = build_loader(cfg.data, index, None, world.num_cores, world.device)
        work = evaluation_batches(len(index), size, world.rank, world.world_size)
        starts = range(0, len(index), size * world.world_size)
        rounds: Iterable[int] = watched(starts, len(starts), what) if world.is_main else starts
        try:
            with closing(loader):
                batches = loader.batches(work)
                for start in rounds:
                    self._on_phase("start")
                    mine = distributed.on_all(lambda: self._next(batches, size, skipped), world)
                    rows = distributed.all_gather(mine, world).flatten(0, 1)[: len(index) - start]
                    if writer is not None:
                        writer.add(rows.cpu().numpy())
            bad = sorted(distributed.all_gather_objects(skipped), key=lambda one: one.index)
            if writer is not None:
                writer.commit(bad)
            distributed.raise_together(None if writer is None else writer.error, world)
        finally:
            if writer is not None:
                writer.close()

    def _next(self, batches: Iterator[Batch], size: int, skipped: list[Skipped]) -> Tensor:
        """The features of the next batch: float32 [size, ...], NaN for images that are missing.

        Appends the images that could not be read to `skipped`. Raises DataError.
        """
        batch = next(batches)
        rows = torch.full((size, *self.shape), torch.nan, device=self._setup.world.device)
        if len(batch.labels):
            bad = {one.position for one in batch.bad}
            slots = [k for k in range(len(batch.micro_batch.indices)) if k not in bad]
            rows[slots] = self._run(batch.inputs())[0]
        skipped += batch.bad
        return rows

    @torch.inference_mode()
    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the input of the head, the logits) for images [n, 3, size, size]: float32 [n, ...]."""
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda head, inputs: found.extend(inputs))
        try:
            with evaluation_mode(self._model), self._autocast():
                logits = self._model(images)
        finally:
            hook.remove()
        if len(found) != 1 or len(found[0]) != len(images):
            raise self._unsuitable()
        return found[0].float(), logits.float()

    @torch.inference_mode()
    def _probe(self) -> tuple[tuple[int, ...], list[float]]:
        """The shape of one input of the head, and the norms of those of a few random images.

        Raises ConfigError unless the head returns the logits.
        """
        size = self._setup.cfg.data.image_size
        noise = torch.randn(_NUM_PROBES, 3, size, size, generator=torch.Generator().manual_seed(0))
        inputs, logits = self._run(noise.to(self._setup.world.device))
        with self._autocast():
            own = self.head(inputs).float()
        if own.shape != logits.shape or not torch.allclose(own, logits, rtol=1e-3, atol=1e-4):
            raise self._unsuitable()
        return tuple(inputs.shape[1:]), inputs.flatten(1).norm(dim=1).tolist()

    def _autocast(self) -> torch.autocast:
        return autocast(self._setup.cfg.trainer.precision, self._setup.world)

    def _unsuitable(self) -> ConfigError:
        rule = f"needs a network that ends with its head, and {type(self._model).__name__} computes"
        remedy = "leave finetune.cache_features false"
        return ConfigError(
            f"finetune.cache_features=true {rule} something after {self._name}; {remedy}"
        )

    @cached_property
    def _backbone(self) -> str:
        return _digest(self._model, set(head_parameters(self._model)))

    def _file(self, index: SampleIndex) -> FeatureFile:
        """The file of the features of `index`. Its name covers all that they depend on.

        Raises ConfigError if the user has no cache folder.
        """
        folder = user_cache("features")
        if folder is None:
            rule = "needs a folder for the features, and the user has no home directory"
            raise ConfigError(f"finetune.cache_features=true {rule}; set XDG_CACHE_HOME")
        cfg = self._setup.cfg
        facts = {
            "format": _FORMAT,
            "data": index.fingerprint(),
            "times": modification_times(index),
            "size": [cfg.data.image_size, cfg.data.resized_side, cfg.data.eval_interpolation],
            "normalisation": cfg.data.normalisation,
            "precision": cfg.trainer.precision,
            "backbone": self._backbone,
        }
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        return FeatureFile(folder / key, len(index), self.shape, self._norms)


def _digest(model: nn.Module, excluded: set[str]) -> str:
    """SHA-256 (hex) of the names and values of the weights and buffers but the excluded ones."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in excluded:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
