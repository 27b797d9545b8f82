"""Divides the images of one folder of classes into a training and a validation set.

An image's side depends on the SHA-256 of its name CLASS/FILE, so it does not depend on the order or
the path of the data.
"""

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

import numpy as np

from alexnet_ddp.data.sources.index import FileStore, SampleIndex, names_digest
from alexnet_ddp.runtime.errors import DataError


def split_images(
    index: SampleIndex, store: FileStore, val_fraction: float | None, fold: tuple[int, int] | None
) -> tuple[SampleIndex, SampleIndex]:
    """Return (training images, validation images). store: that of `index`.

    val_fraction: an image is in the validation set if its hash is below this share of all hashes,
    so it stays on its side when files are added. Every class of two images or more has an image on
    each side: if no hash of a class is below, the lowest one counts as below, and if all are, the
    highest one does not. Such an image may change its side when files are added to its class.
    fold: (k, n) instead: the k-th of n parts of each class, which have equal sizes and together
    contain every image once.
    The only image of a class is in the training set.
    Raises DataError if no image is in the validation set.
    """
    paths = [store.path(i) for i in range(len(index))]
    given = (
        f"data.val_fraction ({val_fraction})" if fold is None else "data.fold ({}/{})".format(*fold)
    )
    return divide(index, store, choose_val(paths, index.labels, val_fraction, fold, given))


def choose_val(
    names: Sequence[str],
    labels: np.ndarray,
    val_fraction: float | None,
    fold: tuple[int, int] | None,
    given: str,
) -> np.ndarray:
    """Return bool [N]: whether split_images puts an image into the validation set.

    names: CLASS/FILE of each image. labels: int32 [N], ascending. given: the option and its value,
    for messages.
    Raises DataError if no image is in the validation set.
    """
    hashes = np.array([_hash(name) for name in names], np.uint64)
    is_val = np.zeros(len(names), bool)
    starts = np.cumsum([0, *np.bincount(labels)])
    for start, end in pairwise(starts):
        if end - start >= 2:
            of_class = slice(start, end)
            is_val[of_class] = (
                _part(hashes[of_class], *fold) if fold else _below(hashes[of_class], val_fraction)
            )
    if not is_val.any():
        _refuse(given, int(np.diff(starts).max(initial=0)), fold)
    return is_val


def _refuse(given: str, largest: int, fold: tuple[int, int] | None) -> NoReturn:
    """Raise DataError: no image is in the validation set. largest: images of the largest class."""
    if largest < 2:
        rule = (
            "needs a class of two images or more, because the only image of a class is trained on"
        )
        remedy = "add a second image of a class"
    else:
        rule = f"is a part without an image: the largest class has {largest} images"
        remedy = f"add images, or give data.fold=K/{largest}"
    raise DataError(f"{given} {rule}; {remedy}")


def divide(
    index: SampleIndex, store: FileStore, is_val: np.ndarray
) -> tuple[SampleIndex, SampleIndex]:
    """Return (training images, validation images). store: that of `index`. is_val: bool [N]."""

    def side(positions: np.ndarray) -> SampleIndex:
        taken = store.take(positions)
        names = names_digest(map(taken.path, range(len(positions))))
        return SampleIndex(index.classes, index.labels[positions], taken, names)

    return side(np.flatnonzero(~is_val)), side(np.flatnonzero(is_val))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")


def _below(hashes: np.ndarray, fraction: float | None) -> np.ndarray:
    assert fraction is not None  # without a fold
    below = hashes < np.float64(fraction) * 2.0**64
    if not below.any():
        below[hashes.argmin()] = True
    elif below.all():
        below[hashes.argmax()] = False
    return below


def _part(hashes: np.ndarray, k: int, n: int) -> np.ndarray:
    """Deal the images out to the n parts by their hashes, beginning with a part that varies."""
    ranks = np.empty(len(hashes), np.int64)
    ranks[hashes.argsort(kind="stable")] = np.arange(len(hashes))
    return (ranks + int(hashes.min()) % n) % n == k - 1
