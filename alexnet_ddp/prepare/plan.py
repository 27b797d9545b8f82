"""Assigns every image to a shard and a position in it, from its name, before any image is read."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.prepare import Encoding, PrepareConfig
from alexnet_ddp.data.sources.shard_index import FORMAT
from alexnet_ddp.prepare.encode import Recipe, fingerprint
from alexnet_ddp.prepare.sources import Source
from alexnet_ddp.runtime.errors import DataError

_IMAGES_PER_SHARD = {"train": 1_250, "val": 781}  # ImageNet: 1,024 and 64 shards


@dataclass(frozen=True)
class ShardTask:
    """Everything needed to write one shard, on any machine that can read source and root."""

    root: str
    source: str
    split: str
    shard: int
    first: int  # position of its first image in the order of all shards
    recipe: Recipe
    encoder: str  # fingerprint() of the process that made the plan
    state: str  # the folder of sidecars, relative to root
    rows: list[int]  # positions of its images in the source
    names: list[str]
    labels: list[int]
    files: list[str]
    offsets: list[int]
    sizes: list[int]

    @property
    def stem(self) -> str:
        return stem(self.split, self.shard)

    @property
    def images(self) -> int:
        return len(self.rows)

    @property
    def source_sizes(self) -> str | None:
        """A digest of the sizes of its images in the source; None if they are unknown."""
        return (
            hashlib.sha256(json.dumps(self.sizes).encode()).hexdigest() if any(self.sizes) else None
        )

    @property
    def sidecar(self) -> str:
        return f"{self.state}/{self.stem}"


def stem(split: str, shard: int) -> str:
    return f"{split}-{shard:06d}"


@dataclass(frozen=True)
class Plan:
    """The shards of one split. Depends on names, labels and recipe, not on the source's path."""

    split: str
    root: str
    source: Source
    recipe: Recipe
    order: np.ndarray  # int64 [N]: positions in the source, in the order of the shards
    num_shards: int
    shuffle_seed: int
    val_fraction: float | None = None  # the source is the part of a division

    @cached_property
    def identity(self) -> dict:
        """Two plans with equal identities make the same shards of the same images."""
        names = hashlib.sha256()
        for name in self.source.names:
            names.update(name.encode(errors="surrogateescape") + b"\0")
        names.update(self.source.labels.astype("<i4").tobytes())
        return {
            "format": FORMAT,
            "recipe": asdict(self.recipe),
            "num_shards": self.num_shards,
            "shuffle_seed": self.shuffle_seed,
            "encoder": fingerprint(),
            "images_planned": len(self.source),
            "names_and_labels": names.hexdigest(),
        }

    def tasks(self) -> Iterator[ShardTask]:
        """Yield the task of each shard."""
        source, state = self.source, self.state()
        for shard, rows in enumerate(np.array_split(self.order, self.num_shards)):
            at = rows.tolist()
            yield ShardTask(
                root=self.root,
                source=source.root,
                split=self.split,
                shard=shard,
                first=self.first(shard),
                recipe=self.recipe,
                encoder=fingerprint(),
                state=state,
                rows=at,
                names=[source.names[i] for i in at],
                labels=source.labels[rows].tolist(),
                files=[source.files[k] for k in source.file_of[rows].tolist()],
                offsets=source.offsets[rows].tolist(),
                sizes=source.sizes[rows].tolist(),
            )

    def first(self, shard: int) -> int:
        """Position of the first image of `shard` in the order of all shards, as np.array_split."""
        size, rest = divmod(len(self.order), self.num_shards)
        return shard * size + min(shard, rest)

    def state(self) -> str:
        """The folder of sidecars; it differs for another recipe, source or Pillow."""
        text = json.dumps(self.identity | {"split": self.split}, sort_keys=True)
        return f"_state/{self.split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def make_plan(cfg: PrepareConfig, root: str, split: str, source: Source) -> Plan:
    """Order the images of a split by a keyed hash of their names.

    Raises DataError for a name with a line break, ConfigError for more shards than images.
    """
    n = len(source)
    broken = next((name for name in source.names if "\n" in name), None)
    if broken is not None:
        raise DataError(
            f"{broken!r} has a line break in its name, but names are stored one per line; rename it"
        )
    num_shards = cfg.num_shards or max(1, n // _IMAGES_PER_SHARD[split])
    if num_shards > n:
        raise ConfigError(
            f"num_shards ({num_shards}) exceeds the {n} images of {split}; use at most {n}"
        )
    key = cfg.shuffle_seed.to_bytes(8, "little")
    hashed = [
        hashlib.blake2b(name.encode(errors="surrogateescape"), key=key, digest_size=8).digest()
        for name in source.names
    ]  # fmt: skip
    order = np.array(sorted(range(n), key=lambda i: (hashed[i], source.names[i])), np.int64)
    recipe, seed = recipe_of(cfg), cfg.shuffle_seed
    return Plan(split, root, source, recipe, order, num_shards, seed, cfg.val_fraction)


def recipe_of(cfg: PrepareConfig) -> Recipe:
    """Return the recipe; options that its encoding does not use are None."""
    if cfg.encoding is Encoding.raw:
        return Recipe(None, None, None, cfg.encoding, cfg.size, cfg.mean_image)
    return Recipe(
        cfg.shorter_side, cfg.quality, cfg.keep_original, cfg.encoding, None, cfg.mean_image
    )
