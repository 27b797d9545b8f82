"""Images of a data source that a plugin has registered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from alexnet_ddp.config.plugins import PluginDataConfig
from alexnet_ddp.data.sources.index import SampleIndex, names_digest
from alexnet_ddp.plugins import SOURCES, call_plugin
from alexnet_ddp.runtime.errors import DataError


class Source(Protocol):
    """What a registered function returns for one split. `names`, a list of N texts, is optional."""

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def labels(self) -> Sequence[int] | np.ndarray: ...

    def read(self, i: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class PluginStore:
    """The images of a Source, or some of them."""

    source: Source
    names: Sequence[str]  # of all images of the source
    positions: np.ndarray  # int64 [N]: of the images in the source

    @property
    def sizes(self) -> np.ndarray:
        """Unknown without reading the images, so the fingerprint does not contain them."""
        return np.zeros(0, np.int64)

    @property
    def nbytes(self) -> int:
        return self.positions.nbytes

    def take(self, positions: np.ndarray) -> "PluginStore":
        return PluginStore(self.source, self.names, self.positions[positions])

    def read(self, i: int) -> bytes:
        return self.source.read(int(self.positions[i]))

    def name(self, i: int) -> str:
        return self.names[int(self.positions[i])]

    def dimensions(self, indices: np.ndarray) -> None:
        return None

    def will_need(self, indices: np.ndarray) -> None:
        """Does nothing: a source has no hint."""


def open_plugin(cfg: PluginDataConfig, split: str) -> SampleIndex:
    """The images of `split`, "train" or "val".

    Raises ConfigError for an unknown name or argument, DataError for a source whose classes and
    labels do not fit.
    """
    build = SOURCES.get(cfg.name)
    source = call_plugin(f"data.name ({cfg.name})", build, cfg.root, split, **cfg.args)
    what = f"data.name ({cfg.name}), split {split}"
    classes, labels = [str(name) for name in source.classes], np.asarray(source.labels)
    if len(set(classes)) != len(classes) or not classes:
        raise DataError(f"{what}: classes must be names, each of them once; correct the plugin")
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{what}: labels must be integers, one for each image; correct the plugin")
    if labels.min() < 0 or labels.max() >= len(classes):
        rule = f"labels are from {labels.min()} to {labels.max()}"
        raise DataError(
            f"{what}: {rule}, but must be from 0 to {len(classes) - 1}; correct the plugin"
        )
    given = getattr(source, "names", None)
    names = (
        [f"{cfg.name} {split} image {i}" for i in range(len(labels))]
        if given is None
        else [str(name) for name in given]
    )
    if len(names) != len(labels):
        raise DataError(f"{what}: {len(names)} names for {len(labels)} labels; correct the plugin")
    store = PluginStore(source, names, np.arange(len(labels)))
    return SampleIndex(classes, labels.astype(np.int32), store, names_digest(names))
