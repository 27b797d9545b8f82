"""Sinks that write files: metrics.jsonl, the complete record of a run, and TensorBoard's events.

A row of metrics.jsonl is flat: step, epoch, time_s (seconds of work over all starts, without work
that was lost), then the metrics. JSON has no nan and no infinities: they are the strings "nan",
"inf", "-inf". A row is one write() call, and each step is recorded once.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.runtime.files import keep_rows, plain
from alexnet_ddp.runtime.redaction import redact, redact_yaml
from alexnet_ddp.tracking.classes import ClassResults, Examples
from alexnet_ddp.tracking.histograms import Histogram
from alexnet_ddp.tracking.wandb_process import BEST, note_best

Say = Callable[[str], None]


class JsonlSink:
    """Appends rows to metrics.jsonl.

    Rows after `start_step` are dropped first, since the resumed run will write them again. A run
    that starts at 0 keeps none. Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: Path, start_step: int, say: Say) -> None:
        rows, num_damaged = keep_rows(path, start_step if start_step > 0 else -1)
        if num_damaged:
            say(f"{path}: {num_damaged} damaged {'row' if num_damaged == 1 else 'rows'} dropped")
        self._path = path
        self._say = say
        self._num_lost = 0
        self._began = time.monotonic() - (float(rows[-1].get("time_s", 0.0)) if rows else 0.0)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.start_offset = os.fstat(self._fd).st_size  # bytes; the wandb process reads from here

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        """Append a row. If the disk is full, the row is lost and the run continues."""
        time_s = round(time.monotonic() - self._began, 3)
        line = _encode({"step": step, "epoch": epoch, "time_s": time_s} | metrics)
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) < len(line):
                os.ftruncate(self._fd, size)
                raise OSError("only a part of the row was written")
        except OSError as error:
            self._num_lost += 1
            if self._num_lost == 1:
                self._say(f"warning: a row of {self._path} is lost: {error}")

    def close(self, exit_code: int) -> None:
        """Close the file, and warn if rows were lost."""
        os.close(self._fd)
        if self._num_lost:
            self._say(f"warning: {self._num_lost} rows of {self._path} are lost")


def _encode(row: dict[str, Any]) -> bytes:
    return (json.dumps(plain(row), allow_nan=False) + "\n").encode()


class TensorBoardSink:
    """Writes scalars by metric name against step, the configuration, and the run's hyperparameters.

    config, config_yaml: the configuration, as JSON types and as text. Secrets in it are hidden.
    earlier: the rows of earlier starts, for the best results of the run.
    """

    name = "TensorBoard"

    def __init__(
        self,
        directory: Path,
        start_step: int,
        config: dict[str, Any],
        config_yaml: str,
        earlier: Iterable[dict[str, Any]] = (),
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports for seconds

        # Hide what an earlier start wrote after start_step; at 0 also what it wrote at step 0.
        self._writer = SummaryWriter(directory, purge_step=start_step + 1 if start_step else 0)
        text = "\n".join(f"    {line}" for line in redact_yaml(config_yaml).splitlines())
        if text:
            self._writer.add_text("config", text, start_step + 1 if start_step else 0)
        self._best: dict[str, float] = {}
        for row in earlier:
            note_best(self._best, row)
        self._hparams_end = self._write_hparams(redact(config))

    def _write_hparams(self, config: dict[str, Any]) -> Any:
        """Begin a row in the table of hyperparameters; return the record that ends it.

        SummaryWriter.add_hparams would open another run, and write the metrics a second time.
        """
        from torch.utils.tensorboard.summary import hparams

        # The table shows the last value of a scalar. That of best/... is the best one of the run.
        metrics = dict.fromkeys((*(f"best/{name}" for name in BEST), "train/loss"), 0.0)
        names, start, end = hparams(flat_scalars(config), metrics)
        self._add_summaries(names, start)
        return end

    def _add_summaries(self, *summaries: Any) -> None:
        files: Any = self._writer.file_writer  # torch's annotation is None
        for summary in summaries:
            files.add_summary(summary)

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        """Write the numbers of a row, and flush, in case the process is killed.

        The row of an evaluation also gets the best results so far.
        """
        note_best(self._best, metrics)
        is_evaluation = any(name in metrics for name in BEST)
        for name, value in (metrics | (self._best if is_evaluation else {})).items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, pixels: np.ndarray) -> None:
        """Show a picture, uint8 [height, width, 3]."""
        self._writer.add_image(name, pixels, 0, dataformats="HWC")

    def examples(self, examples: Examples) -> None:
        """Show the images with the largest losses as one picture."""
        self._writer.add_image(
            "val/largest_losses", examples.grid, examples.step, dataformats="HWC"
        )

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """Show histograms by name."""
        for name, one in found.items():
            self._writer.add_histogram_raw(
                name,
                one.low,
                one.high,
                sum(one.counts),
                one.sum,
                one.sum_of_squares,
                one.limits,
                one.counts,
                step,
            )

    def classes(self, results: ClassResults) -> None:
        """Show the confusion matrix as a picture: a row per label, white: all of its images."""
        if results.confusion is None:
            return
        shares = results.confusion / np.maximum(1, results.confusion.sum(1, keepdims=True))
        # At most about 1,000 pixels wide: 8,000 would take 12 s and 2.3 GB.
        scale = max(1, min(8, 1000 // len(shares)))
        pixels = np.repeat(np.repeat(np.uint8(255 * shares), scale, 0), scale, 1)
        self._writer.add_image("val/confusion_matrix", pixels, results.step, dataformats="HW")

    def close(self, exit_code: int, message: str) -> None:
        """Close the file; a complete run ends its row of hyperparameters."""
        if exit_code == 0:
            self._add_summaries(self._hparams_end)
        self._writer.close()


def flat_scalars(config: dict[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """The options by their full names; what is neither a number nor a text becomes a text."""
    found: dict[str, int | float | str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, dict):
            found |= flat_scalars(value, f"{key}.")
        else:
            found[key] = value if is_number else str(value)
    return found
