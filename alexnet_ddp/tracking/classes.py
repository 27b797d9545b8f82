"""The results of an evaluation by class and by image, for the destinations that can show them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet_ddp.runtime.accuracy import percent_interval


@dataclass(frozen=True)
class ClassResults:
    """names: readable names in the order of the labels.

    per_class: int64 [classes, 3]: images, correct at 1, correct at 5. confusion: int64 [classes,
    classes]: images by label (row) and predicted class; None if there are too many classes.
    """

    step: int
    names: list[str]
    per_class: np.ndarray
    confusion: np.ndarray | None

    def as_json(self) -> dict[str, Any]:
        """The results as JSON types.

        confusions: (label, prediction, images) of each found pair. top1_intervals: of each class,
        in percent; null without images.
        """
        confusions = []
        if self.confusion is not None:
            pairs = np.argwhere(self.confusion).tolist()
            confusions = [[i, j, int(self.confusion[i, j])] for i, j in pairs]
        return {
            "step": self.step,
            "names": self.names,
            "per_class": self.per_class.tolist(),
            "top1_intervals": [
                percent_interval(correct1, images) if images else (None, None)
                for images, correct1, _ in self.per_class.tolist()
            ],
            "confusions": confusions,
        }


@dataclass(frozen=True)
class Examples:
    """The images with the largest losses, the largest first.

    grid: all of them in one picture, uint8 [height, width, 3]. jpegs, captions: of each image.
    """

    step: int
    grid: np.ndarray
    jpegs: list[bytes]
    captions: list[str]
