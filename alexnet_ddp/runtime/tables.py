"""Tables that a command writes row by row: .csv, and .parquet with pyarrow, which is optional."""

import csv
from importlib.util import find_spec
from typing import IO, Any, Protocol

from alexnet_ddp.runtime.errors import ConfigError

TEXT, NUMBER, FLAG = "string", "float64", "bool"  # names of pyarrow's types
COUNT = "int64"
_ROWS = 4096  # of a row group, which is written at once


class TableFile(Protocol):
    """A file that grows by rows: column -> value. A column without a value is left empty."""

    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def open_table(option: str, path: str, columns: dict[str, str | int]) -> TableFile:
    """Open the .csv or .parquet file that an option names, by its suffix.

    columns: name -> TEXT, NUMBER, COUNT or FLAG. Raises ConfigError if it cannot be written.
    """
    if path.endswith(".parquet"):
        open_file(option, path, "wb").close()  # pyarrow's own errors are not one line
        return ParquetFile(path, columns)
    return CsvFile(open_file(option, path, "w"), list(columns))


def open_file(option: str, path: str, mode: str) -> IO[Any]:
    """Open the file that an option names. Raises ConfigError."""
    texts = {} if "b" in mode else {"newline": "", "errors": "surrogateescape"}
    try:
        return open(path, mode, **texts)  # type: ignore[call-overload]
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise ConfigError(f"{option} ({path}) {rule}; choose another file") from error


def require_pyarrow(option: str, value: str | None) -> None:
    """Raise ConfigError if `value` is a .parquet file and pyarrow is not installed."""
    if value is not None and value.endswith(".parquet") and find_spec("pyarrow") is None:
        rule = "needs pyarrow"
        raise ConfigError(f"{option} ({value}) {rule}; pip install 'alexnet-ddp[parquet]'")


class CsvFile:
    """A CSV file that grows by rows. FLAGs are written as true and false."""

    def __init__(self, file: IO[str], columns: list[str]) -> None:
        self._file, self._rows = file, csv.DictWriter(file, columns, restval="")
        self._rows.writeheader()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row: column -> value; columns that are left out get no value."""
        self._rows.writerow(
            {
                name: str(value).lower() if isinstance(value, bool) else value
                for name, value in row.items()
            }
        )

    def close(self) -> None:
        self._file.close()


class ParquetFile:
    """A Parquet file that grows by rows.

    columns: name -> TEXT, NUMBER, COUNT or FLAG, or the length of a float32 vector. A value may be
    None.
    """

    def __init__(self, file: str, columns: dict[str, str | int]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        fields = {
            name: pa.list_(pa.float32(), kind) if isinstance(kind, int) else pa.type_for_alias(kind)
            for name, kind in columns.items()
        }
        self._schema, self._rows = pa.schema(fields), list[dict[str, Any]]()
        self._writer = parquet.ParquetWriter(file, self._schema)
        self._batch = pa.RecordBatch.from_pylist

    def write(self, row: dict[str, Any]) -> None:
        """Add a row: column -> value; columns that are left out get no value."""
        # Parquet's texts are UTF-8, and a path may have other bytes.
        self._rows.append(
            {
                name: value.encode(errors="backslashreplace").decode()
                if isinstance(value, str)
                else value
                for name, value in row.items()
            }
        )
        if len(self._rows) == _ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(self._batch(self._rows, schema=self._schema))
            self._rows.clear()
