"""Options of the parallelism (parallel=CHOICE)."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from alexnet_ddp.config.option import Options, option, with_default
from alexnet_ddp.runtime.errors import ConfigError

AUTO = "auto"  # in place of a number: the program chooses it


class WireDtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Hook(StrEnum):
    """How gradients are communicated between the ranks."""

    none = "none"
    fp16 = "fp16"
    bf16 = "bf16"
    powersgd = "powersgd"
    post_local_sgd = "post_local_sgd"


# A run may continue with another hook as well, although hooks change the updates slightly.
@dataclass(kw_only=True)
class ParallelConfig(Options, section="parallel", may_change=True):
    """How the work is divided between the ranks, and how their replicas stay equal."""


@dataclass(kw_only=True)
class AutoParallelConfig(ParallelConfig):
    """The choice that `python -m alexnet_ddp.plan` predicts to be fastest; the run prints it."""


@dataclass(kw_only=True)
class DDPConfig(ParallelConfig):
    """DistributedDataParallel: gradients are averaged during the backward pass."""

    bucket_mb: float | None = option(
        None,
        "Size of the gradient buckets that are communicated together.",
        unit="MiB",
        null="torch's 25",
        above=0,
        maximum=1_000_000,  # torch counts bytes in 64 bits
    )
    hook: Hook = option(
        Hook.none,
        "How gradients are communicated. fp16, bf16: rounded to 16 bits, half of the bytes. "
        "powersgd: low-rank approximations, far fewer bytes, another result. post_local_sgd: "
        "ranks average their parameters every few steps, in place of their gradients in every "
        "step.",
    )
    powersgd_rank: int | None = option(
        None, "Rank of powersgd's approximations.", null=4, minimum=1
    )
    powersgd_start_step: int | None = option(
        None,
        "First step with powersgd; before it gradients are sent uncompressed. DDP rebuilds its "
        "buckets after the first step, so it is at least 2.",
        unit="steps",
        null=100,
        minimum=2,
    )
    local_sgd_period: int | None = option(
        None,
        "Steps between two averages of the parameters over all ranks.",
        unit="steps",
        null=8,
        minimum=1,
    )
    local_sgd_start_step: int | None = option(
        None,
        "First step with post_local_sgd; before it gradients are averaged over all ranks.",
        unit="steps",
        null=100,
        minimum=0,
    )
    local_sgd_group: int | None = option(
        None,
        "Ranks per group, which averages its gradients in every step.",
        unit="ranks",
        null="one group per node, or one rank each on a single node",
        minimum=1,
    )
    static_graph: bool = option(
        False, "All steps use the same parameters, so DDP need not search for unused ones."
    )

    def __post_init__(self) -> None:
        for one in ("powersgd_rank", "powersgd_start_step"):
            self._refuse_unless_read(one, Hook.powersgd)
        for one in ("local_sgd_period", "local_sgd_start_step", "local_sgd_group"):
            self._refuse_unless_read(one, Hook.post_local_sgd)
        super().__post_init__()

    def _refuse_unless_read(self, name: str, by: Hook) -> None:
        if getattr(self, name) is not None and self.hook is not by:
            rule = f"would be ignored with parallel.hook={self.hook.value}; leave it null"
            raise ConfigError(f"parallel.{name} {rule}")


@dataclass(kw_only=True)
class HybridConfig(ParallelConfig):
    """DDP, with large linear layers split over groups of ranks, which exchange activations."""

    bucket_mb: float | None = with_default(DDPConfig, "bucket_mb", 2.0)
    group_size: Any = option(
        None,
        "Ranks that share one copy of the split layers. auto: the size that "
        "`python -m alexnet_ddp.plan` predicts to be fastest.",
        kind="integer, or auto",
        unit="ranks",
        null="the GPUs of a node, or all CPU ranks",
    )
    split: list[str] | None = option(
        None,
        "Names of the layers to split, such as [classifier.1,classifier.4].",
        null="chosen by their size",
    )
    wire_dtype: WireDtype = option(
        WireDtype.fp32, "Type of the activations while they are sent between the ranks."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.group_size
        is_number = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if size not in (None, AUTO) and not is_number:
            rule = "must be a number of ranks greater than 0, auto, or null"
            raise ConfigError(f"parallel.group_size ({size}) {rule}")
