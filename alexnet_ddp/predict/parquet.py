"""Rows in a Parquet file, through pyarrow, which is optional."""

from importlib.util import find_spec
from typing import Any

from alexnet_ddp.runtime.errors import ConfigError

TEXT, NUMBER, FLAG = "string", "float64", "bool"  # names of pyarrow's types
_ROWS = 4096  # of a row group, which is written at once


def require_pyarrow(option: str, value: str | None) -> None:
    """Raise ConfigError if `value` is a .parquet file and pyarrow is not installed."""
    if value is not None and value.endswith(".parquet") and find_spec("pyarrow") is None:
        rule = "needs pyarrow"
        raise ConfigError(f"{option} ({value}) {rule}; pip install 'alexnet-ddp[parquet]'")


class ParquetFile:
    """A Parquet file that grows by rows.

    columns: name -> TEXT, NUMBER or FLAG, or the length of a float32 vector. A value may be None.
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
