"""What a training is made of, as it stands at some step: data, order, budget, state, and what was built from them."""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_ddp.checkpoint.background import Groups
from alexnet_ddp.checkpoint.find import weights_of_run
from alexnet_ddp.checkpoint.identity import DataFacts, first_fingerprint, identity
from alexnet_ddp.checkpoint.store import Checkpoints
from alexnet_ddp.config import (
    AUTO,
    AlexNet2012AugmentConfig,
    AutoParallelConfig,
    Config,
    ConfigError,
    DDPConfig,
    HybridConfig,
    ParallelConfig,
    Precision,
    WireDtype,
)
from alexnet_ddp.cost_model.choose import choose_guessing, guess
from alexnet_ddp.cost_model.network import read_network
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import Batch, build_loader
from alexnet_ddp.data.sampler import build_sampler, micro_batches
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.model import (
    ClassChange,
    build_model,
    check_image_size,
    follow_classes,
    head_parameters,
    load_checkpoint,
    transforms_input,
    without_weights,
)
from alexnet_ddp.parallel import LocalSGD, SplitTensor, build_parallel
from alexnet_ddp.parallel.layers import find_layers
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training.ema import EMA
from alexnet_ddp.training.optim import (
    build_optimizer,
    load_state_by_name,
    needs_whole_tensors,
    state_by_name,
)
from alexnet_ddp.training.precision import check_precision
from alexnet_ddp.training.schedule import Budget, build_lr_schedule
from alexnet_ddp.training.step import TrainStep

log = logging.getLogger(__name__)


