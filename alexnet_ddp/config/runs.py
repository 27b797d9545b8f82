"""Options of `alexnet-ddp runs` and `alexnet-ddp compare`."""

from dataclasses import dataclass
from enum import StrEnum

from alexnet_ddp.config.option import MISSING, Options, check_suffix, option


class RunColumn(StrEnum):
    """A column of the table of runs."""

    name = "name"
    status = "status"
    top1 = "top1"
    step = "step"
    images_per_sec = "images_per_sec"
    hours = "hours"


@dataclass(kw_only=True)
class RunsConfig(Options):
    """The runs to list."""

    root: str = option("runs", "The folder with the runs, which may be in folders of it.")
    sort: RunColumn = option(
        RunColumn.name, "The column to sort by: numbers from the largest, texts by alphabet."
    )
    output: str | None = option(
        None, "A .csv or .parquet file to write the table to.", null="it is printed"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_suffix("output", self.output, (".csv", ".parquet"))


@dataclass(kw_only=True)
class CompareConfig(Options):
    """The two runs to compare."""

    first: str = option(MISSING, "A run: its name below root, or its directory.")
    second: str = option(MISSING, "The other run.")
    root: str = option("runs", "The folder with the runs.")
    tolerance: float = option(
        1e-5, "The largest relative difference of two values that count as equal.", minimum=0
    )
    max_rows: int | None = option(
        20, "Rows of the curves to print, evenly spread over the steps.", minimum=2, null="all rows"
    )
