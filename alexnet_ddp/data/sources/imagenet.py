"""ImageNet as it is distributed: three archives, read in place, or the folders extracted from them.

Nothing is extracted: members of a tar archive are uncompressed, so an offset and a size are enough
to read an image.
"""

import gzip
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet_ddp.data.sources import scan
from alexnet_ddp.data.sources.classes import BY_NAME, ClassOrder, class_difference
from alexnet_ddp.data.sources.index import (
    SampleIndex,
    check_same_classes,
    index_folder,
    names_digest,
)
from alexnet_ddp.data.sources.tars import ArchiveStore, Member, tar_members
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.printing import listed

TRAIN = "ILSVRC2012_img_train.tar"  # contains one tar for each class: n01440764.tar, ...
VAL = "ILSVRC2012_img_val.tar"  # flat: ILSVRC2012_val_00000001.JPEG, ...
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_MAX_DEVKIT = 200_000_000  # bytes, unpacked; the real one is far smaller
_THREADS = 8  # threads that read headers: they hide the latency of disks and networks


class Devkit(NamedTuple):
    """The classes and the validation labels from the development kit."""

    # ILSVRC2012_ID -> WordNet id, for the leaves of the hierarchy: inner nodes are not classes.
    wnids: dict[int, str]
    words: dict[str, str]  # WordNet id -> "tench, Tinca tinca"
    truth: list[int]  # the ILSVRC2012_ID of ILSVRC2012_val_0000000i.JPEG at i - 1


def open_imagenet(
    root: Path, order: ClassOrder = BY_NAME
) -> tuple[SampleIndex, SampleIndex, list[str]]:
    """Open an ImageNet directory: (train, val, readable class names). Classes are WordNet ids.

    Each split is read from its archive if that exists, otherwise from its folder: `root` may
    contain the three archives, or train/CLASS/* and val/CLASS/*, or one of each. The validation
    archive needs the devkit. The readable names are the devkit's words, or the WordNet ids if there
    is no devkit. Raises DataError if something is missing, cut short or contradictory.
    """
    root = Path(os.path.abspath(root))
    _check_pieces(root)
    devkit = read_devkit(root / DEVKIT) if (root / DEVKIT).is_file() else None
    train = (
        _train_archive(root / TRAIN, order)[0]
        if (root / TRAIN).is_file()
        else index_folder(root, "train", order)
    )
    val = (
        _val_archive(root / VAL, devkit, train.classes)[0]
        if devkit and (root / VAL).is_file()
        else None
    )
    val = val or index_folder(root, "val", order)
    check_same_classes(train, val)
    words = devkit.words if devkit else {}
    return train, val, [words.get(wnid, wnid) for wnid in train.classes]


def open_archive(
    root: Path, split: str, order: ClassOrder = BY_NAME
) -> tuple[SampleIndex, list[str], list[str]]:
    """One split of the archives, for packing: (images, their file names, readable class names).

    The last image of a class may be cut short: it is listed with the bytes that exist.
    Raises DataError.
    """
    devkit = read_devkit(root / DEVKIT) if split == "val" or (root / DEVKIT).is_file() else None
    if split == "train":
        index, names = _train_archive(root / TRAIN, order, may_be_cut=True)
    else:
        assert devkit is not None  # read above
        classes = order.arrange(list(devkit.words), str(root / DEVKIT))
        index, names = _val_archive(root / VAL, devkit, classes, may_be_cut=True)
    words = devkit.words if devkit else {}
    return index, names, [words.get(wnid, wnid) for wnid in index.classes]


def _check_pieces(root: Path) -> None:
    if not root.is_dir():
        raise DataError(
            f"data.root ({root}) is not a folder; "
            f"give the one that contains {TRAIN}, {VAL} and {DEVKIT}, or the folders train and val"
        )
    needed = {"train": [TRAIN], "val": [VAL, DEVKIT]}
    missing = [
        name for split, names in needed.items() if not (root / split).is_dir()
        for name in names if not (root / name).is_file()
    ]  # fmt: skip
    if missing:
        raise DataError(
            f"data.root ({root}) lacks {', '.join(missing)}; put them there as distributed, "
            "or arrange the images as train/CLASS/* and val/CLASS/*"
        )


