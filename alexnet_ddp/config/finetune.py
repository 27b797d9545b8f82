"""Options of fine-tuning: which parameters are trained, and when."""

from dataclasses import dataclass
from enum import StrEnum

from alexnet_ddp.config.option import Options, option
from alexnet_ddp.runtime.errors import ConfigError


class Method(StrEnum):
    """Which parameters are trained."""

    full = "full"
    head = "head"
    gradual = "gradual"


@dataclass(kw_only=True)
class FinetuneConfig(Options, section="finetune"):
    """Which parameters are trained. The head is the layer that returns the logits."""

    method: Method = option(
        Method.full,
        "full: all parameters are trained; head: only the head is, and the rest of the network "
        "computes as in an evaluation (BatchNorm with its running statistics, no dropout); "
        "gradual: first the head, then all parameters.",
    )
    head_epochs: float | None = option(
        None,
        "With finetune.method=gradual, for how long only the head is trained.",
        unit="epochs",
        null="1 with finetune.method=gradual",
        above=0,
    )
    backbone_lr_factor: float = option(
        1.0,
        "Learning rate of all parameters but the head's, relative to optimizer.lr.",
        above=0,
    )
    layer_decay: float = option(
        1.0,
        "Factor of the learning rate from each block of the network to the block before it. The "
        "head has optimizer.lr, the last block finetune.layer_decay times that. See "
        "docs/fine-tuning.md for the blocks.",
        above=0,
        maximum=1,
    )

    cache_features: bool = option(
        False,
        "With finetune.method=head and augment=none: compute the inputs of the head once for each "
        "image, keep them on the disk, and train and evaluate the head from them.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_features and self.method is not Method.head:
            rule = f"would be ignored with finetune.method={self.method.value}; leave it false"
            raise ConfigError(f"finetune.cache_features (true) {rule}")
        if self.head_epochs is not None and self.method is not Method.gradual:
            rule = f"would be ignored with finetune.method={self.method.value}; leave it null"
            raise ConfigError(f"finetune.head_epochs ({self.head_epochs:g}) {rule}")
        for name in ("backbone_lr_factor", "layer_decay"):
            value = getattr(self, name)
            if value != 1 and self.method is Method.head:
                rule = "would be ignored with finetune.method=head; leave it 1"
                raise ConfigError(f"finetune.{name} ({value:g}) {rule}")

    @property
    def freezes(self) -> bool:
        """True if there are steps in which only the head is trained."""
        return self.method is not Method.full

    def is_frozen(self, step: int, steps_per_epoch: int) -> bool:
        """True if only the head is trained in step `step` (0-based)."""
        if self.method is Method.gradual:
            return step < max(1, round((self.head_epochs or 1.0) * steps_per_epoch))
        return self.method is Method.head
