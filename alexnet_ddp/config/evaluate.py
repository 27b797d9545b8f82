"""Options of `alexnet-ddp evaluate`."""

from dataclasses import dataclass, fields
from typing import Any

from alexnet_ddp.config.data import AUTO, InputConfig
from alexnet_ddp.config.option import check_suffix, key_of, option, shown
from alexnet_ddp.config.recipe import Head
from alexnet_ddp.config.run import Config
from alexnet_ddp.runtime.errors import ConfigError

# The options of data that images=DIR uses. The others select images of a data set, which
# images=DIR replaces.
_USED_WITH_IMAGES = {f"data.{one.name}" for one in fields(InputConfig)} | {
    "data.num_threads",
    "data.on_bad_image",
}


@dataclass(kw_only=True)
class AveragingConfig(Config):
    """A run, and which of its checkpoints are averaged."""

    average: Any = option(
        None,
        "Take the mean of the weights of several checkpoints: the number of last ones, such as 3, "
        "or a list of steps, such as [100,200,300]. The statistics of BatchNorm are computed "
        "again for these weights.",
        kind="integer, or list of integers",
        null="one checkpoint",
    )
    batch_norm_images: int = option(
        10_000,
        "With average: number of training images for the statistics of BatchNorm, at most all.",
        minimum=2,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average is None:
            if self.batch_norm_images != self.default_of("batch_norm_images"):
                rule = f"batch_norm_images ({self.batch_norm_images}) would be ignored"
                raise ConfigError(f"{rule} without average; give average=3 too, or leave it out")
            return
        if not _is_several(self.average):
            rule = "must be a number of checkpoints of at least 2, or a list of different steps"
            raise ConfigError(f"average ({shown(self.average)}) {rule}, such as [100,200]")
        if self.model.weights is not None:
            rule = "takes checkpoints of a run, and model.weights is a file"
            raise ConfigError(f"average ({shown(self.average)}) {rule}; give run.name instead")


def _is_several(value: Any) -> bool:
    """True for an integer of at least 2, and a list of at least two different steps."""
    if not isinstance(value, list):
        return type(value) is int and value >= 2
    are_steps = all(type(one) is int and one >= 0 for one in value)
    return are_steps and len(set(value)) == len(value) >= 2


@dataclass(kw_only=True)
class EvaluateConfig(AveragingConfig):
    """A run or a file of weights, and what is computed besides its accuracy."""

    calibrate: bool = option(
        False,
        "Fit a temperature to the validation images and write it to calibration.json in the run's "
        "directory. predict then divides the logits by it.",
    )
    metrics: bool = option(
        False,
        "Also write precision, recall, F1, AUROC, average precision, Cohen's kappa, the "
        "calibration error and the confusions of classes to evaluation.json, and a table of the "
        "classes to evaluation_classes.csv; with model.weights and without output, only print the "
        "means. Needs: pip install 'alexnet-ddp[metrics]'.",
    )
    output: str | None = option(
        None,
        "A folder for evaluation.json and evaluation_classes.csv; with images their names are "
        "evaluation_images.json and evaluation_images_classes.csv. It is created if it does not "
        "exist, and the files of an earlier evaluation in it are replaced.",
        null="the directory of the run; of model.weights nothing is written",
    )
    predictions: str | None = option(
        None,
        "A .csv or .parquet file with the label, the most probable classes and the loss of each "
        "validation image.",
        null="not written",
    )
    top_k: int = option(5, "Number of classes for each image in predictions.", minimum=1)
    images: str | None = option(
        None,
        "A folder CLASS/* to evaluate the run or the file of weights on, in place of its "
        "validation images. Its classes may be some of those of the network.",
        null="the validation images of the run, or of data",
    )
    classes: str | None = option(
        None,
        "With images and model.weights, the classes in the order of the outputs, as folders name "
        "them: a text file with one name per line, or a .json list.",
        null="those that the file of weights contains, or ImageNet's for published weights",
    )
    class_map: str | None = option(
        None,
        "With images, a JSON file {folder: class}. A class is an id (a folder name of the "
        "training, or a WordNet id for published weights), a name or a label.",
        null="the folders are named after ids or names, or all after labels",
    )
    only_present: bool = option(
        False,
        "With images: compare only the classes that have images there. Published results on "
        "ImageNet-A and ImageNet-R do that.",
    )
    at_step: str = option(
        "best",
        "The checkpoint of the run: best (of the best evaluation), last, or the number of a step.",
    )
    crops: int = option(
        1,
        "Crops of each image: 1, the centre; 5, the corners and the centre; 10, these and their "
        "mirror images. The mean of the probabilities counts.",
    )
    flip: bool = option(
        False,
        "Also use the mirror image of each of the 1 or 5 crops.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrate and self.model.weights is not None:
            rule = "is stored with a run, and model.weights is a file"
            raise ConfigError(f"calibrate=true {rule}; give run.name in place of model.weights")
        if self.model.weights is not None and self.model.head is Head.new:
            raise ConfigError("model.head=new would evaluate an untrained head; leave it auto")
        self._check_views()
        self._check_average()
        self._check_images()
        if self.at_step not in ("best", "last") and not self.at_step.isdecimal():
            raise ConfigError(f"at_step ({self.at_step}) must be best, last or a number of steps")
        if self.at_step != "best" and self.model.weights is not None:
            rule = "is a checkpoint of a run, and model.weights is a file"
            raise ConfigError(f"at_step ({self.at_step}) {rule}; give run.name instead of it")
        check_suffix("predictions", self.predictions, (".csv", ".parquet"))
        if self.predictions is None and self.top_k != self.default_of("top_k"):
            rule = "is the number of classes in the file of predictions, which is not written"
            raise ConfigError(f"top_k ({self.top_k}) {rule}; give predictions=FILE.csv too")

    def _check_average(self) -> None:
        """Raise ConfigError for options that belong to one checkpoint."""
        if self.average is not None and self.at_step != "best":
            rule = f"would be ignored with average ({shown(self.average)})"
            raise ConfigError(f"at_step ({self.at_step}) {rule}; give one of them")
        if self.average is not None and self.calibrate:
            rule = "stores a temperature for one checkpoint"
            raise ConfigError(f"calibrate=true {rule}; leave average out")

    def _check_views(self) -> None:
        """Raise ConfigError for views that do not exist, or with which calibrate has no meaning."""
        if self.crops not in (1, 5, 10):
            raise ConfigError(f"crops ({self.crops}) must be 1, 5 or 10")
        if self.flip and self.crops == 10:
            raise ConfigError("flip (true) would be ignored with crops=10, which mirrors; use one")
        if self.calibrate and (self.crops > 1 or self.flip):
            rule = "fits the probabilities of one crop, which predict uses"
            raise ConfigError(f"calibrate=true {rule}; leave crops and flip out")

    def _check_images(self) -> None:
        """Raise ConfigError for options that images would ignore, or that need it."""
        if self.images is None:
            for name in ("class_map", "only_present", "classes"):
                if getattr(self, name):
                    rule = f"{name} ({getattr(self, name)}) would be ignored without images"
                    raise ConfigError(f"{rule}; give images=DIR too")
            return
        if self.classes is not None and self.model.weights is None:
            rule = f"classes ({self.classes}) would be ignored: a run knows its classes"
            raise ConfigError(f"{rule}; leave it out, or give model.weights=FILE")
        if self.calibrate:
            rule = "fits the probabilities to the validation images of the run"
            raise ConfigError(f"calibrate=true {rule}; leave images out")


def ignored_with_images(overrides: list[str]) -> list[str]:
    """The overrides of data that images=DIR ignores, also the choice of a data set."""
    keys = {override: key_of(override) for override in overrides}
    return [
        override
        for override, key in keys.items()
        if key == "data" or (key.startswith("data.") and key not in _USED_WITH_IMAGES)
    ]


def refuse_ignored_data(options: EvaluateConfig, overrides: list[str]) -> None:
    """Raise ConfigError for an option of data, given in `overrides`, that images ignores.

    With average, BatchNorm may need the training images, which these options choose.
    """
    if options.images is None:
        return
    ignored = ignored_with_images(overrides)
    if options.average is not None:
        ignored = [one for one in ignored if key_of(one) == "data.limit_val"]
    for override in ignored:
        key, value = key_of(override), override.partition("=")[2]
        rule = f"would be ignored: all images in images ({options.images}) are evaluated"
        raise ConfigError(f"{key} ({shown(value)}) {rule}; leave {key} or images out")


def refuse_auto_mean(options: EvaluateConfig, data: InputConfig) -> None:
    """Raise ConfigError for data.mean=auto with images, which have no statistics.

    data: of the evaluation, with the options that it takes from the run.
    """
    if options.images is not None and data.mean == AUTO:
        rule = f"takes the statistics of shards, and images ({options.images}) has none"
        remedy = "leave it out, or give data.mean=[r,g,b] and data.std=[r,g,b]"
        raise ConfigError(f"data.mean ({AUTO}) {rule}; {remedy}")