def read_devkit(path: Path) -> Devkit:
    """Read ILSVRC2012_devkit_t12.tar.gz in memory. Raises DataError if damaged or incomplete."""
    try:
        with gzip.open(path) as stream:  # verifies the CRC first: scipy crashes on damaged bytes
            whole = stream.read(_MAX_DEVKIT + 1)
        if len(whole) > _MAX_DEVKIT:
            raise ValueError(f"it contains more than {_MAX_DEVKIT:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
            files = {}
            for member in archive:
                if member.isfile() and member.name.endswith(("data/meta.mat", _GROUND_TRUTH)):
                    name = "data/" + member.name.rsplit("/", 1)[1]
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    files[name] = content.read()
        wnids, words = _synsets(files["data/meta.mat"])
        return Devkit(wnids, words, [int(line) for line in files[_GROUND_TRUTH].split()])
    except KeyError as error:
        raise DataError(f"{path} lacks {error}; copy it again from its source") from error
    except Exception as error:  # damaged bytes can raise nearly anything in gzip, tarfile and scipy
        why = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({why}); copy it again from its source") from error


def _synsets(meta_mat: bytes) -> tuple[dict[int, str], dict[str, str]]:
    from scipy.io import loadmat  # slow to import, and only the devkit needs it

    synsets = np.atleast_1d(loadmat(io.BytesIO(meta_mat), squeeze_me=True)["synsets"])
    leaves = [s for s in synsets if int(s["num_children"]) == 0]
    return (
        {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves},
        {str(s["WNID"]): str(s["words"]) for s in leaves},
    )


@contextmanager
def _opened(path: Path, stamps: scan.Stamps) -> Iterator[tuple[int, int]]:
    """(file descriptor, size in bytes) of an archive to be scanned."""
    try:
        stamps[str(path)] = scan.stamp(path)
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from error
    try:
        yield fd, os.fstat(fd).st_size
    finally:
        os.close(fd)


def _images(members: Iterable[Member], ignored: scan.Ignored, archive: str) -> list[Member]:
    """The visible images among `members`, by file name without folders, sorted."""
    plain = (Member(m.name.rsplit("/", 1)[-1], m.offset, m.size) for m in members)
    images = sorted(m for m in plain if ignored.accepts(m.name, archive))
    for one, other in pairwise(images):
        if one.name == other.name:
            raise DataError(f"{archive} contains {one.name} twice; copy it again from its source")
    return images


def _places(images: list[Member]) -> scan.Arrays:
    return {
        "offsets": np.array([m.offset for m in images], np.int64),
        "sizes": np.array([m.size for m in images], np.int64),
    }


def _train_archive(
    path: Path, order: ClassOrder, may_be_cut: bool = False
) -> tuple[SampleIndex, list[str]]:
    """(images, their file names); the names are only returned with `may_be_cut`."""

    def build(stamps: scan.Stamps) -> scan.Arrays:
        return _scan_train(path, stamps, order, may_be_cut)

    found = scan.cached("train" + "-cut" * may_be_cut, path, build, order.key())
    scan.report(found)
    store = ArchiveStore(str(path), found["offsets"], found["sizes"])
    classes, digest = scan.from_json(found["classes"]), scan.from_json(found["digest"])
    return SampleIndex(classes, found["labels"], store, digest), scan.from_json(found["names"])


def _scan_train(
    path: Path, stamps: scan.Stamps, order: ClassOrder, may_be_cut: bool
) -> scan.Arrays:
    ignored, places, counts, names = scan.Ignored(), [], [], []
    with _opened(path, stamps) as (fd, size), ThreadPoolExecutor(_THREADS) as pool:
        files = {m: m.name.rsplit("/", 1)[-1] for m in tar_members(fd, path, 0, size)}
        tars = [m for m, name in files.items() if ignored.accepts(name, str(path), (".tar",))]
        of = {Path(m.name).stem: m for m in tars}
        if not of or len(of) < len(tars):
            got = listed(sorted(Path(m.name).stem for m in tars)) or "none"
            raise DataError(
                f"{path} must contain one .tar for each class, got {got}; "
                "copy it again from its source"
            )
        classes = order.arrange(list(of), str(path))
        tars = [of[name] for name in classes]

        def look(tar: Member) -> tuple[list[Member], scan.Ignored]:
            mine = scan.Ignored()
            inside = tar_members(fd, path, tar.offset, tar.offset + tar.size, may_be_cut)
            return _images(inside, mine, f"{path}:{tar.name}"), mine

        for images, left_out in scan.watched(
            pool.map(look, tars), len(tars), f"indexing {path.name}"
        ):
            places.append(_places(images))
            counts.append(len(images))
            names += [image.name for image in images]
            ignored.merge(left_out)
    if 0 in counts:
        raise DataError(
            f"{path} contains no images of {classes[counts.index(0)]}; "
            "copy it again from its source"
        )
    joined = {
        name: np.concatenate([place[name] for place in places]) for name in ("offsets", "sizes")
    }
    labels = np.repeat(np.arange(len(tars), dtype=np.int32), counts)
    digest = names_digest(f"{classes[label]}/{name}" for label, name in zip(labels.tolist(), names))
    names = names if may_be_cut else []  # training does not need them
    lists = {"classes": classes, "names": names, "notes": ignored.notes(), "digest": digest}
    return joined | {"labels": labels} | {key: scan.to_json(value) for key, value in lists.items()}


def _val_archive(
    path: Path, devkit: Devkit, classes: list[str], may_be_cut: bool = False
) -> tuple[SampleIndex, list[str]]:
    """(images, their file names)."""
    what = "val" + "-cut" * may_be_cut
    found = scan.cached(
        what, path, lambda stamps: _scan_val(path, len(devkit.truth), stamps, may_be_cut)
    )
    scan.report(found)
    labels = _val_labels(path, found["numbers"], devkit, classes)
    # The numbers have eight digits each, so sorting by number sorts by name.
    order = np.lexsort((found["numbers"], labels))
    store = ArchiveStore(str(path), found["offsets"], found["sizes"])
    labels = labels[order]
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in found["numbers"][order].tolist()]
    digest = names_digest(f"{classes[label]}/{name}" for label, name in zip(labels.tolist(), names))
    return SampleIndex(classes, labels, store.take(order), digest), names


