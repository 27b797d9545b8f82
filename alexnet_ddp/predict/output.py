"""The formats in which predictions are written or printed."""

import json
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np

from alexnet_ddp.config.predict import PredictConfig
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.runtime.tables import FLAG, NUMBER, TEXT, open_file, open_table
from alexnet_ddp.runtime.terminal import Console, Table

_MAX_TABLE = 100  # images; more are printed as lines, as they come
_ASK = "ask a person"


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, in order; or why it cannot be read."""

    index: int  # of the image, in the order of the paths
    classes: list[str]
    probabilities: list[float]
    error: str | None = None
    # True if the first probability is less than min_confidence; None without that option, and for
    # an image that cannot be read.
    asks: bool | None = None
    embedding: np.ndarray | None = None  # float32 [d]


class Sink(Protocol):
    """A destination of predictions, which are written as they come."""

    def write(self, path: str, one: Prediction) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """{"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}, or an "error".

    With min_confidence also "ask_a_person": true or false.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, path: str, one: Prediction) -> None:
        found = [
            {"class": name, "probability": p} for name, p in zip(one.classes, one.probabilities)
        ]
        what: dict[str, Any] = {"predictions": found} if one.error is None else {"error": one.error}
        what |= {"ask_a_person": one.asks} if one.asks is not None else {}
        self._file.write(json.dumps({"image": path} | what) + "\n")

    def close(self) -> None:
        self._file.close()


class PredictionTable:
    """A CSV or Parquet file with the columns of columns()."""

    def __init__(self, file: str, top_k: int, asks: bool) -> None:
        self._file = open_table("output", file, columns(top_k, asks))

    def write(self, path: str, one: Prediction) -> None:
        self._file.write(_cells(path, one))

    def close(self) -> None:
        self._file.close()


def columns(top_k: int, asks: bool) -> dict[str, str | int]:
    """Name -> type: image, class_1, probability_1, ..., error.

    With min_confidence, ask_a_person is before error.
    """
    found: dict[str, str | int] = {"image": TEXT}
    for k in range(1, top_k + 1):
        found |= {f"class_{k}": TEXT, f"probability_{k}": NUMBER}
    return found | ({"ask_a_person": FLAG} if asks else {}) | {"error": TEXT}


def _cells(path: str, one: Prediction) -> dict[str, Any]:
    """The row of `one`: column -> value, without those that have none."""
    row: dict[str, Any] = {"image": path}
    for k, (name, probability) in enumerate(zip(one.classes, one.probabilities), 1):
        row |= {f"class_{k}": name, f"probability_{k}": probability}
    row |= {} if one.asks is None else {"ask_a_person": one.asks}
    return row | ({} if one.error is None else {"error": one.error})


class Lines:
    """Prints one line for each image."""

    def write(self, path: str, one: Prediction) -> None:
        if one.error is None:
            say(f"{printable(path)}  {_shown(one)}")

    def close(self) -> None:
        """Does nothing."""


class Page:
    """Prints a table of all images at the end."""

    def __init__(self) -> None:
        self._table = Table("image", "classes and their probabilities")
        self._is_empty = True

    def write(self, path: str, one: Prediction) -> None:
        if one.error is None:
            self._table.add_row(path, _shown(one))
            self._is_empty = False

    def close(self) -> None:
        if not self._is_empty:
            Console().print(self._table)


def build_sink(options: PredictConfig, num_images: int) -> Sink:
    """The sink for `output`, by its suffix; without it, one that prints.

    Raises ConfigError if the file cannot be written.
    """
    output, asks = options.output, options.min_confidence is not None
    if output is None:
        return Page() if num_images <= _MAX_TABLE else Lines()
    if output.endswith(".jsonl"):
        return JsonLines(open_file("output", output, "w"))
    return PredictionTable(output, options.top_k, asks)


def _shown(one: Prediction) -> str:
    pairs = zip(one.classes, one.probabilities)
    shown = [f"{name} {probability:.3f}" for name, probability in pairs]
    return "  ".join([*shown, _ASK] if one.asks else shown)
