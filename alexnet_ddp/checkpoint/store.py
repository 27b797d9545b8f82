"""Save, resume, keep: a checkpoint is the whole run or nothing, and the newest valid one wins."""

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from alexnet_ddp.checkpoint import files, remote
from alexnet_ddp.checkpoint.background import BackgroundWriter, Groups
from alexnet_ddp.checkpoint.files import Rejected
from alexnet_ddp.checkpoint.find import find_newest
from alexnet_ddp.checkpoint.identity import DataFacts, check_same_run, numerics
from alexnet_ddp.checkpoint.layout import needed
from alexnet_ddp.checkpoint.space import check_space, free_bytes
from alexnet_ddp.checkpoint.writer import Order, Reply
from alexnet_ddp.config import CheckpointConfig
from alexnet_ddp.runtime.distributed import World, any_rank, broadcast_tensors, from_main, on_all
from alexnet_ddp.runtime.errors import CheckpointIOError, Diverged, NoCheckpoint, RunError

log = logging.getLogger(__name__)

_MAX_FAILURES = 3  # writes in a row


@dataclass
class RunState:
    """All of a run that is not a tensor. Everything else is a function of `step`."""

    step: int = 0  # optimizer steps that are done
    evaluated_at: int | None = None  # the step of the last complete evaluation
    best: dict[str, float | int] = field(
        default_factory=dict
    )  # step and val/top1 of the best evaluation
    sums: dict[str, float] = field(
        default_factory=dict
    )  # of the training row that is being collected
    scaler: dict[str, float] = field(default_factory=dict)  # of fp16's loss scale
    bad_steps: dict[str, int] = field(
        default_factory=dict
    )  # how many were skipped, ...: see resilience/guard.py
    transform_input: bool = False  # of the network: see model/weights.py

    def note_evaluation(self, top1: float) -> None:
        """The best one is the first of the highest."""
        self.evaluated_at = self.step
        if not self.best or top1 > self.best["val/top1"]:
            self.best = {"step": self.step, "val/top1": top1}


