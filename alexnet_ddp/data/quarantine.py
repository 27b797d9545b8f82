"""Images that a run could not use: named once, counted against a budget, left out of every epoch.

The one rule: quarantine.jsonl follows from the steps that were taken. Each image stands in it once, by the first step
that should have had it, whatever the number of ranks, of epochs and of restarts.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from alexnet_ddp.data.fill import Skipped
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.runtime.distributed import World, from_main, gather_objects
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.files import keep_rows, write_bytes
from alexnet_ddp.runtime.redaction import redact

log = logging.getLogger(__name__)

_FIELDS = frozenset({"split", "index", "kind", "step"})


class Quarantine:
    """Every rank knows all the images; rank 0 writes them down, and warns of the first one of each kind."""

    def __init__(
        self,
        run_dir: Path,
        sets: Mapping[str, SampleIndex],
        max_train: int,
        start_step: int,
        world: World,
    ) -> None:
        """Collective. Of an earlier start, what came after `start_step` is dropped: it will come again.

        sets: "train" and "val"; max_train: so many different training images may be bad.
        """
        self._path, self._sets, self._max_train, self._world = (
            run_dir / "quarantine.jsonl",
            sets,
            max_train,
            world,
        )
        self._rows: list[dict] = from_main(
            lambda: keep_rows(self._path, start_step, _FIELDS)[0], world
        )
        self._known = {(row["split"], row["index"]) for row in self._rows}
        self._warned = {row["kind"] for row in self._rows}

    def count(self, split: str) -> int:
        """Different images of `split` that were bad so far."""
        return sum(row["split"] == split for row in self._rows)

    def note(self, split: str, bad: list[Skipped], step: int, epoch: float) -> None:
        """Collective. What this rank left out, of a training step or of an evaluation; step, epoch: as in the rows.

        Raises DataError on all ranks where too many training images are bad.
        """
        new = {
            one.index: one for one in gather_objects(bad) if (split, one.index) not in self._known
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
            remedy = f"mend or remove those that {self._path} lists, or allow more"
            raise DataError(
                f"{num_bad} training images are bad, more than data.max_bad_images ({self._max_train}); {remedy}"
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
