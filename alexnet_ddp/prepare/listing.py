"""What there is to pack: N images by name, label and place, in the order (class, file name) of the index.

The one rule: a name says class and file, never where the source lies, so the same images give the same plan as a folder
or as an archive.
"""

from dataclasses import dataclass

import numpy as np

WHOLE = -1  # as an offset: the file is the image


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a split."""

    root: str  # absolute, or a URL
    classes: list[str]  # in the order of the labels
    class_names: list[str]  # for people, in the order of the classes
    labels: np.ndarray  # int32 [N]
    names: list[str]  # [N]: CLASS/FILE
    files: list[str]  # relative to root
    file_of: np.ndarray  # int32 [N]: position in files
    offsets: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N], in bytes; 0 if unknown

    def __len__(self) -> int:
        return len(self.names)