class Training:
    """One rank's part of it. `state.step` is the only clock: everything else derives from it.

    Collective: all that is called here. up_to: stand at the newest checkpoint of this step or before; write nothing.
    """

    def __init__(self, cfg: Config, world: World, up_to: int | None = None) -> None:
        self._cfg, self._world = cfg, world
        check_precision(cfg.trainer.precision, world)
        self.data = distributed.first_on_node(lambda: open_data(cfg.data, may_make=True), world)
        self.sampler = build_sampler(cfg, self.data.train)
        self.budget = Budget.plan(
            cfg.trainer, self.sampler.steps_per_epoch, cfg.checkpoint.save_every_steps
        )
        windows = self.sampler.windows.fingerprint() if self.sampler.windows else None
        who = identity(cfg, self.data.train.fingerprint(), windows)
        if isinstance(cfg.augment, AlexNet2012AugmentConfig):
            basis = self.data.colour_basis
            who["augment.colour_basis"] = basis and [part.tolist() for part in basis]
        facts = _data_facts(self.data)
        # What ranks must have alike; images first, in words, since a fingerprint alone names no difference.
        alike = {
            "training images": _described(self.data.train),
            "validation images": _described(self.data.val),
        }
        alike |= {key: value for key, value in who.items() if key != "data"} | {
            "budget": str(self.budget)
        }
        alike |= {
            name: getattr(cfg.trainer, name)
            for name in ("eval_batch_size", "on_nan", "check_every_steps")
        }
        distributed.require_same(alike, world)
        self.checkpoints = Checkpoints(
            cfg.run_dir, cfg.checkpoint, who, world, self.sampler.steps_per_epoch, facts
        )
        self.state, self._saved = self.checkpoints.resume(
            cfg.run.name, cfg.resume.allow_changes, up_to
        )

    @property
    def is_complete(self) -> bool:
        return self.budget.is_end(self.state.step) and self.state.evaluated_at == self.state.step

    def build(self) -> None:
        """What a step needs, from the configuration or from the checkpoint."""
        cfg, world, data, saved = self._cfg, self._world, self.data, self._saved
        classes, size, known = data.train.classes, cfg.data.image_size, None
        start = without_weights(
            cfg.model, self.state.transform_input
        )  # a checkpoint has all the weights
        if not saved and cfg.model.weights is not None:
            weights, known = distributed.from_main(
                lambda: weights_of_run(cfg.model.weights, cfg.run.root), world
            )
            start = replace(cfg.model, weights=weights)
        num_classes = len(classes)
        self.model = distributed.on_all(
            lambda: build_model(start, num_classes, size, cfg.seed, classes, known), world
        )
        self.state.transform_input = transforms_input(self.model)
        check_image_size(
            self.model, num_classes, cfg.data.train_image_size(0), "data.start_image_size"
        )
        if saved:
            saved = self._saved = self._by_class(saved, self.model, say=True)
            load_checkpoint(self.model, saved.pop("model"), f"the checkpoint of {cfg.run.name}")
        self.model.to(world.device, memory_format=torch.channels_last)
        parallel = self._parallel()
        reason = needs_whole_tensors(cfg.optimizer)
        if isinstance(parallel, HybridConfig) and reason is not None:
            raise ConfigError(f"{reason}, and parallel=hybrid splits tensors; use parallel=ddp")
        if cfg.trainer.compile:
            torch.compiler.config.recompile_limit = (
                64  # a few a size, where images grow; past 8 it would go eager
            )
            self.model.compile()
        self.parallel_model = build_parallel(parallel, self.model, world)
        self.optimizer = build_optimizer(
            cfg.optimizer, self.model, self.parallel_model.global_norms
        )
        load_state_by_name(
            self.optimizer, self.model, self.parallel_model.local(saved.pop("optimizer", {}))
        )
        lr = cfg.optimizer.lr_at(cfg.trainer.global_batch_size)
        self.lr = build_lr_schedule(cfg.scheduler, lr, self.budget)
        self.train_step = TrainStep(
            self.parallel_model, self.optimizer, cfg.trainer, cfg.seed, world, cfg.data.image_size
        )
        self.train_step.load(self.state.sums, self.state.scaler)
        if self.parallel_model.hook is not None:
            self.parallel_model.hook.go_on(self.state.step, saved.pop("hook", {}))
        if cfg.trainer.ema_decay is not None:
            self.train_step.ema = EMA(self.model, cfg.trainer.ema_decay)
            self.train_step.ema.load(self.parallel_model.local(saved.pop("ema", {})))

        augment = build_augment(
            cfg.augment, cfg.seed, cfg.data.image_size, cfg.data.eval_resize, data.colour_basis
        )
        self.train_loader = build_loader(
            cfg.data, data.train, augment, world.num_cores, world.device, True
        )
        self.val_loader = build_loader(cfg.data, data.val, None, world.num_cores, world.device)
        self.batches = self._from_here()

    def tensors(self) -> dict[str, dict[str, Tensor | SplitTensor]]:
        """What a checkpoint holds: file stem -> tensors by name, some of which may be split over the ranks."""
        groups = {
            "model": self.model.state_dict(),
            "optimizer": state_by_name(self.optimizer, self.model),
        }
        if self.train_step.ema is not None:
            groups["ema"] = self.train_step.ema.tensors()
        hook = self.parallel_model.hook
        if hook is not None and (remembered := hook.tensors(self._world)):
            groups["hook"] = remembered
        return {stem: self.parallel_model.canonical(tensors) for stem, tensors in groups.items()}

    def meet(self, planned: bool, progress: Callable[[], None]) -> bool:
        """Collective. True where the ranks are equal: always, but under local SGD between two of its meetings.

        planned: they must be. progress: called where a meeting gets on.
        """
        hook = self.parallel_model.hook
        if not isinstance(hook, LocalSGD):
            return True

        def learnt() -> list[Tensor]:  # buffers are averaged after each step
            weights = {name: p.detach() for name, p in self.model.named_parameters()}
            moments = [t for t in state_by_name(self.optimizer, self.model).values() if t.dim()]
            averages = self.train_step.ema.tensors() if self.train_step.ema is not None else {}
            return [*weights.values(), *moments, *(averages[name] for name in weights if averages)]

        return hook.meet(self.state.step, planned, learnt, progress)

    @contextmanager
    def as_evaluated(self) -> Iterator[nn.Module]:
        """Collective. The whole model with the weights that an evaluation counts: the averages, where there are any."""
        with nullcontext() if self.train_step.ema is None else self.train_step.ema.in_place():
            yield self.parallel_model.whole_model()

    def roll_back(self, step: int) -> int:
        """Weights and optimizer of the newest checkpoint, and the data from `step` on; the checkpoint's step."""
        to, tensors = self.checkpoints.newest()
        cfg, num_classes = self._cfg, len(self.data.train.classes)
        if self.checkpoints.classes_read not in (
            None,
            self.data.train.classes,
        ):  # saved before the classes changed
            fresh = build_model(
                without_weights(cfg.model), num_classes, cfg.data.image_size, cfg.seed
            )
            tensors = self._by_class(tensors, fresh)
        local = {stem: self.parallel_model.local(whole) for stem, whole in tensors.items()}
        load_checkpoint(self.model, local["model"], f"the checkpoint of step {to}")
        load_state_by_name(self.optimizer, self.model, local["optimizer"])
        if self.train_step.ema is not None:
            self.train_step.ema.load(local.get("ema", {}))
        if self.parallel_model.hook is not None:
            self.parallel_model.hook.go_on(step, {})
        self.state.step = step
        self.batches = self._from_here()
        return to

    def close(self) -> None:
        self.train_loader.close()
        self.val_loader.close()

    def _by_class(self, groups: Groups, fresh: nn.Module, say: bool = False) -> Groups:
        """A checkpoint's tensors with the head's rows at the places of their classes in the data.

        fresh: the network as initialised. Rows keep their positions if the checkpoint's classes are not known.
        """
        then, now = self.checkpoints.classes_read, self.data.train.classes
        if then is None or then == now:
            return groups
        change = ClassChange(then, now)
        if say:
            log.warning("classes: %s: rows of the head follow their class names", change)
            if groups.pop("hook", None):
                log.warning(
                    "what parallel.hook remembers belongs to the earlier rows: it starts afresh"
                )
        names, own = head_parameters(fresh), fresh.state_dict()
        rows = {name: own[name].to(self._world.device) for name in names}
        return {stem: follow_classes(tensors, change, rows) for stem, tensors in groups.items()}

    def _parallel(self) -> ParallelConfig:
        """Collective. The user's choice, or the one of the model of costs where that is left to it."""
        cfg, world = self._cfg, self._world
        is_hybrid = isinstance(cfg.parallel, HybridConfig)
        if not isinstance(cfg.parallel, AutoParallelConfig) and not (
            is_hybrid and cfg.parallel.group_size == AUTO
        ):
            return cfg.parallel
        reason = needs_whole_tensors(cfg.optimizer)
        if reason is not None and not is_hybrid:
            log.info("parallel=auto takes ddp: %s", reason)
            return DDPConfig()
        if cfg.trainer.compile:
            log.info("parallel=auto takes ddp: trainer.compile=true does not go with a hybrid")
            return DDPConfig()
        # All of a step's: a hybrid exchanges activations in each of its passes, ddp its gradients once.
        images = micro_batches(cfg.trainer.global_batch_size, world.world_size, None)[0]
        gpu = torch.cuda.get_device_name() if world.device.type == "cuda" else None

        def choose() -> tuple[int, str]:
            names = find_layers(self.model, cfg.parallel.split) if is_hybrid else None
            network = read_network(self.model, cfg.data.image_size, names)
            machines = guess(world.world_size, world.local_world_size, gpu, cfg.trainer.precision)
            narrow = cfg.trainer.precision is not Precision.fp32
            narrow |= is_hybrid and cfg.parallel.wire_dtype is WireDtype.bf16
            choice = choose_guessing(network, *machines, images, is_hybrid, 2 if narrow else 4)
            return choice.strategy.group, choice.reason

        group, reason = distributed.from_main(choose, world)
        if is_hybrid:
            log.info("parallel.group_size=auto takes %s", reason)
            return replace(cfg.parallel, group_size=group)
        log.info("parallel=auto takes %s", reason)
        return HybridConfig(group_size=group) if group > 1 else DDPConfig()

    def _from_here(self) -> Generator[Batch]:
        steps, world = range(self.state.step, self.budget.total_steps), self._world
        works = self.sampler.work(
            steps, world.rank, world.world_size, self._cfg.trainer.micro_batch_size
        )
        return self.train_loader.batches(works)


def _data_facts(data: ImageSets) -> DataFacts:
    classes, labels = data.train.classes, data.train.labels
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    names = {"ids": classes, "names": data.class_names}
    return DataFacts(names, counts, first_fingerprint(classes, labels), data.val.fingerprint())


def _described(index: SampleIndex) -> str:
    """Enough to tell two sets of images apart, and to see how they differ."""
    return f"{len(index)} images of {len(index.classes)} classes with fingerprint {index.fingerprint()[:24]}"
