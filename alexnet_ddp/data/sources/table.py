"""Images that are listed with their labels in a CSV, TSV or Parquet file."""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from alexnet_ddp.config import CsvConfig
from alexnet_ddp.data.sources import scan
from alexnet_ddp.data.sources.classes import ClassOrder
from alexnet_ddp.data.sources.index import (
    FileStore,
    SampleIndex,
    have_sizes,
    size_of,
)
from alexnet_ddp.data.sources.split import divide, split_images
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.printing import listed

SPLIT = "split"  # the column that divides the images; it is optional
_PARQUET = (".parquet", ".pq")
_THREADS = 8  # threads that ask for sizes: network file systems answer slowly

Row = tuple[str, str, str]  # path, label, split ("" without that column)


def open_table(cfg: CsvConfig, order: ClassOrder) -> tuple[SampleIndex, SampleIndex]:
    """Return (training images, validation images) of the file data.root.

    The images are sorted by (label, path). The column `split` divides them into train and val; rows
    with another value are left out, and a warning counts them. Without that column,
    data.val_fraction or data.fold divides them. The result is cached until the file changes or an
    image has another size.
    Raises DataError for a file that cannot be read or has a bad row, ConfigError if pyarrow is
    missing.
    """
    file = Path(os.path.abspath(os.path.expanduser(cfg.root)))
    folder = str(file.parent if cfg.images is None else Path(os.path.abspath(cfg.images)))
    columns = (cfg.path_column, cfg.label_column)
    if not file.is_file():
        raise DataError(f"data.root ({cfg.root}) is not a file; give a CSV, TSV or Parquet file")

    def build(stamps: scan.Stamps) -> scan.Arrays:
        stamps[str(file)] = scan.stamp(file)
        return _arrays(file, folder, columns, order)

    try:
        variant = "\n".join((folder, *columns, order.key()))
        found = scan.cached(
            "table", file, build, variant, lambda arrays: have_sizes(_store(folder, arrays))
        )
    except OSError as error:
        remedy = "check its permissions"
        raise DataError(f"{file} cannot be read ({error.strerror}); {remedy}") from error
    scan.report(found)
    classes, store, labels = (
        scan.from_json(found["classes"]),
        _store(folder, found),
        found["labels"],
    )
    divides = cfg.val_fraction is not None or cfg.fold is not None
    if scan.from_json(found["has_split"]) == divides:
        names = "data.val_fraction=0.15 or data.fold=1/5"
        raise DataError(
            f"{cfg.root} has a column {SPLIT}; leave data.val_fraction and data.fold out"
            if divides
            else f"{cfg.root} has no column {SPLIT}; add one with train and val, or give {names}"
        )
    index = SampleIndex(classes, labels, store)
    if divides:
        return split_images(index, store, cfg.val_fraction, cfg.fold_of)
    train, val = divide(index, store, found["is_val"])
    _check_sides(cfg.root, train, val)
    return train, val


def _check_sides(root: str, train: SampleIndex, val: SampleIndex) -> None:
    """Raise DataError if the column `split` leaves a class without training images, or no val."""
    missing = np.setdiff1d(np.arange(len(train.classes)), train.labels)
    if len(missing):
        names = listed([train.classes[k] for k in missing.tolist()])
        raise DataError(f"{root} has no training images of {names}; add some, or remove these rows")
    if not len(val):
        raise DataError(f"{root} has no validation images; add rows with val in column {SPLIT}")


def _store(folder: str, found: scan.Arrays) -> FileStore:
    return FileStore(folder, found["blob"], found["ends"], found["sizes"])


