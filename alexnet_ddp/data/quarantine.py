"""The quarantine: images that a run could not use. They are listed, limited and left out.

quarantine.jsonl depends only on the steps of the run. It lists each image once, with the first step
that should have used it, for any number of ranks, epochs and restarts.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.runtime.distributed import World, all_gather_objects, from_main
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.files import keep_rows, write_bytes
from alexnet_ddp.runtime.redaction import redact

log = logging.getLogger(__name__)

_FIELDS = frozenset({"split", "index", "kind", "step"})


class Quarantine:
    """The bad images of a run. All ranks hold the full list; rank 0 writes it.

    Rank 0 also logs a warning for the first image of each kind.
    """

    def __init__(
        self,
        run_dir: Path,
        sets: Mapping[str, SampleIndex],
        max_train: int,
        start_step: int,
        world: World,
    ) -> None:
        """Collective. Reads the list of earlier starts up to `start_step`.

        Rows of later steps are dropped, because these steps are repeated.
        sets: "train" and "val"; max_train: the number of training images that may be bad.
        """
        self._path = run_dir / "quarantine.jsonl"
        self._sets, self._max_train, self._world = sets, max_train, world
        self._rows: list[dict] = from_main(
            lambda: keep_rows(self._path, start_step, _FIELDS)[0], world
        )
        self._known = {(row["split"], row["index"]) for row in self._rows}
        self._warned = {row["kind"] for row in self._rows}

    def count(self, split: str) -> int:
        """The number of different bad images of `split` so far."""
        return sum(row["split"] == split for row in self._rows)

    def note(self, split: str, bad: list[Skipped], step: int, epoch: float) -> None:
        """Collective. Record the images that this rank left out in a training step or evaluation.

        step, epoch: stored in the rows.
        Raises DataError, on all ranks, if more than `max_train` training images are bad.
        """
        new = {
            one.index: one
            for one in all_gather_objects(bad)
            if (split, one.index) not in self._known
        }
        for index, one in sorted(new.items()):
            row = {
                "split": split,
                "index": index,
                "name": self._sets[split].name(index),
                "kind": one.kind,
            }
            self._rows.append(redact(row | {"reason": one.reason, "step": step, "epoch": epoch}))
            self._known.add((split, index))
        if new and self._world.is_main:
            self._write(self._rows[-len(new) :])
        num_bad = self.count("train")
        if new and num_bad > self._max_train:
            raise DataError(
                f"{num_bad} training images are bad, more than data.max_bad_images "
                f"({self._max_train}); fix or remove those that {self._path} lists, or allow more"
            )

    def _write(self, new: list[dict]) -> None:
        for row in new:
            if row["kind"] not in self._warned:
                self._warned.add(row["kind"])
                log.warning(
                    "skipped %s; others of this kind (%s) are only listed in %s",
                    row["reason"],
                    row["kind"],
                    self._path,
                )
        try:
            write_bytes(self._path, "".join(json.dumps(row) + "\n" for row in self._rows).encode())
        except OSError as error:
            log.warning("%s could not be written: %s", self._path, error)
