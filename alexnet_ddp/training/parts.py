"""The parts of a run that have state, built and restored: model, optimizer, EMA, adapters, hook."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alexnet_ddp.checkpoint.format import weights_of_run
from alexnet_ddp.checkpoint.manager import LoadedGroups
from alexnet_ddp.config import Method
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.features import FeatureLoader
from alexnet_ddp.data.loader import Batch, Loader, build_loader
from alexnet_ddp.model import (
    Adapters,
    Backbone,
    ClassChange,
    build_model,
    check_image_size,
    follow_classes,
    freeze_batch_norm,
    initial_head,
    load_checkpoint,
    lr_factors,
    published_weights,
    transforms_input,
    without_weights,
)
from alexnet_ddp.parallel import build_parallel, evaluation_mode
from alexnet_ddp.parallel.group import ShardedTensor
from alexnet_ddp.runtime import distributed
from alexnet_ddp.training.adalora import RankAllocation
from alexnet_ddp.training.adapted import AdapterAverages, MergedEMA, MergedModel
from alexnet_ddp.training.efficiency import ModelFlops
from alexnet_ddp.training.ema import EMA
from alexnet_ddp.training.features import HeadFeatures
from alexnet_ddp.training.loss import class_weights
from alexnet_ddp.training.optim import OptimizerState, build_optimizer
from alexnet_ddp.training.setup import RunSetup, choose_parallelism
from alexnet_ddp.training.step import TrainStep
from alexnet_ddp.training.stragglers import Stopwatch

AnyLoader = Loader | FeatureLoader

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part of a run that has state; the protocol of torch.distributed.checkpoint.stateful."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ModelState:
    """The network's weights and buffers as a part of a checkpoint. `source` is for messages."""

    def __init__(self, model: nn.Module, source: str) -> None:
        self._model, self._source = model, source

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by torchvision's names."""
        return self._model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `state_dict`. Raises ConfigError if names or shapes differ."""
        load_checkpoint(self._model, state_dict, self._source)


class TrainingParts:
    """Everything that a step uses: the stateful parts by name, the step itself and the loaders.

    Collective. Parts are initialised from the configuration, then restored from `setup.saved`.
    on_phase: see TrainStep.
    """

    def __init__(
        self, setup: RunSetup, on_phase: Callable[[str], None] = lambda phase: None
    ) -> None:
        cfg, world = setup.cfg, setup.world
        self.setup = setup
        self.model = self._build_model()
        self.model_flops = ModelFlops(cfg, self.model, world)
        saved, setup.saved = self._follow_classes(setup.saved, self.model), {}  # free the memory
        # Before layers are split, so that an error names full shapes, and before HeadFeatures runs
        # the backbone.
        if saved:
            load_checkpoint(self.model, saved["model"], self._checkpoint_name())
        # By the names of the plain network: adapters and a hybrid replace its layers.
        rates = (cfg.finetune.backbone_lr_factor, cfg.finetune.layer_decay)
        self._lr_factors = lr_factors(self.model, *rates) if rates != (1, 1) else {}
        self.adapters = self._build_adapters()
        self.model.to(world.device).to(memory_format=torch.channels_last)
        self.allocation = self._build_allocation()
        can_freeze = cfg.finetune.freezes and self.adapters is None
        self.backbone = Backbone(self.model) if can_freeze else None
        if self.backbone is not None and self.is_frozen(setup.state.step):
            self.backbone.freeze()
        if cfg.finetune.freeze_batch_norm:
            freeze_batch_norm(self.model)
        self._features = (
            HeadFeatures(setup, self.model, on_phase) if cfg.finetune.cache_features else None
        )
        self._parallel = choose_parallelism(cfg, self.model, world)
        if cfg.trainer.compile:
            # A few recompilations per image size, if images grow. Past 8 torch would run eagerly.
            torch.compiler.config.recompile_limit = 64
            self.model.compile()
        trained = self.model if self._features is None else self._features.head
        self.parallel_model = build_parallel(self._parallel, trained, world)
        decay = cfg.trainer.ema_decay
        self.ema = EMA(self.model, decay) if decay is not None else None
        self._on_phase = on_phase
        self.train_step = self._build_step()
        self._stateful = self._name_parts()
        # After the warm-up of TrainStep, which leaves traces in a hook.
        if saved:
            self.load_state_dict(saved, setup.state.step)
            saved = {}
        elif self.parallel_model.hook is not None:
            self.parallel_model.hook.load_state_dict({})
            self.parallel_model.hook.set_step(0)
        self.train_step.load_state_dict(setup.state.sums, setup.state.scaler)
        self.train_loader, self.val_loader = self._build_loaders()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.train_step.optimizer

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the full network."""
        if self._features is not None:  # parallel_model is the head alone
            return sum(p.numel() for p in self.model.parameters())
        return self.parallel_model.num_parameters

    def state_dict(self) -> dict[str, dict[str, Tensor | ShardedTensor]]:
        """Collective. Part -> its tensors by name; a tensor may be a shard of a split one."""
        groups = {name: part.state_dict() for name, part in self._stateful.items()}
        return {
            name: self.parallel_model.sharded(tensors)
            for name, tensors in groups.items()
            if tensors or name in ("model", "optimizer")
        }

    def replica_tensors(self) -> dict[str, dict[str, Tensor | ShardedTensor]]:
        """Collective. Part -> its tensors by name, which must be equal on all ranks.

        As in state_dict(), but adapters are not merged, which may round otherwise on other CPUs.
        """
        if self.adapters is None:
            return self.state_dict()
        groups: dict[str, dict[str, Tensor | ShardedTensor]] = {
            "model": dict(self.model.state_dict()),
            "optimizer": dict(self._stateful["optimizer"].state_dict()),
        }
        if self.ema is not None:
            groups["ema"] = dict(self.ema.state_dict())
        return groups

    def load_state_dict(self, groups: LoadedGroups, step: int) -> None:
        """Collective. Restore all parts from full tensors, as after `step` steps.

        A part that `groups` lacks starts as new. Raises ConfigError if the model does not fit.
        """
        local = {name: self.parallel_model.local(tensors) for name, tensors in groups.items()}
        for name, part in self._stateful.items():
            part.load_state_dict(local.get(name, {}))
        if self.parallel_model.hook is not None:
            self.parallel_model.hook.set_step(step)

    def roll_back(self, step: int) -> int:
        """Collective. Restore the newest checkpoint, to continue with the data of `step`.

        Return the checkpoint's step. The hook starts as new: its memory belongs to later weights.
        """
        cfg, checkpoints = self.setup.cfg, self.setup.checkpoints
        checkpoint_step, groups = checkpoints.newest()
        groups.pop("hook", None)
        classes = self.setup.data.train.classes
        if checkpoints.classes_read not in (None, classes):  # saved before the classes changed
            size = cfg.data.image_size
            fresh = build_model(without_weights(cfg.model), len(classes), size, cfg.seed)
            groups = self._follow_classes(groups, fresh, quiet=True)
        self.load_state_dict(groups, step)
        return checkpoint_step

    def is_frozen(self, step: int) -> bool:
        """True if only the head is trained in step `step`: see finetune.method."""
        setup = self.setup
        return setup.cfg.finetune.is_frozen(step, setup.budget.steps_per_epoch)

    def unfreeze_due(self, step: int) -> bool:
        """True if unfreeze() must be called after `step` steps: step `step` trains the backbone."""
        return self.is_frozen(step - 1) and not self.is_frozen(step)

    def unfreeze(self) -> None:
        """Collective. Train all parameters from now on.

        The state is carried over by name, so the rest of the run is equal to that of a run that is
        resumed here from a checkpoint.
        """
        kept = self._stateful["optimizer"].state_dict()
        sums, scaler = self.train_step.meter.read(), self.train_step.scaler.state_dict()
        stopwatch = self.train_step.stopwatch
        del self._stateful, self.train_step, self.parallel_model
        assert self.backbone is not None  # unfreeze_due()
        self.backbone.unfreeze()
        if self.setup.cfg.finetune.freeze_batch_norm:
            freeze_batch_norm(self.model)
        gc.collect()  # DDP removes its hooks from the head's parameters when it is freed
        self.parallel_model = build_parallel(self._parallel, self.model, self.setup.world)
        self.train_step = self._build_step(stopwatch)
        self._stateful = self._name_parts()
        self._stateful["optimizer"].load_state_dict(kept)
        self.train_step.load_state_dict(sums, scaler)

    def batches(self, from_step: int) -> Iterator[Batch]:
        """This rank's micro-batches of all steps from `from_step` on."""
        setup, world = self.setup, self.setup.world
        steps = range(from_step, setup.budget.total_steps)
        micro_batch_size = setup.cfg.trainer.micro_batch_size
        work = setup.sampler.micro_batches(steps, world.rank, world.world_size, micro_batch_size)
        return self.train_loader.batches(work)

    def sync_replicas(self, step: int, planned: bool, progress: Callable[[], None]) -> bool:
        """Collective. True if the ranks are equal afterwards. They always are, but for local SGD.

        planned: they must be equal now. progress: called before each message.
        """
        hook = self.parallel_model.hook
        if hook is None:
            return True

        def tensors() -> list[Tensor]:  # buffers are averaged after each step
            weights = {name: p.detach() for name, p in self.model.named_parameters()}
            moments = [t for t in self._stateful["optimizer"].state_dict().values() if t.dim()]
            averages = self.ema.state_dict() if self.ema is not None else {}
            return [*weights.values(), *moments, *(averages[name] for name in weights if averages)]

        with self.train_step.stopwatch.exchange():
            return hook.sync_replicas(step, planned, tensors, progress)

    @contextmanager
    def evaluation_model(self) -> Iterator[nn.Module]:
        """Collective. The full model as it is evaluated: with averaged weights if there are any.

        With finetune.cache_features it is the head, whose inputs val_loader returns.
        Adapters are merged, so that a network of the checkpoint's weights gives the same results.
        Afterwards each module has its mode back: a frozen backbone trains in evaluation mode.
        """
        averaged = nullcontext() if self.ema is None else self.ema.in_place()
        merged = nullcontext() if self.adapters is None else self.adapters.merged()
        with averaged, merged, evaluation_mode(self.model):
            yield self.parallel_model.full_model()

    def close(self) -> None:
        """Stop the loaders' threads."""
        self.train_loader.close()
        self.val_loader.close()

    def _class_weights(self) -> Tensor | None:
        cfg, train = self.setup.cfg.trainer, self.setup.data.train
        weights = class_weights(cfg.class_weights, train.labels, len(train.classes))
        return None if weights is None else weights.to(self.setup.world.device)

    def _build_model(self) -> nn.Module:
        """The network with the weights that a new run starts from."""
        setup, cfg, world = self.setup, self.setup.cfg, self.setup.world
        classes, size, known = setup.data.train.classes, cfg.data.image_size, None
        start = without_weights(cfg.model, setup.state.transform_input)
        if not setup.saved and cfg.model.weights is not None:
            weights, known = distributed.first_on_node(
                partial(published_weights, cfg.model, classes), world
            ) or distributed.from_main(
                partial(weights_of_run, cfg.model.weights, cfg.run.root), world
            )
            start = replace(cfg.model, weights=weights)
        model = distributed.on_all(
            lambda: build_model(start, len(classes), size, cfg.seed, classes, known), world
        )
        setup.state.transform_input = transforms_input(model)
        check_image_size(model, len(classes), cfg.data.train_image_size(0), "data.start_image_size")
        return model

    def _build_loaders(self) -> tuple[AnyLoader, AnyLoader]:
        """The loaders of the training and the validation images, or of their features."""
        setup, data, world = self.setup, self.setup.data, self.setup.world
        if self._features is not None:
            return self._features.train, self._features.val
        val = build_loader(setup.cfg.data, data.val, None, world.num_cores, world.device)
        return build_train_loader(setup), val

    def _build_adapters(self) -> Adapters | None:
        """Collective. Add adapters to the network, if finetune.method asks for them."""
        cfg = self.setup.cfg
        if not cfg.finetune.adapts:
            return None
        adapters = distributed.on_all(
            lambda: Adapters(self.model, cfg.finetune, cfg.seed, cfg.data.image_size),
            self.setup.world,
        )
        if self._lr_factors:
            self._lr_factors = adapters.lr_factors(self._lr_factors)
        return adapters

    def _build_allocation(self) -> RankAllocation | None:
        setup, cfg = self.setup, self.setup.cfg.finetune
        if cfg.method is not Method.adalora:
            return None
        return RankAllocation(self.model, cfg, setup.budget.planned_steps, setup.world)

    def _build_step(self, stopwatch: Stopwatch | None = None) -> TrainStep:
        """Collective. The step, with an optimizer of the parameters that are trained now.

        stopwatch: that of the step before it.
        """
        cfg = self.setup.cfg
        size = cfg.data.image_size
        step = TrainStep(
            self.parallel_model,
            build_optimizer(
                cfg.optimizer, self.model, self.parallel_model.global_norms, self._lr_factors
            ),
            cfg.trainer,
            cfg.seed,
            self.setup.world,
            (3, size, size) if self._features is None else self._features.shape,
            ema=self.ema,
            class_weights=self._class_weights(),
            allocation=self.allocation,
            stopwatch=stopwatch,
            on_phase=self._on_phase,
        )
        if cfg.finetune.freezes:
            counts = [p.numel() for p in self.model.parameters() if p.requires_grad]
            total = self.num_parameters
            method = cfg.finetune.method.value
            log.info(
                "finetune.method=%s: %s of %s parameters are trained",
                *(method, f"{sum(counts):,}", f"{total:,}"),
            )
        return step

    def _checkpoint_name(self) -> str:
        return f"the checkpoint of {self.setup.cfg.run.name}"

    def _name_parts(self) -> dict[str, Stateful]:
        """The parts by the name of their file in a checkpoint. The averages follow the model."""
        model, name, ema, adapters = self.model, self._checkpoint_name(), self.ema, self.adapters
        parts: dict[str, Stateful] = {
            "model": MergedModel(model, adapters, name) if adapters else ModelState(model, name),
            "optimizer": OptimizerState(self.train_step.optimizer, model),
        }
        if adapters is not None:
            parts["adapters"] = adapters
        if self.allocation is not None:
            parts["ranks"] = self.allocation
        if ema is not None:
            parts["ema"] = MergedEMA(ema, adapters) if adapters else ema
        if ema is not None and adapters is not None:
            parts["ema_adapters"] = AdapterAverages(ema, adapters)
        if self.parallel_model.hook is not None:
            parts["hook"] = self.parallel_model.hook
        return parts

    def _follow_classes(
        self, groups: LoadedGroups, fresh: nn.Module, quiet: bool = False
    ) -> LoadedGroups:
        """Move the head's rows of a checkpoint to the positions of their classes in the data.

        fresh: the network as initialised; a class that the checkpoint lacks gets its rows. Rows
        keep their positions if the checkpoint's classes are not known.
        """
        then, now = self.setup.checkpoints.classes_read, self.setup.data.train.classes
        if not groups or then is None or then == now:
            return groups
        change = ClassChange(then, now)
        groups = dict(groups)
        has_memory = bool(groups.pop("hook", None))
        if not quiet:
            log.warning("classes: %s: rows of the head follow their class names", change)
            if has_memory:
                log.warning("parallel.hook starts without memory: it belongs to the earlier rows")
        device = self.setup.world.device
        rows = {name: tensor.to(device) for name, tensor in initial_head(fresh).items()}
        return {name: follow_classes(tensors, change, rows) for name, tensors in groups.items()}


def build_train_loader(setup: RunSetup) -> Loader:
    """The loader of the training images, augmented, at the sizes of their epochs."""
    cfg, world, data = setup.cfg, setup.world, setup.data
    size, side = cfg.data.image_size, cfg.data.resized_side
    augment = build_augment(cfg.augment, cfg.seed, size, side, data.colour_basis)
    return build_loader(cfg.data, data.train, augment, world.num_cores, world.device, True)
