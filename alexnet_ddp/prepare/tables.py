"""Lists the images in folders of Hugging Face `datasets`: Parquet files, or Dataset.save_to_disk.

A row has an image, as a struct with its encoded bytes or as the bytes themselves, and a label.
pyarrow reads the rows; it is optional and only imported here. Images of a Parquet file are
compressed together, so a single one cannot be read. Before a split is packed, its images are
therefore copied one after the other into files in root, from which the workers read.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet_ddp.data.sources import scan
from alexnet_ddp.data.sources.classes import BY_NAME, ClassOrder
from alexnet_ddp.data.storage import Storage
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.printing import listed

log = logging.getLogger(__name__)

COPIES = "_source"  # the folder in root for copies of the images
# What `datasets` and its users call the two splits. The first one that exists is taken.
_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev", "test")}
_ROWS = 64  # of a Parquet file in memory at a time, beside its compressed pages
_MAX_CLASSES = 1_000_000  # a larger label is damage


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read, and the names of its classes if it has them."""

    image: str
    label: str
    classes: list[str] | None


@dataclass(frozen=True)
class Table:
    """The N images of a split, in the order of their rows."""

    files: list[str]  # relative to the source
    classes: list[str]
    labels: np.ndarray  # int32 [N]
    names: list[str]  # [N]: CLASS/FILE/ROW
    file_of: np.ndarray  # int32 [N]: position in files
    sizes: np.ndarray  # int64 [N]: bytes of each image; 0 for a missing one


def table_files(storage: Storage, split: str) -> list[str]:
    """The files of a split, relative to the source, in order; empty if there are none.

    They are SPLIT.parquet, SPLIT-*.parquet (also in the folder data), SPLIT/*.parquet, or
    SPLIT/data-*.arrow as Dataset.save_to_disk writes.
    """
    return _find(storage, split)[1]


def read_table(storage: Storage, split: str, order: ClassOrder) -> Table:
    """Read the labels and the sizes of all images of a split.

    Raises DataError for files that cannot be read or do not fit, ConfigError if pyarrow is missing
    or if `order` would be ignored.
    """
    name, files = _find(storage, split)
    if name != split:
        log.info("%s: the split %s is packed as %s", storage.root, name, split)
    labels: list[Any] = []
    sizes, file_of, known = [], [], None
    for k, file in enumerate(scan.watched(files, len(files), f"indexing {split}")):
        path = storage.path(file)
        columns = _columns(path)
        known = known or columns
        if columns != known:
            rule = f"has other columns or classes than {storage.path(files[0])}"
            raise DataError(f"{path} {rule}; give the files of one data set")
        before = len(labels)
        for some, lengths in _labels_and_sizes(path, columns):
            labels += some
            sizes.append(lengths)
        file_of.append(np.full(len(labels) - before, k, np.int32))
    assert known is not None  # the split has files
    found = np.concatenate([np.zeros(0, np.int64), *sizes])
    if not found.any():
        rule = f"{storage.path(files[0])} contains no image in column {known.image}"
        raise DataError(f"{rule}; write the data set with the bytes of the images in it")
    classes, numbers = _classes(storage, split, known, labels, order)
    files_of_rows = np.concatenate(file_of)
    rows = np.concatenate([np.arange(len(part)) for part in file_of])
    stems = [file.replace("/", "-").rpartition(".")[0] for file in files]
    names = [
        f"{classes[label]}/{stems[k]}/{row:08d}"
        for label, k, row in zip(numbers.tolist(), files_of_rows.tolist(), rows.tolist())
    ]
    return Table(files, classes, numbers, names, files_of_rows, found)


def copies_of(source: Storage, split: str, table: Table) -> list[str]:
    """The files for copies of the images of each file, relative to root.

    Their names depend on the location, sizes and times of the files of the source.
    """
    stats = [os.stat(source.path(file)) for file in table.files]
    facts = [(file, one.st_size, one.st_mtime_ns) for file, one in zip(table.files, stats)]
    key = hashlib.sha256(json.dumps([source.root, facts]).encode()).hexdigest()[:16]
    return [f"{COPIES}/{split}-{key}/{k:06d}.bin" for k in range(len(table.files))]


def copy_images(source: Storage, root: Storage, table: Table, copies: list[str]) -> None:
    """Write the bytes of all images, one after the other, unless an earlier call did.

    copies: the names from copies_of(). Raises DataError if a file changes meanwhile, OSError.
    """
    wanted = np.bincount(table.file_of, table.sizes, len(table.files)).astype(np.int64).tolist()
    pairs = list(zip(table.files, copies, wanted))
    for file, copy, size in scan.watched(pairs, len(pairs), "copying images"):
        if root.size(copy) == size:
            continue
        path = source.path(file)
        columns, written = _columns(path), 0
        with root.create(copy) as stream:
            for batch in _batches(path, [columns.image]):
                for value in _images(batch, columns):
                    if value.is_valid:
                        written += stream.write(value.as_buffer())
            if written != size:
                raise DataError(f"{path} has changed; start the same command again")


def _find(storage: Storage, split: str) -> tuple[str, list[str]]:
    """The name of a split in the source, and its files."""
    if not storage.is_local:
        return split, []
    for name in _NAMES[split]:
        plain = re.compile(rf"{name}(-.*)?\.parquet")
        # ImageFolder of `datasets` keeps captions of class folders in metadata.parquet.
        inside = re.compile(r"(?!metadata\.|\.).*\.parquet|data-\d+-of-\d+\.arrow")
        for folder, form in (("", plain), ("data/", plain), (f"{name}/", inside)):
            found = [f"{folder}{one}" for one in storage.names(folder) if form.fullmatch(one)]
            if found:
                return name, found
    return split, []


