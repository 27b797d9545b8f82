"""Options of the data (data=CHOICE) and of its augmentation (augment=CHOICE)."""

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from alexnet_ddp.config.option import MISSING, Options, option, shown
from alexnet_ddp.runtime.errors import ConfigError

# An image that claims more is a bad image, in training and in preparation.
MAX_SIDE = 20_000
MAX_PIXELS = 100_000_000
MAX_BYTES = 4 * MAX_PIXELS  # of a file; a sparse file may claim any size

# `raise` is a Python keyword, so the members are given by name.
OnBadImage = StrEnum("OnBadImage", {"raise": "raise", "skip": "skip"})


class Interpolation(StrEnum):
    bilinear = "bilinear"
    bicubic = "bicubic"


AUTO = "auto"  # of data.mean
# Of ImageNet's RGB values in [0, 1], as torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def default_resize(image_size: int) -> int:
    """data.eval_resize, in pixels, for which nothing gives a crop ratio."""
    return round(image_size * 256 / 224)


class Policy(StrEnum):
    none = "none"
    randaugment = "randaugment"
    trivialaugment = "trivialaugment"


@dataclass(kw_only=True)
class InputConfig(Options, section="data"):
    """The size and the colours of the images as a network gets them."""

    has_statistics: ClassVar[bool] = False  # data.mean=auto finds some

    image_size: int = option(
        224, "Height and width of the network's input.", unit="pixels", minimum=1, maximum=MAX_SIDE
    )
    eval_resize: int | None = option(
        None,
        "Length of the shorter side before the centre crop, in evaluation.",
        unit="pixels",
        null="data.image_size divided by the crop ratio of model.weights (of a run, or published) "
        "or of a network of timm, else by 224 / 256",
        minimum=1,
        maximum=MAX_SIDE,
    )
    mean: Any = option(
        None,
        "Means of red, green and blue in [0, 1], which are subtracted from the images. auto, with "
        "data=shards: the mean, and without data.std the standard deviation, of the training "
        "images, which prepare computed.",
        kind="auto, or a list of three numbers",
        null="those of model.weights (of a run, or published) or of a network of timm, else "
        "ImageNet's",
        as_unset=list(IMAGENET_MEAN),
    )
    std: list[float] | None = option(
        None,
        "Standard deviations of red, green and blue in [0, 1], by which the images are divided.",
        null="as data.mean",
        as_unset=list(IMAGENET_STD),
    )
    eval_interpolation: Interpolation | None = option(
        None,
        "Interpolation of the resize in evaluation.",
        null="that of model.weights (of a run, or published) or of a network of timm, else "
        "bilinear",
        as_unset=Interpolation.bilinear,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_resize is None:
            self.eval_resize = default_resize(self.image_size)
        if self.eval_resize < self.image_size:
            rule = f"must be at least data.image_size ({self.image_size})"
            raise ConfigError(f"data.eval_resize ({self.eval_resize}) {rule}")
        if self.mean == AUTO:
            self._check_auto()
        else:
            self.mean = _check_mean(self.mean)
        _check_three("std", self.std)
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"data.std ({self.std}) must be greater than 0")

    def _check_auto(self) -> None:
        if not self.has_statistics:
            rule = "takes the statistics that prepare writes, and only data=shards has them"
            remedy = "give data.mean=[r,g,b] and data.std=[r,g,b], or pack the images"
            raise ConfigError(f"data.mean (auto) {rule}; {remedy}")

    @property
    def resized_side(self) -> int:
        """data.eval_resize, for which the constructor replaces null, in pixels."""
        assert self.eval_resize is not None
        return self.eval_resize

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, standard deviation) of red, green and blue in [0, 1].

        data.mean=auto must have been replaced: see data/sources/sets.py.
        """
        assert self.mean != AUTO
        return tuple(self.mean or IMAGENET_MEAN), tuple(self.std or IMAGENET_STD)


@dataclass(kw_only=True)
class DataConfig(InputConfig):
    """Which images are used, and the size at which the network sees them."""

    # Whether the fingerprint of the data depends on the content of the images, not on names alone.
    is_identified: ClassVar[bool] = True

    start_image_size: int | None = option(
        None,
        "Size of the training images in the first epoch; it grows to data.image_size in steps "
        "of 32.",
        unit="pixels",
        null="the size does not change",
        minimum=1,
    )
    grow_epochs: int | None = option(
        None,
        "With data.start_image_size: the first epoch (counted from 0) at data.image_size.",
        unit="epochs",
        minimum=1,
    )
    num_threads: int | None = option(
        None,
        "Decoding threads of each rank.",
        null="this rank's share of the cores",
        minimum=1,
        may_change=True,
    )
    on_bad_image: OnBadImage = option(
        OnBadImage["raise"],
        "If an image cannot be read: raise ends the run with exit code 65 and the image's path; "
        "skip makes the batch smaller and lists the image in quarantine.jsonl.",
        may_change=True,
    )
    max_bad_images: int | None = option(
        None,
        "With data.on_bad_image=skip: how many different training images may be bad in the whole "
        "run.",
        null=100,
        minimum=0,
        may_change=True,
    )
    sampling: Any = option(
        None,
        "How many images of each class an epoch has; the epoch's length stays. balanced: equally "
        "many; sqrt: in proportion to the square root of its images; numbers, one per class in "
        "the order of labels: in proportion to these. Images of a rare class are repeated, each "
        "time with another augmentation.",
        kind="balanced, sqrt, or a list of numbers",
        null="each image once",
    )
    limit_train: int | None = option(
        None,
        "Use this many training images, the same ones in every run.",
        null="all",
        minimum=1,
        selects=True,
    )
    limit_val: int | None = option(
        None,
        "Use this many validation images, the same ones in every run.",
        null="all",
        minimum=1,
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_bad_image is OnBadImage.skip:
            self.max_bad_images = self.value_of("max_bad_images")
        elif self.max_bad_images is not None:
            rule = "is only read by data.on_bad_image=skip; leave it out"
            raise ConfigError(f"data.max_bad_images ({self.max_bad_images}) {rule}")
        if self.sampling is not None:
            self.sampling = check_class_weights(
                "data.sampling", self.sampling, ("balanced", "sqrt")
            )
        self._check_growth()

    def _check_growth(self) -> None:
        start, epochs = self.start_image_size, self.grow_epochs
        if (start is None) != (epochs is None):
            rule = "belong together: the first size, and the epoch in which it has grown"
            both = f"data.start_image_size ({start}) and data.grow_epochs ({epochs})"
            raise ConfigError(f"{both} {rule}; give both or none")
        if start is not None and start >= self.image_size:
            rule = f"must be less than data.image_size ({self.image_size}), to grow to it"
            raise ConfigError(f"data.start_image_size ({start}) {rule}")

    def train_image_size(self, epoch: int) -> int:
        """Size of the training images in `epoch` (counted from 0), in pixels.

        It grows linearly with the epoch, in multiples of 32 pixels, for which kernels are fast.
        """
        if self.start_image_size is None or self.grow_epochs is None or epoch >= self.grow_epochs:
            return self.image_size
        grown = (self.image_size - self.start_image_size) * epoch / self.grow_epochs
        return self.start_image_size + int(grown) // 32 * 32


def check_class_weights(path: str, value: Any, names: tuple[str, ...]) -> str | list[float]:
    """Return one of `names`, or a list of numbers. Raises ConfigError for anything else."""
    if isinstance(value, str) and value in names:
        return value
    numbers = value if isinstance(value, list) else []
    is_valid = all(type(one) in (int, float) and 0 <= one < math.inf for one in numbers)
    if not is_valid or sum(numbers) <= 0:
        words = " or ".join(names)
        rule = f"must be {words}, or numbers of at least 0 and not all 0, one per class"
        raise ConfigError(f"{path} ({shown(value)}) {rule}; write {path}={names[0]}")
    return [float(one) for one in numbers]


def _check_mean(value: Any) -> list[float] | None:
    """Return the numbers of data.mean. Raises ConfigError for anything but three numbers."""
    is_list = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    if value is not None and not is_list:
        rule = "must be auto, or three numbers, of red, green and blue in [0, 1]"
        raise ConfigError(f"data.mean ({shown(value)}) {rule}; write data.mean=[r,g,b]")
    _check_three("mean", value)
    return value and [float(one) for one in value]


def _check_three(name: str, values: list[float] | None) -> None:
    if values is not None and len(values) != 3:
        rule = "must be three numbers, of red, green and blue in [0, 1]"
        raise ConfigError(f"data.{name} ({values}) {rule}; write data.{name}=[r,g,b]")


@dataclass(kw_only=True)
class StoredConfig(DataConfig):
    """Data that is read from a folder or a store."""

    root: str = option(
        MISSING,
        "Location of the data. demo: the folder in which the built-in data is written once. "
        "folder: contains train/CLASS/* and val/CLASS/*, or CLASS/*. csv: a file that lists images "
        "and labels. imagenet: contains the three "
        "ILSVRC2012 archives as distributed, or the extracted train/ and val/. shards: a folder or "
        "an fsspec URL written by `python -m alexnet_ddp.prepare`.",
        may_change=True,
    )


@dataclass(kw_only=True)
class LabelledConfig(StoredConfig):
    """Data whose labels are derived from the names of its classes."""

    class_order: str = option(
        "name",
        "Order of the class names that gives their labels: name (alphabetical), numeric, or a "
        "text file with one class name per line.",
        selects=True,
    )


@dataclass(kw_only=True)
class DividedConfig(LabelledConfig):
    """Images that may be divided into a training and a validation set."""

    val_fraction: float | None = option(
        None,
        "Divide the images: the share of them that is the validation set. A hash of its name "
        "decides about each image, so that it stays in its set when others are added, except in "
        "small classes: every class of two images or more has an image in both sets.",
        null="the data is divided already",
        above=0,
        below=1,
        selects=True,
    )
    fold: str | None = option(
        None,
        "Divide the images for cross-validation. K/N, such as 2/5: the validation set is the K-th "
        "of N equal parts of each class.",
        null="no cross-validation",
        selects=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction is not None and self.fold is not None:
            both = f"data.val_fraction ({self.val_fraction}) and data.fold ({self.fold})"
            raise ConfigError(f"{both} both choose the validation set; give one of them")
        k, n = self.fold_of or (1, 2)
        if not 1 <= k <= n or n < 2:
            rule = "must be K/N with 1 <= K <= N and N at least 2, such as 2/5"
            raise ConfigError(f"data.fold ({self.fold}) {rule}")

    @property
    def fold_of(self) -> tuple[int, int] | None:
        """(K, N) of data.fold; (0, 0) if it has another form."""
        if self.fold is None:
            return None
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.fold)
        return (int(found[1]), int(found[2])) if found else (0, 0)


@dataclass(kw_only=True)
class FolderConfig(DividedConfig):
    """Your own images: root/train/CLASS/* and root/val/CLASS/*, or root/CLASS/*, divided."""


@dataclass(kw_only=True)
class CsvConfig(DividedConfig):
    """Your own images, listed with their labels in the CSV, TSV or Parquet file data.root."""

    images: str | None = option(
        None,
        "Folder to which the paths in the file are relative.",
        null="the folder of data.root",
    )
    path_column: str = option("path", "Name of the column with the path of each image.")
    label_column: str = option("label", "Name of the column with the class of each image.")


@dataclass(kw_only=True)
class ImageNetConfig(LabelledConfig):
    """ILSVRC2012, from its archives or extracted."""


class Shuffle(StrEnum):
    full = "full"
    window = "window"


@dataclass(kw_only=True)
class ShardsConfig(StoredConfig):
    """Shards: images that `python -m alexnet_ddp.prepare` packed and verified."""

    has_statistics: ClassVar[bool] = True

    shuffle: Shuffle = option(
        Shuffle.full,
        "Order of the training images in an epoch. full: a permutation of all images; window: a "
        "permutation of the shards, and of the images of data.window_shards shards at a time.",
        selects=True,
    )
    window_shards: int | None = option(
        None,
        "With data.shuffle=window: the number of shards that are open at a time.",
        null=16,
        minimum=1,
        selects=True,
    )
    cache_dir: str | None = option(
        None,
        "If data.root is a URL: a local folder on each node in which whole shards are cached.",
        null="no cache",
        may_change=True,
    )
    cache_gb: float | None = option(
        None,
        "Size limit of data.cache_dir; the least recently used shards are removed first.",
        unit="10^9 bytes",
        null="no limit",
        above=0,
        maximum=1_000_000_000,
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffle is Shuffle.window:
            self.window_shards = self.value_of("window_shards")
        elif self.window_shards is not None:
            rule = "is only read by data.shuffle=window, this is full; leave it out"
            raise ConfigError(f"data.window_shards ({self.window_shards}) {rule}")


@dataclass(kw_only=True)
class DemoConfig(StoredConfig):
    """The built-in data: 10 classes of textures and shapes, generated by the package."""


@dataclass(kw_only=True)
class SyntheticConfig(DataConfig):
    """Random tensors without files, for benchmarks and dry runs."""

    num_train: int = option(2_048, "Number of training images.", minimum=1, selects=True)
    num_val: int = option(256, "Number of validation images.", minimum=1, may_change=True)
    num_classes: int = option(1_000, "Number of classes.", minimum=1, selects=True)


@dataclass(kw_only=True)
class AugmentConfig(Options, section="augment"):
    """What is done to a training image, as a function of (seed, epoch, index)."""


@dataclass(kw_only=True)
class NoAugmentConfig(AugmentConfig):
    """The evaluation's resize and centre crop."""


@dataclass(kw_only=True)
class RandomAugmentConfig(AugmentConfig):
    """A random crop and flip, and further operations, which are off by default."""

    flip: float = option(0.5, "Probability of a horizontal flip.", minimum=0, maximum=1)
    policy: Policy = option(
        Policy.none, "Operations on each image after its crop and flip, as in torchvision."
    )
    num_ops: int | None = option(
        None, "Number of randaugment's operations per image.", null=2, minimum=1
    )
    magnitude: int | None = option(
        None, "Strength of randaugment's operations.", null=9, minimum=0, maximum=30
    )
    brightness: float = option(
        0.0, "b: multiply the brightness by a factor from [1 - b, 1 + b].", minimum=0, maximum=1
    )
    contrast: float = option(
        0.0, "c: multiply the contrast by a factor from [1 - c, 1 + c].", minimum=0, maximum=1
    )
    saturation: float = option(
        0.0, "s: multiply the saturation by a factor from [1 - s, 1 + s].", minimum=0, maximum=1
    )
    hue: float = option(
        0.0,
        "h: shift the hue by a value from [-h, h]; 1 is one full turn of the colour circle.",
        minimum=0,
        maximum=0.5,
    )
    erase: float = option(
        0.0,
        "Probability of replacing a random rectangle by the mean colour.",
        minimum=0,
        maximum=1,
    )
    mixup_alpha: float = option(
        0.0,
        "a: blend two images and their labels, with weights from Beta(a, a); 0: off.",
        minimum=0,
        maximum=100,
    )
    cutmix_alpha: float = option(
        0.0,
        "a: paste a rectangle of another image, whose area is drawn from Beta(a, a); 0: off. With "
        "augment.mixup_alpha too, each image gets one of the two.",
        minimum=0,
        maximum=100,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy is Policy.randaugment:
            self.num_ops = self.value_of("num_ops")
            self.magnitude = self.value_of("magnitude")
            return
        for name in ("num_ops", "magnitude"):
            if (value := getattr(self, name)) is not None:
                rule = f"is only read by augment.policy=randaugment, this is {self.policy.value}"
                raise ConfigError(f"augment.{name} ({value}) {rule}; leave it out")


@dataclass(kw_only=True)
class BasicAugmentConfig(RandomAugmentConfig):
    """RandomResizedCrop and horizontal flip, with torchvision's distributions."""

    min_scale: float = option(
        0.08,
        "Smallest share of the image's area that a crop covers. ImageNet: 0.08.",
        minimum=0,
        maximum=1,
    )
    max_scale: float = option(
        1.0, "Largest share of the image's area that a crop covers.", minimum=0, maximum=1
    )
    max_ratio: float = option(
        4 / 3,
        "r: width / height of a crop is log-uniform in [1 / r, r], before it is resized.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_scale > self.max_scale:
            rule = f"must be at most augment.max_scale ({self.max_scale})"
            raise ConfigError(f"augment.min_scale ({self.min_scale}) {rule}")


@dataclass(kw_only=True)
class AlexNet2012AugmentConfig(RandomAugmentConfig):
    """Krizhevsky 2012, section 4.1: a crop of the central square, a flip, colour noise."""

    colour_sigma: float = option(
        0.1,
        "Standard deviation of the noise along the principal components of the RGB colours.",
        minimum=0,
        maximum=10,
    )