def _arrays(file: Path, folder: str, columns: tuple[str, str], order: ClassOrder) -> scan.Arrays:
    notes: list[str] = []
    rows, has_split = _used_rows(file, columns, notes)
    names = {label for _, label, _ in rows}
    classes = order.arrange(list(names), str(file))
    label_of = {name: k for k, name in enumerate(classes)}
    rows.sort(key=lambda row: (label_of[row[1]], row[0]))
    paths = [path for path, _, _ in rows]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda path: size_of(os.path.join(folder, path)), paths, chunksize=256)
        sizes = np.array(list(scan.watched(found, len(rows), f"indexing {file}")), np.int64)
    if not (sizes >= 0).any():
        first = os.path.join(folder, paths[0])
        remedy = "give data.images=DIR, the folder to which the paths are relative"
        raise DataError(f"none of the images in {file} exists, such as {first}; {remedy}")
    store = FileStore.pack(folder, paths, sizes)
    return {
        "labels": np.array([label_of[label] for _, label, _ in rows], np.int32),
        "is_val": np.array([split == "val" for _, _, split in rows], bool),
        "blob": store.blob,
        "ends": store.ends,
        "sizes": store.sizes,
        "classes": scan.to_json(classes),
        "notes": scan.to_json(notes),
        "has_split": scan.to_json(has_split),
    }


def _used_rows(file: Path, columns: tuple[str, str], notes: list[str]) -> tuple[list[Row], bool]:
    """Return the rows of both sets, and whether the file has the column `split`.

    Raises DataError for a row without a path or label, and for a path that is listed twice.
    """
    has_split, lines = _read(file, columns)
    rows: list[Row] = []
    others: Counter[str] = Counter()
    line_of: dict[str, int] = {}
    for line, (path, label, split) in lines:
        if not path or not label:
            name = columns[1] if path else columns[0]
            raise DataError(f"{file}: line {line} has no {name}; complete the line, or remove it")
        if path in line_of:
            both = f"lines {line_of[path]} and {line}"
            raise DataError(f"{file}: {both} are both of {path}; remove one of them")
        line_of[path] = line
        if has_split and split not in ("train", "val"):
            others[split] += 1
        else:
            rows.append((path, label, split))
    if others:
        left_out = ", ".join(f"{count:,} of {name!r}" for name, count in sorted(others.items()))
        notes.append(f"{file}: only rows with train or val in {SPLIT} are used, not {left_out}")
    if not rows:
        raise DataError(f"{file} lists no images to use; it needs one line for each image")
    return rows, has_split


def _read(file: Path, columns: tuple[str, str]) -> tuple[bool, Iterator[tuple[int, Row]]]:
    """Return whether the file has the column `split`, and its rows with their line numbers.

    The header is line 1, also of Parquet. Raises DataError.
    """
    is_parquet = file.suffix.lower() in _PARQUET
    lines = _parquet_lines(file, (*columns, SPLIT)) if is_parquet else _csv_lines(file)
    _, header = next(lines, (1, []))
    for name in columns:
        if name not in header:
            option = "data.path_column" if name == columns[0] else "data.label_column"
            has = f"it has {listed(header)}" if header else "it is empty"
            raise DataError(f"{file} has no column {name}, {has}; give {option}=NAME")
    used = [header.index(name) for name in (*columns, SPLIT) if name in header]

    def rows() -> Iterator[tuple[int, Row]]:
        for line, cells in lines:
            if len(cells) != len(header):
                rule = f"has {len(cells)} values for {len(header)} columns"
                raise DataError(f"{file}: line {line} {rule}; quote values that contain a comma")
            path, label, *split = (cells[k] for k in used)
            yield line, (path, label, split[0] if split else "")

    return SPLIT in header, rows()


def _csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the values of each line that is not empty."""
    delimiter = "\t" if file.suffix.lower() in (".tsv", ".tab") else ","
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            why = f"line {reader.line_num} is not CSV ({error})"
            raise DataError(f"{file}: {why}; give a CSV, TSV or Parquet file") from error


def _parquet_lines(file: Path, used: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield as _csv_lines does, the values of the columns `used` only. Data begins at line 2."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        remedy = "pip install 'alexnet-ddp[parquet]', or give a CSV file"
        raise ConfigError(
            f"data.root ({file}) needs pyarrow, which is missing; {remedy}"
        ) from error
    try:
        names = parquet.read_schema(file).names
        table = parquet.read_table(file, columns=[name for name in names if name in used])
    except ArrowException as error:
        why = str(error).splitlines()[0]
        raise DataError(f"{file} is not a Parquet file ({why}); write it again") from error
    yield 1, names
    columns = [
        table[name].to_pylist() if name in used else repeat(None, len(table)) for name in names
    ]
    for line, cells in enumerate(zip(*columns, strict=True), 2):
        yield line, ["" if cell is None else str(cell) for cell in cells]
