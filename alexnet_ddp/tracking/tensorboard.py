"""TensorBoard: scalars by metric name against step."""

from pathlib import Path
from typing import Any


class TensorBoardSink:
    name = "TensorBoard"

    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # seconds of imports that not every run wants

        # A resumed run tells the steps after start_step again; one that starts at 0 tells step 0 again too.
        self._writer = SummaryWriter(directory, purge_step=start_step + 1 if start_step else 0)

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        """Strings are skipped. Flushed, so that a killed process loses nothing that it has told."""
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        self._writer.close()
