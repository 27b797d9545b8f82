"""Options of fine-tuning: which parameters are trained, and when."""

import math
from dataclasses import dataclass
from enum import StrEnum

from alexnet_ddp.config.option import Options, option
from alexnet_ddp.runtime.errors import ConfigError


class Method(StrEnum):
    """Which parameters are trained."""

    full = "full"
    head = "head"
    gradual = "gradual"
    lora = "lora"
    adalora = "adalora"


@dataclass(kw_only=True)
class FinetuneConfig(Options, section="finetune"):
    """Which parameters are trained. The head is the layer that returns the logits."""

    method: Method = option(
        Method.full,
        "full: all parameters are trained; head: only the head is, and the rest of the network "
        "computes as in an evaluation (BatchNorm with its running statistics, no dropout); "
        "gradual: first the head, then all parameters; lora: the head, and adapters of a low rank "
        "that are added to the weights of the other layers; adalora: the same, with ranks that "
        "training divides among the layers.",
        as_unset=Method.full,
    )
    rank: int | None = option(
        None,
        "The rank of the adapters of finetune.method=lora. With adalora, their mean rank in the "
        "end; they start with one and a half times that.",
        null=8,
        minimum=1,
        maximum=4096,
    )
    alpha: float | None = option(
        None,
        "The scale of the adapters: lora multiplies the product of the factors by finetune.alpha "
        "divided by finetune.rank, adalora by finetune.alpha divided by the initial rank.",
        null="2 finetune.rank with finetune.method=lora and adalora",
        above=0,
    )
    head_epochs: float | None = option(
        None,
        "With finetune.method=gradual, for how long only the head is trained.",
        unit="epochs",
        null=1,
        above=0,
    )
    backbone_lr_factor: float = option(
        1.0,
        "Learning rate of all parameters but the head's, relative to optimizer.lr. An adapter has "
        "the rate of the weight that it is added to.",
        above=0,
        as_unset=1.0,
    )
    layer_decay: float = option(
        1.0,
        "Factor of the learning rate from each block of the network to the block before it. The "
        "head has optimizer.lr, the last block finetune.layer_decay times that. See "
        "docs/fine-tuning.md for the blocks.",
        above=0,
        maximum=1,
        as_unset=1.0,
    )

    freeze_batch_norm: bool = option(
        False,
        "BatchNorm uses the running statistics of model.weights and keeps them, also while its "
        "weight and bias are trained. Small batches and short trainings need that. With "
        "finetune.method=head, lora and adalora it is always so.",
    )
    cache_features: bool = option(
        False,
        "With finetune.method=head and augment=none: compute the inputs of the head once for each "
        "image, keep them on the disk, and train and evaluate the head from them.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_features and self.method is not Method.head:
            rule = f"would be ignored with finetune.method={self.method.value}; leave it false"
            raise ConfigError(f"finetune.cache_features (true) {rule}")
        if self.head_epochs is not None and self.method is not Method.gradual:
            rule = f"would be ignored with finetune.method={self.method.value}; leave it null"
            raise ConfigError(f"finetune.head_epochs ({self.head_epochs:g}) {rule}")
        if self.freeze_batch_norm and self.method not in (Method.full, Method.gradual):
            rule = f"is always so with finetune.method={self.method.value}; leave it false"
            raise ConfigError(f"finetune.freeze_batch_norm (true) {rule}")
        for name in ("rank", "alpha"):
            if getattr(self, name) is not None and not self.adapts:
                rule = f"would be ignored with finetune.method={self.method.value}; leave it null"
                raise ConfigError(f"finetune.{name} ({getattr(self, name):g}) {rule}")
        for name in ("backbone_lr_factor", "layer_decay"):
            value = getattr(self, name)
            if value != 1 and self.method is Method.head:
                rule = "would be ignored with finetune.method=head; leave it 1"
                raise ConfigError(f"finetune.{name} ({value:g}) {rule}")

    @property
    def freezes(self) -> bool:
        """True if there are steps in which some parameters are not trained."""
        return self.method is not Method.full

    @property
    def adapts(self) -> bool:
        """True if adapters are trained in place of the weights of the backbone."""
        return self.method in (Method.lora, Method.adalora)

    @property
    def lora_rank(self) -> int:
        """The rank of the adapters; with adalora, their mean rank in the end."""
        rank: int = self.value_of("rank")
        return rank

    @property
    def initial_rank(self) -> int:
        """The rank with which adalora starts: larger than lora_rank."""
        return math.ceil(1.5 * self.lora_rank)

    @property
    def lora_alpha(self) -> float:
        """The scale of the adapters, times their rank."""
        return self.alpha or 2.0 * self.lora_rank

    def is_frozen(self, step: int, steps_per_epoch: int) -> bool:
        """True if only the head is trained in step `step` (0-based)."""
        if self.method is Method.gradual:
            return step < max(1, round(self.value_of("head_epochs") * steps_per_epoch))
        return self.method is Method.head
