"""Opens the training and validation images for any choice of `data=`."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from alexnet_ddp.config import (
    CsvConfig,
    DataConfig,
    DemoConfig,
    FolderConfig,
    ImageNetConfig,
    LabelledConfig,
    ShardsConfig,
    SyntheticConfig,
)
from alexnet_ddp.config.data import AUTO
from alexnet_ddp.config.plugins import PluginDataConfig
from alexnet_ddp.data.sources.classes import (
    BY_NAME,
    NAME,
    ClassOrder,
    numeric_order_note,
    read_order,
    same_looking,
)
from alexnet_ddp.data.sources.index import (
    FileStore,
    SampleIndex,
    check_same_classes,
    index_classes,
    index_folder,
    is_one_class,
)
from alexnet_ddp.data.sources.shards import open_shards
from alexnet_ddp.data.sources.split import split_images
from alexnet_ddp.data.sources.synthetic import synthetic_images
from alexnet_ddp.data.storage import Storage, absolute
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import listed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSets:
    """The images that a run trains on and is evaluated on."""

    train: SampleIndex
    val: SampleIndex
    class_names: list[str]  # readable names, in the order of the labels
    # (eigenvalues, eigenvectors) of the RGB values of the training images, if they are known.
    colour_basis: tuple[np.ndarray, np.ndarray] | None = None
    # (mean, standard deviation) of red, green and blue that data.mean=auto stands for.
    normalisation: tuple[list[float], list[float]] | None = None

    def normalised(self, cfg: DataConfig) -> DataConfig:
        """`cfg`, with which these images were opened, with numbers in place of data.mean=auto."""
        if self.normalisation is None:
            return cfg
        mean, std = self.normalisation
        return replace(cfg, mean=mean, std=std)


def open_data(
    cfg: DataConfig, may_make: bool = False, trained: list[str] | None = None
) -> ImageSets:
    """Open the images that `cfg` selects.

    may_make: create the demo data set if it does not exist.
    trained: the classes of a trained run, in the order of its labels. Folders and archives with
    these classes use this order instead of data.class_order, because that file may be gone.
    Writes files (at least a cache): call it through first_on_node. A source's module is imported
    only when it is selected, which shortens the start.
    Raises DataError, and ConfigError for a wrong class order.
    """
    basis, normalisation = None, None
    match cfg:
        case DemoConfig():
            from alexnet_ddp.data.sources.demo import ensure_demo

            if may_make:
                ensure_demo(Path(cfg.root))
            train, val = _open_folder(Path(cfg.root), BY_NAME)
            names = train.classes
        case FolderConfig():
            train, val = _open_own(cfg, _order(cfg.class_order, trained))
            names = train.classes
        case CsvConfig():
            from alexnet_ddp.data.sources.table import open_table

            train, val = open_table(cfg, _order(cfg.class_order, trained))
            names = train.classes
        case ImageNetConfig():
            from alexnet_ddp.data.sources.imagenet import open_imagenet

            train, val, names = open_imagenet(Path(cfg.root), _order(cfg.class_order, trained))
        case ShardsConfig():
            train, val, names = open_shards(cfg)
            basis = colour_basis(Storage(absolute(cfg.root)))
            if cfg.mean == AUTO:
                normalisation = _normalisation(Storage(absolute(cfg.root)), cfg.std)
        case PluginDataConfig():
            from alexnet_ddp.data.sources.plugin import open_plugin

            train, val = open_plugin(cfg, "train"), open_plugin(cfg, "val")
            names = train.classes
        case SyntheticConfig():
            train = synthetic_images(cfg, cfg.num_train)
            val = synthetic_images(cfg, cfg.num_val)
            names = train.classes
        case _:
            raise TypeError(f"no data for {type(cfg).__name__}")
    check_same_classes(train, val)
    choice = cfg.class_order if isinstance(cfg, LabelledConfig) else NAME
    _warn_of_names(train.classes, trained is None and choice == NAME)
    sides = train.subset(cfg.limit_train), val.subset(cfg.limit_val)
    return ImageSets(*sides, names, basis, normalisation)


def _order(choice: str, trained: list[str] | None) -> ClassOrder:
    if trained is None:
        return read_order(choice)
    return ClassOrder(names=tuple(trained), is_binding=False)


def _warn_of_names(classes: list[str], by_name: bool) -> None:
    note = numeric_order_note(classes) if by_name else None
    if note:
        log.warning(
            "%s; for that order give data.class_order=numeric (to prepare: class_order=numeric)",
            note,
        )
    twins = same_looking(classes)
    if twins:
        log.warning(
            "several classes are named %s, in different Unicode forms: are they one class?",
            listed(twins),
        )


def _open_folder(root: Path, order: ClassOrder) -> tuple[SampleIndex, SampleIndex]:
    return index_folder(root, "train", order), index_folder(root, "val", order)


def _without_splits(root: Path) -> str:
    """The message for a folder with neither train nor val."""
    divide = "give data.val_fraction=0.15 to divide CLASS/*"
    if is_one_class(root):
        remedy = f"if it is one class, give the folder above it ({root.absolute().parent})"
        return f"data.root ({root}) contains images and no class folders; {remedy}, and {divide}"
    remedy = f"arrange the images as train/CLASS/* and val/CLASS/*, or {divide}"
    return f"data.root ({root}) contains neither train nor val; {remedy}"


def _open_own(cfg: FolderConfig, order: ClassOrder) -> tuple[SampleIndex, SampleIndex]:
    """The two sets of a folder with train and val, or of one that is divided."""
    root, fold = Path(cfg.root), cfg.fold_of
    sides = [name for name in ("train", "val") if (root / name).is_dir()]
    if cfg.val_fraction is None and fold is None:
        if root.is_dir() and not sides and not (root / "index.json").exists():
            raise DataError(_without_splits(root))
        return _open_folder(root, order)
    option = "data.val_fraction" if fold is None else "data.fold"
    if "val" in sides:
        remedy = f"leave {option} out, or give {option}=null for a run that has it"
        raise DataError(f"data.root ({root}) contains val, so nothing is divided; {remedy}")
    if not root.is_dir():
        raise DataError(f"data.root ({root}) is not a folder; give one that contains CLASS/*")
    index = index_classes(root.joinpath(*sides), order)
    assert isinstance(index.store, FileStore)  # of a folder
    return split_images(index, index.store, cfg.val_fraction, fold)


def colour_basis(root: Storage) -> tuple[np.ndarray, np.ndarray] | None:
    """Principal components of the RGB values in [0, 1] of packed training images.

    Returns eigenvalues [3] and eigenvectors [3, 3] (columns), float64; None, with a warning, if the
    file of the colour statistics cannot be read.
    """
    try:
        found = json.loads(root.read("train.stats.json"))
        return np.array(found["eigenvalues"]), np.array(found["eigenvectors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s cannot be read (%s): colour noise uses ImageNet's components",
            root.path("train.stats.json"),
            error,
        )
        return None


def _normalisation(root: Storage, std: list[float] | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the RGB values in [0, 1] of packed training images.

    std: returned as it is, if it is given. Raises DataError if the file of the colour statistics
    has none, or a standard deviation of 0.
    """
    path = root.path("train.stats.json")
    try:
        found = json.loads(root.read("train.stats.json"))
        mean = [float(value) for value in found["mean"]]
        std = [float(value) for value in found["std"]] if std is None else std
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"data.mean (auto) needs {path}, which cannot be read ({error})"
        remedy = "prepare the shards again, or give data.mean=[r,g,b] and data.std=[r,g,b]"
        raise DataError(f"{rule}; {remedy}") from error
    if min(std) <= 0:
        rule = f"data.mean (auto) takes the standard deviations {std} from {path}"
        raise DataError(f"{rule}, which must be greater than 0; give data.std=[r,g,b] as well")
    return mean, std
