"""What every source of images provides. Files, tar archives and shards implement it."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np


class ImageSource(Protocol):
    """N images that are read by position. Safe to use from several threads; can be pickled."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the positions, names and sizes of the images take."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N]: bytes of each image, for the fingerprint of the data; empty if unknown."""
        ...

    def take(self, positions: np.ndarray) -> Self:
        """The images at `positions`, int64 [n], in that order."""
        ...

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises OSError; SampleIndex.read() adds the name."""
        ...

    def name(self, i: int) -> str:
        """A path, or archive:member, for messages."""
        ...

    def dimensions(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(widths, heights) in pixels, int64 [n] each; None if only the images contain them."""
        ...

    def will_need(self, indices: np.ndarray) -> None:
        """A hint that these images will be read soon. Returns at once. Raises OSError."""
        ...


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used and was left out."""

    position: int  # in the list of requested images
    index: int  # in the SampleIndex
    kind: str  # empty, damaged, too large, ...
    reason: str  # the name of the image, and what is wrong with it