def _scan_val(path: Path, expected: int, stamps: scan.Stamps, may_be_cut: bool) -> scan.Arrays:
    ignored = scan.Ignored()
    with _opened(path, stamps) as (fd, size):
        members = tar_members(fd, path, 0, size, may_be_cut)
        images = _images(
            scan.watched(members, expected, f"indexing {path.name}"), ignored, str(path)
        )
    numbers = []
    for member in images:
        named = _VAL_NAME.fullmatch(member.name)
        if named is None:
            raise DataError(
                f"{path} contains {member.name}; images must be named "
                "ILSVRC2012_val_00000001.JPEG and so on: copy it again from its source"
            )
        numbers.append(int(named[1]))
    found = {
        "numbers": np.array(numbers, np.int32),
        "notes": scan.to_json(ignored.notes()),
    }
    return found | _places(images)


def _val_labels(path: Path, numbers: np.ndarray, devkit: Devkit, classes: list[str]) -> np.ndarray:
    """The label (position in `classes`) of each image, by its number: int32 [N]."""
    remedy = f"take all files of {path.parent} from one release"
    differ = class_difference(DEVKIT, list(devkit.words), "the training set", classes, remedy)
    if differ:
        raise DataError(f"the classes differ: {differ}")
    unknown = sorted(set(devkit.truth) - set(devkit.wnids))
    if unknown:
        ids = listed([str(i) for i in unknown])
        raise DataError(
            f"{DEVKIT} labels images with ids it has no class for ({ids}); "
            "copy it again from its source"
        )
    if not np.array_equal(np.sort(numbers), np.arange(1, len(devkit.truth) + 1)):
        rule = f"must be numbered 1 to {len(devkit.truth):,}, as many as {DEVKIT} has labels"
        raise DataError(
            f"the {len(numbers):,} images of {path} {rule}; copy both again from one release"
        )
    label = {wnid: i for i, wnid in enumerate(classes)}
    of_number = np.array([label[devkit.wnids[i]] for i in devkit.truth], np.int32)
    return of_number[numbers - 1]
