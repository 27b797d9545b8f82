"""Knobs of the data and of its augmentation."""

import math
from dataclasses import dataclass
from enum import StrEnum

from alexnet_ddp.config.checks import MISSING, positive, require, within

MAX_SIDE, MAX_PIXELS = (
    20_000,
    100_000_000,
)  # an image that claims more is a bad image, in training as in preparation
MAX_BYTES = 4 * MAX_PIXELS  # and so is a larger file, which may be a hole without end

OnBadImage = StrEnum(
    "OnBadImage", {name: name for name in ("raise", "skip")}
)  # `raise` is a Python keyword


class Interpolation(StrEnum):
    bilinear = "bilinear"
    bicubic = "bicubic"


# Of ImageNet's RGB values in [0, 1]: what torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Policy(StrEnum):
    none = "none"
    randaugment = "randaugment"
    trivialaugment = "trivialaugment"


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from, and what size the network sees."""

    image_size: int = 224  # pixels, height = width
    start_image_size: int | None = (
        None  # training images grow from this size to image_size; null: they do not grow
    )
    grow_epochs: int | None = (
        None  # with start_image_size: the epoch (from 0) that is the first at image_size
    )
    eval_resize: int | None = (
        None  # pixels of the shorter side before the centre crop; null: image_size * 256 / 224
    )
    # Of RGB values in [0, 1]. null: ImageNet's; with model=timm those of the network
    mean: list[float] | None = None
    std: list[float] | None = None
    # Of the evaluation's resize. null: bilinear; with model=timm that of the network
    eval_interpolation: Interpolation | None = None
    num_threads: int | None = None  # that decode, a rank; null: this rank's share of the cores
    on_bad_image: OnBadImage = OnBadImage[
        "raise"
    ]  # raise: exit 65 with its path; skip: a smaller batch, and quarantine.jsonl
    max_bad_images: int | None = (
        None  # with skip: so many different training images, in all of a run; null: 100
    )
    limit_train: int | None = None  # use only so many images, the same ones in each run
    limit_val: int | None = None

    def __post_init__(self) -> None:
        positive("data", self, "image_size", "num_threads", "limit_train", "limit_val")
        within("data", self, 1, MAX_SIDE, "image_size", "eval_resize")
        within("data", self, 0, math.inf, "max_bad_images")
        skips, rule = (
            self.on_bad_image is OnBadImage.skip,
            "is only read by data.on_bad_image=skip; leave it out",
        )
        require(
            skips or self.max_bad_images is None,
            f"data.max_bad_images ({self.max_bad_images}) {rule}",
        )
        if skips and self.max_bad_images is None:
            self.max_bad_images = 100
        if self.eval_resize is None:
            self.eval_resize = round(self.image_size * 256 / 224)
        rule = f"must be at least data.image_size ({self.image_size})"
        require(
            self.eval_resize >= self.image_size, f"data.eval_resize ({self.eval_resize}) {rule}"
        )
        for name in ("mean", "std"):
            _check_three(name, getattr(self, name))
        require(
            self.std is None or min(self.std) > 0, f"data.std ({self.std}) must be greater than 0"
        )
        positive("data", self, "start_image_size", "grow_epochs")
        start, together = (
            self.start_image_size,
            (self.start_image_size is None) == (self.grow_epochs is None),
        )
        rule = "belong together: from which size, and until which epoch; give both or none"
        require(
            together,
            f"data.start_image_size ({start}) and data.grow_epochs ({self.grow_epochs}) {rule}",
        )
        rule = f"must be less than data.image_size ({self.image_size}), to grow to it"
        require(start is None or start < self.image_size, f"data.start_image_size ({start}) {rule}")

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, standard deviation) of red, green and blue in [0, 1]."""
        return tuple(self.mean or IMAGENET_MEAN), tuple(self.std or IMAGENET_STD)

    def train_image_size(self, epoch: int) -> int:
        """Pixels: linear in the epoch, in multiples of 32 (what fast kernels like), up to image_size itself."""
        if self.start_image_size is None or epoch >= self.grow_epochs:
            return self.image_size
        grown = (self.image_size - self.start_image_size) * epoch / self.grow_epochs
        return self.start_image_size + int(grown) // 32 * 32


def _check_three(name: str, values: list[float] | None) -> None:
    rule = f"must be three numbers, of red, green and blue in [0, 1]; write data.{name}=[r,g,b]"
    require(values is None or len(values) == 3, f"data.{name} ({values}) {rule}")


@dataclass(kw_only=True)
class FolderConfig(DataConfig):
    root: str = MISSING  # holds train/CLASS/* and val/CLASS/*
    class_order: str = (
        "name"  # of the labels: name | numeric | a text file with one class name a line
    )


@dataclass(kw_only=True)
class ImageNetConfig(DataConfig):
    root: str = (
        MISSING  # holds the ILSVRC2012 archives as distributed, or the extracted train/ and val/
    )
    class_order: str = "name"  # as for data=folder


