"""The training loss: cross entropy with label smoothing, class weights and mixed labels."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ddp.data.loader import Batch
from alexnet_ddp.runtime.errors import ConfigError


class CrossEntropy:
    """The cross entropy of a batch.

    The loss of a step is the sum over the images of the global batch, divided by the sum of their
    weights. Without class weights that is the mean over the images.

    smoothing: of the labels, in [0, 1). class_weights: float32 [classes], or None for ones.
    """

    def __init__(self, smoothing: float, class_weights: Tensor | None = None) -> None:
        self._smoothing, self._class_weights = smoothing, class_weights

    def __call__(self, logits: Tensor, batch: Batch, reduction: str = "sum") -> Tensor:
        """The loss of logits [n, classes]: summed over the images, or [n] if reduction is "none".

        If images are mixed, the two labels of an image are weighted by their shares of it.
        """
        mixing = batch.effects.mixing
        if mixing is None:
            return self._plain(logits, batch.labels, reduction)
        own, other = (
            self._plain(logits, labels, "none") for labels in (batch.labels, mixing.labels)
        )
        losses = torch.lerp(other, own, mixing.share)
        return losses.sum() if reduction == "sum" else losses

    @property
    def is_weighted(self) -> bool:
        """Whether there are class weights."""
        return self._class_weights is not None

    def weight(self, batch: Batch) -> Tensor:
        """The sum of the weights of the images, a scalar on the device. Needs class weights."""
        weights, mixing = self._class_weights, batch.effects.mixing
        assert weights is not None
        if mixing is None:
            return weights[batch.labels].sum()
        return torch.lerp(weights[mixing.labels], weights[batch.labels], mixing.share).sum()

    def _plain(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(
            logits,
            labels,
            self._class_weights,
            reduction=reduction,
            label_smoothing=self._smoothing,
        )


def class_weights(
    chosen: str | list[float] | None, labels: np.ndarray, num_classes: int
) -> Tensor | None:
    """The weights that trainer.class_weights asks for: float32 [classes]; None for None.

    balanced: num_images / (num_classes * images of the class), so that all classes count alike
    and the mean weight of an image is 1. labels: int32 [num_images], of the training images.
    Raises ConfigError if the numbers do not fit the classes.
    """
    if chosen is None:
        return None
    if chosen == "balanced":
        sizes = np.bincount(labels, minlength=num_classes)
        weights = len(labels) / (np.count_nonzero(sizes) * np.maximum(1, sizes))
        return torch.tensor(weights, dtype=torch.float32)
    if len(chosen) != num_classes:
        rule = f"has {len(chosen)} numbers, the data has {num_classes} classes"
        remedy = "give one for each class, in the order of labels"
        raise ConfigError(f"trainer.class_weights {rule}; {remedy}")
    return torch.tensor(chosen, dtype=torch.float32)
