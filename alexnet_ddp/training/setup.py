"""What a run is before anything is built: its data, its order, its length, and where it resumes."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from alexnet_ddp.checkpoint.identity import (
    DataFacts,
    choice_of_images,
    identity,
    labels_fingerprint,
)
from alexnet_ddp.checkpoint.manager import CheckpointManager
from alexnet_ddp.config import (
    AUTO,
    AlexNet2012AugmentConfig,
    AutoParallelConfig,
    Config,
    ConfigError,
    DataConfig,
    DDPConfig,
    Hook,
    HybridConfig,
    Method,
    ParallelConfig,
    Precision,
    WireDtype,
)
from alexnet_ddp.cost_model.choose import choose_guessing, guess
from alexnet_ddp.cost_model.network import read_network
from alexnet_ddp.data.sampler import build_sampler, micro_batch_sizes
from alexnet_ddp.data.sampling import describe
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.parallel import find_layers
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training.metrics import UserMetrics
from alexnet_ddp.training.optim import needs_full_tensors
from alexnet_ddp.training.precision import check_precision
from alexnet_ddp.training.schedule import Budget, build_lr_schedule

log = logging.getLogger(__name__)

_FIRST_STEP = {
    Hook.powersgd: "powersgd_start_step",
    Hook.post_local_sgd: "local_sgd_start_step",
}


class RunSetup:
    """Data, sampler, budget, learning rates, checkpoints and the state that the run resumes from.

    `state.step` is the only clock of a run: everything else is derived from it. `saved` are the
    tensors of the checkpoint, empty for a new run.

    Collective. up_to: resume from the newest checkpoint of this step or an earlier one, and write
    nothing. Raises ConfigError if the ranks have different data or options.
    """

    def __init__(self, cfg: Config, world: World, up_to: int | None = None) -> None:
        self.world = world
        check_precision(cfg.trainer.precision, world)
        UserMetrics(
            cfg.trainer.metrics, world.device
        )  # refuses unknown names before the run starts
        self.data = distributed.first_on_node(lambda: open_data(cfg.data, may_make=True), world)
        self.cfg = cfg = replace(cfg, data=self.data.normalised(cfg.data))
        self.sampler = build_sampler(cfg, self.data.train)
        if self.sampler.sampling is not None:
            found = describe(self.sampler.sampling, self.data.class_names)
            log.info("data.sampling=%s: %s", cfg.data.sampling, found)
        self.budget = Budget.plan(
            cfg.trainer, self.sampler.steps_per_epoch, cfg.checkpoint.save_every_steps
        )
        self._check_frozen()
        self._check_hook()
        base_lr = cfg.optimizer.lr_at(cfg.trainer.global_batch_size)
        self.lr: Callable[[int], float] = build_lr_schedule(cfg.scheduler, base_lr, self.budget)
        run_identity = self._identity()
        self._require_same_on_all_ranks(run_identity)
        self.checkpoints = CheckpointManager(
            cfg.run_dir,
            cfg.checkpoint,
            run_identity,
            world,
            self.sampler.steps_per_epoch,
            _data_facts(cfg.data, self.data),
        )
        self.state, self.saved = self.checkpoints.resume(
            cfg.run.name, cfg.resume.allow_changes, up_to
        )

    @property
    def is_over(self) -> bool:
        """The last step is done, or trainer.patience or trainer.max_hours ends the run."""
        trainer, state = self.cfg.trainer, self.state
        is_late = trainer.max_hours is not None and state.trained_s >= 3600 * trainer.max_hours
        is_worse = trainer.patience is not None and state.since_best >= trainer.patience
        return is_late or is_worse or self.budget.is_end(state.step)

    @property
    def is_complete(self) -> bool:
        """The run is over and its last step is evaluated."""
        return self.is_over and self.state.evaluated_at == self.state.step

    def _check_frozen(self) -> None:
        """Raise ConfigError if finetune.method=gradual would never train the backbone."""
        finetune, per_epoch = self.cfg.finetune, self.budget.steps_per_epoch
        if finetune.method is not Method.gradual:
            return
        what = f"finetune.head_epochs ({finetune.value_of('head_epochs'):g})"
        if finetune.is_frozen(self.budget.planned_steps - 1, per_epoch):
            rule = f"leaves none of the {self.budget.planned_steps} steps to the layers before it"
            raise ConfigError(f"{what} {rule}; lower it, or train for more epochs")
        if finetune.is_frozen(self.budget.total_steps - 1, per_epoch):
            log.warning(
                "%s: the run ends with trainer.max_steps=%d before other layers than the "
                "classifier are trained",
                *(what, self.budget.total_steps),
            )

    def _check_hook(self) -> None:
        """Warn if parallel.hook has no effect."""
        parallel = self.cfg.parallel
        if not isinstance(parallel, DDPConfig) or parallel.hook is Hook.none:
            return
        if self.world.world_size == 1:
            log.warning("parallel.hook=%s has no effect with one rank", parallel.hook.value)
            return
        option = _FIRST_STEP.get(parallel.hook)
        if option is not None and parallel.value_of(option) >= self.budget.total_steps:
            log.warning(
                "parallel.hook=%s starts at step %d, and the run has %d steps; give parallel.%s",
                *(parallel.hook.value, parallel.value_of(option), self.budget.total_steps, option),
            )

    def _identity(self) -> dict[str, object]:
        """The options and data that may not change when a run is resumed."""
        windows = self.sampler.windows.fingerprint() if self.sampler.windows else None
        found = identity(self.cfg, self.data.train.fingerprint(), windows)
        if isinstance(self.cfg.augment, AlexNet2012AugmentConfig):
            basis = self.data.colour_basis
            found["augment.colour_basis"] = basis and [part.tolist() for part in basis]
        return found

    def _require_same_on_all_ranks(self, run_identity: dict[str, object]) -> None:
        """Collective. Images come first and in words: a fingerprint alone names no difference."""
        trainer = self.cfg.trainer
        same: dict[str, object] = {
            "training images": _description(self.data.train),
            "validation images": _description(self.data.val),
        }
        same |= {key: value for key, value in run_identity.items() if key != "data"}
        same |= {"budget": str(self.budget)}
        options = (
            *("eval_batch_size", "on_nan", "check_every_steps"),
            *("patience", "max_hours"),
        )
        same |= {name: getattr(trainer, name) for name in options}
        same |= {"histograms_every_steps": self.cfg.logger.histograms_every_steps}
        distributed.require_same(same, self.world)


def choose_parallelism(cfg: Config, model: torch.nn.Module, world: World) -> ParallelConfig:
    """Collective. The parallelism of the configuration; the cost model decides what is `auto`.

    Raises ConfigError for a hybrid whose optimizer cannot update a shard of a tensor by itself.
    """
    hybrid = cfg.parallel if isinstance(cfg.parallel, HybridConfig) else None
    is_auto = isinstance(cfg.parallel, AutoParallelConfig)
    reason = needs_full_tensors(cfg.optimizer)
    if hybrid is not None and reason is not None:
        raise ConfigError(f"{reason}, and parallel=hybrid splits tensors; use parallel=ddp")
    if not is_auto and not (hybrid is not None and hybrid.group_size == AUTO):
        return cfg.parallel
    if reason is not None:
        log.info("parallel=auto takes ddp: %s", reason)
        return DDPConfig()
    if cfg.finetune.freezes:
        log.info("parallel=auto takes ddp: finetune.method is not full")
        return DDPConfig()
    if cfg.trainer.compile:
        log.info("parallel=auto takes ddp: trainer.compile=true does not go with a hybrid")
        return DDPConfig()
    # All images of a step: a hybrid exchanges activations in each of its passes, ddp exchanges its
    # gradients once.
    images = micro_batch_sizes(cfg.trainer.global_batch_size, world.world_size, None)[0]
    gpu = torch.cuda.get_device_name() if world.device.type == "cuda" else None

    def choose() -> tuple[int, str]:
        names = find_layers(model, hybrid.split) if hybrid is not None else None
        network = read_network(model, cfg.data.image_size, names)
        machines = guess(world.world_size, world.local_world_size, gpu, cfg.trainer.precision)
        narrow = cfg.trainer.precision is not Precision.fp32
        narrow |= hybrid is not None and hybrid.wire_dtype is WireDtype.bf16
        item_bytes = 2 if narrow else 4
        choice = choose_guessing(network, *machines, images, hybrid is not None, item_bytes)
        return choice.strategy.group, choice.reason

    group, reason = distributed.from_main(choose, world)
    if hybrid is not None:
        log.info("parallel.group_size=auto takes %s", reason)
        return replace(hybrid, group_size=group)
    log.info("parallel=auto takes %s", reason)
    return HybridConfig(group_size=group) if group > 1 else DDPConfig()


def _data_facts(cfg: DataConfig, data: ImageSets) -> DataFacts:
    classes, labels = data.train.classes, data.train.labels
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    names = {"ids": classes, "names": data.class_names}
    return DataFacts(
        names,
        counts,
        labels_fingerprint(classes, labels),
        data.val.fingerprint(),
        choice_of_images(cfg),
    )


def _description(index: SampleIndex) -> str:
    """Enough to see that two sets of images differ, and how."""
    fingerprint = index.fingerprint()[:24]
    return f"{len(index)} images of {len(index.classes)} classes with fingerprint {fingerprint}"