def _classes(
    storage: Storage, split: str, columns: Columns, labels: list[Any], order: ClassOrder
) -> tuple[list[str], np.ndarray]:
    """The class names in the order of the labels, and the label of each row, int32 [N]."""
    column = f"{storage.root}: column {columns.label} of {split}"
    if None in labels or "" in labels:
        raise DataError(f"{column} has rows without a label; remove them")
    if isinstance(labels[0], str):
        classes = order.arrange(list(set(labels)), storage.root)
        label_of = {name: k for k, name in enumerate(classes)}
        return classes, np.array([label_of[label] for label in labels], np.int32)
    if order != BY_NAME:
        raise ConfigError(
            f"class_order ({order.choice}) would be ignored: the rows of source ({storage.root}) "
            "have numbers as labels; leave it out"
        )
    numbers = np.array(labels, np.int64)
    classes = columns.classes or _numbered(storage)
    if numbers.min() < 0 or numbers.max() >= len(classes):
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        rule = f"has the label {wrong}, and labels must be from 0 to {len(classes) - 1}"
        raise DataError(f"{column} {rule}; remove rows without a label")
    return classes, numbers.astype(np.int32)


def _numbered(storage: Storage) -> list[str]:
    """Names for labels without names: one for each number up to the largest one of all splits."""
    largest = 0
    for split in _NAMES:
        for file in table_files(storage, split):
            path = storage.path(file)
            columns = _columns(path)
            for batch in _batches(path, [columns.label]):
                largest = max([largest, *_plain_labels(batch, columns)])
    if largest >= _MAX_CLASSES:
        rule = f"has the label {largest:,}, and labels must be below {_MAX_CLASSES:,}"
        raise DataError(f"{storage.root} {rule}; fix the data set")
    width = len(str(largest))
    log.warning("%s has labels but no class names: using class%s ...", storage.root, "0" * width)
    return [f"class{k:0{width}d}" for k in range(largest + 1)]


def _labels_and_sizes(path: str, columns: Columns) -> Iterator[tuple[list[Any], np.ndarray]]:
    """The labels, and the bytes of the images as int64, of some rows at a time."""
    from pyarrow import compute

    for batch in _batches(path, [columns.image, columns.label]):
        lengths = compute.fill_null(compute.binary_length(_images(batch, columns)), 0)
        yield _plain_labels(batch, columns), lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _plain_labels(batch: Any, columns: Columns) -> list[Any]:
    return batch.column(columns.label).to_pylist()


def _images(batch: Any, columns: Columns) -> Any:
    """The encoded images of a batch: an array of bytes or null."""
    import pyarrow

    column = batch.column(columns.image)
    is_struct = pyarrow.types.is_struct(column.type)
    return pyarrow.compute.struct_field(column, "bytes") if is_struct else column


def _batches(path: str, columns: list[str]) -> Iterator[Any]:
    """Batches of the rows of a file, with these columns. Raises DataError if it is damaged."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if path.endswith(".parquet"):
            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(_ROWS, columns=columns)
            return
        with pyarrow.memory_map(path) as file, ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch.select(columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _columns(path: str) -> Columns:
    """Find the columns of the images and labels. Raises DataError, or ConfigError."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        remedy = "pip install 'alexnet-ddp[parquet]'"
        raise ConfigError(f"source ({path}) needs pyarrow, which is missing; {remedy}") from error
    try:
        if path.endswith(".parquet"):
            schema = parquet.read_schema(path)
        else:
            with pyarrow.memory_map(path) as file:
                schema = ipc.open_stream(file).schema
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    named = _class_labels(schema.metadata or {})
    images = [field.name for field in schema if _has_images(field.type)]
    labels = [name for name in schema.names if name in named or name in ("label", "labels")]
    image = _only(path, "images", images, "image", schema.names)
    label = _only(path, "labels", labels, "label", schema.names)
    of = schema.field(label).type
    if not (pyarrow.types.is_integer(of) or _is_text(of)):
        rule = f"has labels of type {of}, and they must be integers or texts"
        raise DataError(f"{path} {rule}; convert column {label}")
    return Columns(image, label, named.get(label))


def _has_images(of: Any) -> bool:
    from pyarrow import types

    if types.is_struct(of):
        at = of.get_field_index("bytes")
        return at >= 0 and _has_images(of.field(at).type)
    return types.is_binary(of) or types.is_large_binary(of)


def _is_text(of: Any) -> bool:
    from pyarrow import types

    is_dictionary = types.is_dictionary(of)
    of = of.value_type if is_dictionary else of
    return types.is_string(of) or types.is_large_string(of)


def _only(path: str, what: str, found: list[str], preferred: str, names: list[str]) -> str:
    if preferred in found or len(found) == 1:
        return preferred if preferred in found else found[0]
    has = listed(found) if found else "none"
    rule = f"must have one column of {what}, and has {has} (columns: {listed(names)})"
    raise DataError(f"{path} {rule}; name it {preferred}, as by Dataset.rename_column")


def _class_labels(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> class names, for the columns that `datasets` knows as ClassLabel."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # written by another program: labels without names


def _damaged(path: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0]
    kind = "Parquet" if path.endswith(".parquet") else "Arrow"
    return DataError(f"{path} cannot be read as {kind} ({reason}); write it again")