class Checkpoints:
    """The checkpoints of one run. Rank 0 has them written, in the background; all ranks read the same one."""

    def __init__(
        self,
        run_dir: Path,
        cfg: CheckpointConfig,
        identity: dict[str, object],
        world: World,
        steps_per_epoch: int = 1,
        data: DataFacts | None = None,
    ) -> None:
        self._directory, self._cfg, self._identity, self._world = (
            run_dir / "checkpoints",
            cfg,
            identity,
            world,
        )
        self._steps_per_epoch, self._data = steps_per_epoch, data
        self.classes_read: list[str] | None = (
            None  # ids of the classes of the checkpoint that was read last
        )
        self._copies = f"{cfg.copy_to.rstrip('/')}/{run_dir.name}" if cfg.copy_to else None
        self._writer = BackgroundWriter()
        self._size = 0  # bytes of a checkpoint
        self._failures = 0  # in a row
        self._num_failed = self._num_skipped = 0  # since the start of this process
        self._began, self.longest_write_s = 0.0, 0.0
        # On rank 0: step and directory of the checkpoint that this process wrote last
        self.last_saved: tuple[int, Path] | None = None

    def save(self, state: RunState, tensors: Groups, is_last: bool) -> RunError | None:
        """Collective where tensors are split over ranks. Rank 0 copies the tensors and has them written; other ranks
        give their parts. The last one is waited for.

        Where the one before is still being written this one is left out and counted, if it is not the best or the last.
        A failure is a warning and the run goes on; the third in a row, and that of the last checkpoint, comes back as
        the error to end with.
        """
        split = [
            t for group in tensors.values() for t in group.values() if not isinstance(t, Tensor)
        ]
        error, ready = (
            self._ready(state, tensors, is_last) if self._world.is_main else (None, False)
        )
        if split:
            ready = any_rank(ready, self._world)
        if not ready:
            return error
        if not self._world.is_main:
            for tensor in split:
                tensor.collect(None)
            return None
        self._writer.start(self._order(state), tensors, self._metadata(state))
        return self.poll(wait=True, is_last=True) if is_last else error

    def _ready(
        self, state: RunState, tensors: Groups, is_last: bool
    ) -> tuple[RunError | None, bool]:
        """Whether there is a writer, and memory, for a checkpoint; what became of the one before."""
        error = self.poll(wait=is_last or state.best.get("step") == state.step)
        if self._writer.is_busy:
            if not self._num_skipped:
                log.warning(
                    "no checkpoint of step %d: checkpoints are due faster than the disk takes them",
                    state.step,
                )
            self._num_skipped += 1
            return error, False
        self._size, self._began = needed(tensors, self._metadata(state)), time.monotonic()
        try:
            self._writer.prepare(self._size)
        except OSError as e:  # no memory for the copy
            return self._failed(Reply(state.step, error=str(e)), is_last), False
        return error, True

    def prepare(self, tensors: Groups) -> None:
        """Collective. Have a buffer for tensors like these before the first step, so that no step waits for it.

        Raises CheckpointIOError where the disk has no room for a checkpoint.
        """
        self._size = needed(tensors, self._metadata(RunState()))
        on_all(
            lambda: check_space(self._directory, self._size, self._cfg.keep_last),
            self._world,
            takes_part=self._world.is_main,
        )
        if self._world.is_main:
            self._writer.prepare(self._size)

    def row(self) -> dict[str, int]:
        """What a row of metrics says about checkpoints that are not there; mostly nothing."""
        found = {
            "checkpoint/num_failed": self._num_failed,
            "checkpoint/num_skipped": self._num_skipped,
        }
        return {key: count for key, count in found.items() if count}

    def close(self) -> None:
        """Wait for what is being written."""
        self.poll(wait=True)
        last = self._writer.close()
        if last is not None:
            log.warning("the checkpoint of step %d is saved, but %s", last.step, last.warning)

    def resume(
        self, run_name: str, allow_changes: bool, up_to: int | None = None
    ) -> tuple[RunState, Groups]:
        """Collective. State and tensors of the newest valid checkpoint; a fresh state without tensors for a new run.

        up_to: only look at checkpoints of this step or before, and write nothing. Raises NoCheckpoint where checkpoints
        exist but none is valid, ConfigError where it is another run's.
        """

        def choose() -> Path | None:
            if up_to is None:
                files.clean_up(self._directory)
            newest = find_newest(self._directory, up_to) or (
                self._fetched() if up_to is None else None
            )
            if newest is not None and not allow_changes:
                check_same_run(run_name, newest, self._identity, self._data)
            return newest

        newest = from_main(choose, self._world)
        if newest is None:
            return RunState(), {}
        # Only rank 0 reads: the others need not see its disk.
        record, there = self._record(newest)
        self._note_numerics(record)
        state = RunState(
            **{name: record[name] for name in RunState.__dataclass_fields__ if name in record}
        )
        stems = self._wanted(there)
        if record["identity"].get("optimizer") != self._identity.get("optimizer"):
            log.warning("another optimizer than the checkpoint's: its state starts afresh")
            stems.remove("optimizer")
        if (
            self._data
            and self.classes_read
            and set(self.classes_read) != set(self._data.classes["ids"])
        ):
            state.best, state.evaluated_at = {}, None  # numbers of other classes
        return state, self._read(newest, stems)

    def newest(self) -> tuple[int, Groups]:
        """Collective. Step and tensors of the newest valid checkpoint. Raises Diverged where there is none."""

        def choose() -> Path:
            error = self.poll(wait=True)
            if error is not None:
                raise error
            newest = find_newest(self._directory)
            if newest is None:
                raise Diverged(
                    f"{self._directory} has no checkpoint yet to roll back to; lower optimizer.lr"
                )
            return newest

        newest = from_main(choose, self._world)
        _, there = self._record(newest)
        return files.step_of(newest), self._read(newest, self._wanted(there))

    def _record(self, directory: Path) -> tuple[dict, list[str]]:
        """Collective. The checkpoint's state.json and the stems of its files of tensors."""

        def read() -> tuple[dict, list[str]]:
            state = files.read_state(directory)
            return state | {"classes": files.classes_of(directory, state)}, files.stems_of(
                directory
            )

        record, stems = from_main(read, self._world)
        self.classes_read = (record["classes"] or {}).get("ids")
        return record, stems

    def _metadata(self, state: RunState) -> dict[str, str]:
        """What the files of tensors say beside them, for whoever loads one alone. All values are strings."""
        metadata = {"format": "pt", "transform_input": str(state.transform_input).lower()}
        if self._data is not None:
            ids, names = self._data.classes["ids"], self._data.classes["names"]
            metadata |= {"classes": json.dumps(ids), "class_names": json.dumps(names)}
        return metadata

    def _wanted(self, stems: list[str]) -> list[str]:
        """What this run needs of the files of tensors that a checkpoint has."""
        averages = self._identity.get("trainer.ema_decay") is not None
        if averages and "ema" not in stems:
            log.warning(
                "the checkpoint has no averaged weights (trainer.ema_decay): they begin as its weights"
            )
        return [stem for stem in stems if stem != "ema" or averages]

    def _read(self, directory: Path, stems: list[str]) -> Groups:
        """Collective. Only rank 0 reads."""
        main = self._world.is_main
        return {
            stem: broadcast_tensors(
                files.read_tensors(directory, stem) if main else {}, self._world
            )
            for stem in stems
        }

    def _note_numerics(self, record: dict) -> None:
        then, now = record["numerics"], numerics()
        changed = [
            f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]
        ]
        if record["world_size"] != self._world.world_size:
            changed.append(f"world size {record['world_size']} -> {self._world.world_size}")
        if changed:
            log.info(
                "resuming with other numerics (%s): equal to rounding, not bit for bit",
                ", ".join(changed),
            )

    def _fetched(self) -> Path | None:
        """The newest copy at checkpoint.copy_to, where this machine has no checkpoint. Raises NoCheckpoint."""
        if not self._copies:
            return None
        try:
            fetched = remote.fetch_newest(self._copies, self._directory)
        except (OSError, Rejected, ValueError, ImportError) as error:
            rule = "a run never starts afresh while there may be copies"
            remedy = "mend or empty checkpoint.copy_to, or choose another run.name"
            raise NoCheckpoint(
                f"checkpoint.copy_to ({self._cfg.copy_to}): {error}; {rule}; {remedy}"
            ) from error
        if fetched is not None:
            log.info("fetched %s from %s", fetched.name, self._copies)
        return fetched

    def _order(self, state: RunState) -> Order:
        record = {**asdict(state), "identity": self._identity, "numerics": numerics()}
        record["world_size"] = self._world.world_size
        record |= asdict(self._data) if self._data is not None else {}
        every = self._cfg.keep_every_epochs
        return Order(
            directory=str(self._directory.absolute()),
            step=state.step,
            places={},
            state=record,
            best=state.best,
            keep_last=self._cfg.keep_last,
            keep_every_steps=every and every * self._steps_per_epoch,
            copy_to=self._copies,
        )

    def poll(self, wait: bool = False, is_last: bool = False) -> RunError | None:
        """What became of a save in the background, once: the error to end with, or None."""
        reply = self._writer.reply(wait)
        if reply is None:
            return None
        self.longest_write_s = max(self.longest_write_s, time.monotonic() - self._began)
        if reply.error:
            return self._failed(reply, is_last)
        if reply.warning:
            log.warning("the checkpoint of step %d is saved, but %s", reply.step, reply.warning)
        self._failures = 0
        self.last_saved = (reply.step, self._directory / f"step-{reply.step:08d}")
        return None

    def _failed(self, reply: Reply, is_last: bool) -> RunError | None:
        self._failures += 1
        self._num_failed += 1
        if reply.not_finite:
            rule = f"the weights after step {reply.step} are not finite, and were not saved ({reply.error})"
            remedy = "lower optimizer.lr or clip gradients; the checkpoints before it are untouched"
            return Diverged(f"{rule}; {remedy}")
        space = f"it needs {self._size / 1e6:,.0f} MB, {free_bytes(self._directory) / 1e6:,.0f} MB are free"
        reason = (
            f"the checkpoint of step {reply.step} could not be written ({reply.error}); {space}"
        )
        if is_last or self._failures >= _MAX_FAILURES:
            remedy = f"make room below {self._directory}, then start the same command again"
            return CheckpointIOError(f"{reason}; {remedy}")
        log.warning("%s; training goes on, and the checkpoints before it are untouched", reason)
        return None