class Shuffle(StrEnum):
    full = "full"  # a permutation of all images
    window = "window"  # of the shards, and of the images of a few shards at a time


@dataclass(kw_only=True)
class ShardsConfig(DataConfig):
    root: str = (
        MISSING  # holds what `python -m alexnet_ddp.prepare` made: a directory or an fsspec URL
    )
    shuffle: Shuffle = Shuffle.full
    window_shards: int | None = None  # shuffle=window: how many shards are open at a time; null: 16
    cache_dir: str | None = None  # for a URL: a folder of the node, for whole shards
    cache_gb: float | None = (
        None  # 10^9 bytes; what was used least recently gives way; null: no limit
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("data", self, "window_shards", "cache_gb")
        within("data", self, 0, 1e9, "cache_gb")
        if self.shuffle is Shuffle.window:
            self.window_shards = self.window_shards or 16
        rule = "is only read by data.shuffle=window, this is full; leave it out"
        unread = self.shuffle is Shuffle.full and self.window_shards is not None
        require(not unread, f"data.window_shards ({self.window_shards}) {rule}")


@dataclass(kw_only=True)
class DemoConfig(DataConfig):
    root: str = MISSING  # the built-in data is written here, once


@dataclass(kw_only=True)
class SyntheticConfig(DataConfig):
    """Random tensors without files: for benchmarks and dry runs."""

    num_train: int = 2_048
    num_val: int = 256
    num_classes: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("data", self, "num_train", "num_val", "num_classes")


@dataclass(kw_only=True)
class AugmentConfig:
    """What happens to a training image, as a function of (seed, epoch, index)."""


@dataclass(kw_only=True)
class NoAugmentConfig(AugmentConfig):
    """The evaluation's resize and centre crop."""


@dataclass(kw_only=True)
class RandomAugmentConfig(AugmentConfig):
    """What may be added to any crop, all of it off unless asked for. data/policy.py and data/effects.py do it."""

    policy: Policy = Policy.none  # operations on each image, after its crop and flip
    num_ops: int | None = None  # of randaugment, one after the other; null: 2
    magnitude: int | None = None  # of randaugment's operations, 0 to 30; null: 9
    brightness: float = 0.0  # b: a factor from [1 - b, 1 + b]; so for the next two
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # h: a turn from [-h, h], where 1 is once round the colour circle
    erase: float = 0.0  # probability of a rectangle of the mean colour
    mixup_alpha: float = (
        0.0  # a: two images blended in shares from Beta(a, a), and their labels with them
    )
    cutmix_alpha: float = (
        0.0  # a: a rectangle pasted from another image; with both, one of them is drawn an image
    )

    def __post_init__(self) -> None:
        within("augment", self, 0, 1, "brightness", "contrast", "saturation", "erase")
        within("augment", self, 0, 0.5, "hue")
        within("augment", self, 0, 100, "mixup_alpha", "cutmix_alpha")
        if self.policy is Policy.randaugment:
            self.num_ops = 2 if self.num_ops is None else self.num_ops
            self.magnitude = 9 if self.magnitude is None else self.magnitude
        for name in ("num_ops", "magnitude"):
            rule = f"is only read by augment.policy=randaugment, this is {self.policy.value}; leave it out"
            value = getattr(self, name)
            require(
                value is None or self.policy is Policy.randaugment,
                f"augment.{name} ({value}) {rule}",
            )
        positive("augment", self, "num_ops")
        within("augment", self, 0, 30, "magnitude")


@dataclass(kw_only=True)
class BasicAugmentConfig(RandomAugmentConfig):
    """RandomResizedCrop and horizontal flip, with torchvision's distributions."""

    min_scale: float = 0.08  # share of the image's area that a crop covers, at least
    max_scale: float = 1.0
    max_ratio: float = 4 / 3  # width / height, log-uniform in [1 / max_ratio, max_ratio]
    flip: float = 0.5  # probability

    def __post_init__(self) -> None:
        super().__post_init__()
        within("augment", self, 0, 1, "min_scale", "max_scale", "flip")
        rule = f"must be at most augment.max_scale ({self.max_scale})"
        require(self.min_scale <= self.max_scale, f"augment.min_scale ({self.min_scale}) {rule}")
        require(self.max_ratio >= 1, f"augment.max_ratio ({self.max_ratio}) must be at least 1")


@dataclass(kw_only=True)
class AlexNet2012AugmentConfig(RandomAugmentConfig):
    """Krizhevsky 2012, section 4.1: a random crop of the central square, flip, colour noise along the RGB axes."""

    flip: float = 0.5
    colour_sigma: float = 0.1  # of the normal noise that multiplies each eigenvalue

    def __post_init__(self) -> None:
        super().__post_init__()
        within("augment", self, 0, 1, "flip")
        within("augment", self, 0, 10, "colour_sigma")
