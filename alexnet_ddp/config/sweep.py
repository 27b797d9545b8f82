"""Options of `alexnet-ddp sweep`."""

from dataclasses import dataclass, field
from enum import StrEnum

from alexnet_ddp.config.option import MAX_SEED, Options, option
from alexnet_ddp.config.run import Config, check_directory_name
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.sweep_record import is_minimised

MAX_TRIALS = 10_000
_METRICS = ("val/top1", "val/top5", "val/loss")


class Sampler(StrEnum):
    """How the values of a trial are chosen."""

    grid = "grid"
    random = "random"
    tpe = "tpe"


class Pruner(StrEnum):
    """Which trials are stopped before their end."""

    none = "none"
    median = "median"
    asha = "asha"


@dataclass(kw_only=True)
class SweepOptions(Options, section="sweep"):
    """How the values of trials are chosen, and which trials end early."""

    name: str | None = option(
        None,
        "Name of the sweep: its directory is run.root/sweep.name. The same name continues it.",
        null="DATA-MODEL-sweep, such as photos-resnet18-sweep",
    )
    sampler: Sampler = option(
        Sampler.grid,
        "grid: every combination of the values; random: independent of the results; tpe: values "
        "near those of good trials (Bergstra et al., 2011), by optuna. tpe needs "
        "pip install 'alexnet-ddp[sweep]'.",
    )
    pruner: Pruner = option(
        Pruner.none,
        "Compares a trial with those of lower numbers that had the same number of evaluations, "
        "and stops it. asha: after 1, 3, 9, ... evaluations, unless it is in the best third "
        "(Li et al., 2020); median: after each evaluation, if its best result is below the median "
        "of at least five others (Golovin et al., 2017).",
    )
    trials: int | None = option(
        None,
        "Number of trials of sweep.sampler=random and tpe. A larger number continues the sweep.",
        null="20; a grid has all its combinations",
        minimum=1,
        maximum=MAX_TRIALS,
    )
    metric: str = option(
        "val/top1",
        "val/top1, val/top5, val/loss, or val/NAME of a metric in trainer.metrics. The best value "
        "is the lowest val/loss, and the highest of every other metric.",
    )
    parallel: int = option(
        1, "Trials at the same time. Each gets an equal share of the GPUs and cores.", minimum=1
    )
    promote: bool = option(
        False,
        "Once no trial waits any more, devices that become free go to trials that are still "
        "running. These save and start again, which changes a result to rounding at most.",
    )
    sbatch: str | None = option(
        None,
        "Options of sbatch, such as --gpus-per-node=8. The trials are the tasks of "
        "one Slurm job array, of which sweep.parallel run at the same time. The command only "
        "submits them; started again, it prints the table.",
        null="the trials run on this machine",
    )
    seed: int = option(
        0, "Seed of random, tpe and shuffle(); the trials train with seed.", minimum=0,
        maximum=MAX_SEED,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials is not None and self.sampler is Sampler.grid:
            rule = "would be ignored: a grid has all combinations of the values"
            remedy = "leave it out, or use sweep.sampler=random"
            raise ConfigError(f"sweep.trials ({self.trials}) {rule}; {remedy}")
        if self.promote and self.parallel == 1:
            rule = "would be ignored with sweep.parallel=1: each trial has all devices"
            raise ConfigError(f"sweep.promote=true {rule}; leave it out")
        if self.sbatch is not None:
            self._check_array()

    def _check_array(self) -> None:
        """Raise ConfigError for what needs a process that follows the trials."""
        refused = {
            "sweep.sampler=tpe": self.sampler is Sampler.tpe,
            f"sweep.pruner={self.pruner}": self.pruner is not Pruner.none,
            "sweep.promote=true": self.promote,
        }
        wrong = next((text for text, is_given in refused.items() if is_given), None)
        if wrong is not None:
            rule = "needs results while trials run, and nothing follows the tasks of a Slurm array"
            remedy = "leave it out, or start the sweep in a job of one node without sweep.sbatch"
            raise ConfigError(f"{wrong} {rule}; {remedy}")

    @property
    def is_minimised(self) -> bool:
        """True if a lower value of the metric is better."""
        return is_minimised(self.metric)


@dataclass(kw_only=True)
class SweepConfig(Config):
    """A training, and the search over some of its options."""

    sweep: SweepOptions = field(default_factory=SweepOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweep.name is not None:
            check_directory_name("sweep.name", self.sweep.name, self.run.root)
        if self.logger.wandb_id is not None:
            rule = "would be that of all trials, each of which gets its own"
            raise ConfigError(f"logger.wandb_id ({self.logger.wandb_id}) {rule}; leave it out")
        known = [*_METRICS, *(f"val/{name}" for name in self.trainer.metrics)]
        if self.sweep.metric not in known:
            rule = f"must be one of {', '.join(known)}"
            remedy = "a metric of a plugin must be in trainer.metrics"
            raise ConfigError(f"sweep.metric ({self.sweep.metric}) {rule}; {remedy}")

    @property
    def sweep_name(self) -> str:
        """The name of the sweep: sweep.name, or one derived from the data and the network."""
        return self.sweep.name or f"{self.run.name}-sweep"
