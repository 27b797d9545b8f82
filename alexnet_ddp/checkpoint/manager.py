"""Saves and restores the checkpoints of a run.

A checkpoint consists of a RunState and of groups of tensors, whose names and content the manager
does not interpret.
"""

import logging
import math
import mmap
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from alexnet_ddp.checkpoint.format import (
    FileLayout,
    Rejected,
    TensorLike,
    classes_of,
    clean_up,
    find_newest,
    group_names,
    list_checkpoints,
    read_state,
    read_tensors,
    step_of,
    weights_metadata,
)
from alexnet_ddp.checkpoint.identity import (
    DataFacts,
    check_same_run,
    groups_to_restore,
    numerics,
)
from alexnet_ddp.checkpoint.writer import (
    BackgroundWriter,
    SaveRequest,
    SaveResult,
    fetch_newest_copy,
)
from alexnet_ddp.config import BestBy, CheckpointConfig
from alexnet_ddp.runtime.distributed import World, any_rank, broadcast_tensors, from_main, on_all
from alexnet_ddp.runtime.errors import CheckpointIOError, Diverged, NoCheckpoint, RunError
from alexnet_ddp.runtime.files import free_bytes

log = logging.getLogger(__name__)

_MAX_FAILURES = 3  # writes in a row
# Of the row of an evaluation: what decides which one is the best, and its counts.
_OF_THE_BEST = (
    *("val/top1", "val/top5", "val/loss"),
    *("val/num_images", "val/correct1", "val/correct5"),
)
_ALIGNMENT = 64  # bytes; files begin at multiples of it in the shared memory


class ShardedTensor(TensorLike, Protocol):
    """A tensor whose shards are on several ranks. Its attributes describe the full tensor."""

    def is_floating_point(self) -> bool: ...

    def collect(self, there: Tensor | None) -> None:
        """Collective. Copy the full tensor into rank 0's CPU tensor; other ranks pass None."""


Groups = Mapping[str, Mapping[str, Tensor | ShardedTensor]]  # to save: group -> name -> tensor
LoadedGroups = dict[str, dict[str, Tensor]]


@dataclass
class RunState:
    """The state of a run that is not a tensor. Everything else is a function of `step`."""

    step: int = 0  # completed optimizer steps
    evaluated_at: int | None = None  # the step of the last complete evaluation
    # step, accuracies, loss and counts of the best evaluation
    best: dict[str, float | int] = field(default_factory=dict)
    since_best: int = 0  # evaluations after the best one
    trained_s: float = 0.0  # seconds of training, of all starts together; the same on all ranks
    # sums since the last row of training metrics
    sums: dict[str, float] = field(default_factory=dict)
    # state of the gradient scaler (fp16)
    scaler: dict[str, float] = field(default_factory=dict)
    # counters of skipped steps and the like: see training/faults.py
    bad_steps: dict[str, int] = field(default_factory=dict)
    transform_input: bool = False  # of the network: see model/weight_files.py

    def note_evaluation(self, row: Mapping[str, float | int], by: BestBy = BestBy.top1) -> None:
        """Record an evaluation. row: its metrics, of which those in _OF_THE_BEST are kept.

        Of equal accuracies the one with the lower loss is the best: few validation images have few
        different accuracies. `since_best` counts from the first of them, for trainer.patience.
        """
        self.evaluated_at = self.step
        self.since_best += 1
        top1, loss = row["val/top1"], row["val/loss"]
        best_top1 = self.best.get("val/top1", -math.inf)
        # Checkpoints of older versions do not have the loss of the best evaluation.
        has_lower_loss = loss < self.best.get("val/loss", math.inf)
        is_better = has_lower_loss if by is BestBy.loss else top1 > best_top1
        if is_better or not self.best:
            self.since_best = 0
        if is_better or not self.best or (top1 == best_top1 and has_lower_loss):
            kept = {name: row[name] for name in _OF_THE_BEST if name in row}
            self.best = {"step": self.step} | kept


class CheckpointManager:
    """Saves and restores the checkpoints of one run.

    Rank 0 has them written in the background and reads them; the other ranks need not see its disk.

    Args:
        run_dir: the directory of the run.
        cfg: when to save, which checkpoints to keep, and the URL for copies.
        identity: the options that must not change between a checkpoint and its resumption.
        world: this rank.
        steps_per_epoch: unit of checkpoint.keep_every_epochs.
        data: recorded in the checkpoint, to describe changes of the data later.

    Attributes:
        classes_read: ids of the classes of the last checkpoint that was read, if known.
        longest_write_s: the duration of the slowest save so far.
        last_saved: on rank 0, step and directory of the last checkpoint that this process wrote.
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: CheckpointConfig,
        identity: dict[str, object],
        world: World,
        steps_per_epoch: int = 1,
        data: DataFacts | None = None,
    ) -> None:
        self.classes_read: list[str] | None = None
        self.longest_write_s = 0.0
        self.last_saved: tuple[int, Path] | None = None
        self._directory = run_dir / "checkpoints"
        self._cfg = cfg
        self._identity = identity
        self._world = world
        self._steps_per_epoch = steps_per_epoch
        self._data = data
        self._copy_url = f"{cfg.copy_to.rstrip('/')}/{run_dir.name}" if cfg.copy_to else None
        self._writer = BackgroundWriter()
        self._size = 0  # bytes of a checkpoint
        self._failures_in_a_row = 0
        self._num_failed = 0  # since this process started
        self._num_skipped = 0
        self._save_began_at = 0.0

    # --- saving ---------------------------------------------------------------------------------

    def prepare(self, groups: Groups) -> None:
        """Collective. Allocate memory for groups like these, and start the writer process.

        Call it before the first step, so that no step waits for it.

        Raises:
            CheckpointIOError: the disk has no space for a checkpoint.
        """
        self._size = _size_in_memory(groups, self._metadata(RunState()))
        on_all(self._check_space, self._world, takes_part=self._world.is_main)
        if self._world.is_main:
            self._writer.prepare(self._size)

    def save(self, state: RunState, groups: Groups, is_last: bool) -> RunError | None:
        """Collective if tensors are sharded. Copy the tensors and write them in the background.

        The tensors may change after the return. While the previous checkpoint is being written,
        this one is skipped and counted, unless it is the best or the last one.

        Args:
            state: written to state.json.
            groups: one file per group.
            is_last: wait until the checkpoint is written; a failure is an error at once.

        Returns:
            The error to end the run with: of the last checkpoint, of the third failed one in a row,
            or because a value is not finite. Other failures are logged as warnings.
        """
        sharded = [
            t for group in groups.values() for t in group.values() if not isinstance(t, Tensor)
        ]
        error, memory = None, None
        if self._world.is_main:
            error, memory = self._prepare_save(state, groups, is_last)
        is_saved = memory is not None
        if sharded:
            is_saved = any_rank(is_saved, self._world)
        if memory is None:  # this is not rank 0, or rank 0 skips this checkpoint
            if is_saved:
                for tensor in sharded:
                    tensor.collect(None)
            return error
        ranges = _copy_tensors(groups, self._metadata(state), memory)
        self._writer.start(self._request(state, ranges))
        return self.poll(wait=True, is_last=True) if is_last else error

    def poll(self, wait: bool = False, is_last: bool = False) -> RunError | None:
        """Check, once, how a save in the background ended. Return the error to end the run with.

        Args:
            wait: block until it has ended.
            is_last: a failure is an error at once.
        """
        result = self._writer.result(wait)
        if result is None:
            return None
        self.longest_write_s = max(self.longest_write_s, time.monotonic() - self._save_began_at)
        if result.error:
            return self._failed(result, is_last)
        if result.warning:
            log.warning("the checkpoint of step %d is saved, but %s", result.step, result.warning)
        self._failures_in_a_row = 0
        self.last_saved = (result.step, self._directory / f"step-{result.step:08d}")
        return None

    def row(self) -> dict[str, int]:
        """Return the metrics of failed and skipped checkpoints that are not zero."""
        counts = {
            "checkpoint/num_failed": self._num_failed,
            "checkpoint/num_skipped": self._num_skipped,
        }
        return {key: count for key, count in counts.items() if count}

    def close(self) -> None:
        """Wait for unfinished writes and copies."""
        self.poll(wait=True)
        last = self._writer.close()
        if last is not None:
            log.warning("the checkpoint of step %d is saved, but %s", last.step, last.warning)

    def _prepare_save(
        self, state: RunState, groups: Groups, is_last: bool
    ) -> tuple[RunError | None, mmap.mmap | None]:
        """Return the error to end the run with, and memory for the tensors.

        The memory is None if this checkpoint cannot be saved now.
        """
        error = self.poll(wait=is_last or state.best.get("step") == state.step)
        if self._writer.is_busy:
            if not self._num_skipped:
                log.warning(
                    "no checkpoint of step %d: checkpoints are due faster than the disk takes them",
                    state.step,
                )
            self._num_skipped += 1
            return error, None
        self._size = _size_in_memory(groups, self._metadata(state))
        self._save_began_at = time.monotonic()
        try:
            return error, self._writer.prepare(self._size)
        except OSError as e:  # not enough memory
            return self._failed(SaveResult(state.step, error=str(e)), is_last), None

    def _request(self, state: RunState, ranges: dict[str, tuple[int, int]]) -> SaveRequest:
        record = {**asdict(state), "identity": self._identity, "numerics": numerics()}
        record["world_size"] = self._world.world_size
        if self._data is not None:
            record |= asdict(self._data)
        every = self._cfg.keep_every_epochs
        return SaveRequest(
            directory=str(self._directory.absolute()),
            step=state.step,
            ranges=ranges,
            state=record,
            best=state.best,
            keep_last=self._cfg.keep_last,
            keep_every_steps=every and every * self._steps_per_epoch,
            copy_to=self._copy_url,
        )

    def _metadata(self, state: RunState) -> dict[str, str]:
        """Return the metadata of each file of tensors, for programs that load only that file."""
        classes = None if self._data is None else self._data.classes
        return weights_metadata(state.transform_input, classes)

    def _failed(self, result: SaveResult, is_last: bool) -> RunError | None:
        self._failures_in_a_row += 1
        self._num_failed += 1
        if result.not_finite:
            return Diverged(
                f"the weights after step {result.step} are not finite, and were not saved "
                f"({result.error}); lower optimizer.lr or clip gradients; "
                "the checkpoints before it are untouched"
            )
        reason = (
            f"the checkpoint of step {result.step} could not be written ({result.error}); "
            f"it needs {self._size / 1e6:,.0f} MB, "
            f"{free_bytes(self._directory) / 1e6:,.0f} MB are free"
        )
        if is_last or self._failures_in_a_row >= _MAX_FAILURES:
            return CheckpointIOError(
                f"{reason}; free some space in {self._directory}, then start the same command again"
            )
        log.warning("%s; training continues, and the checkpoints before it are untouched", reason)
        return None

    def _check_space(self) -> None:
        """Raise CheckpointIOError if the disk has no space for one checkpoint.

        Logs a warning if it has no space for all that are kept.
        """
        directory, size, keep_last = self._directory, self._size, self._cfg.keep_last
        free = free_bytes(directory)
        if free < size:
            raise CheckpointIOError(
                f"{directory.parent} has {free / 1e6:,.0f} MB free, a checkpoint needs "
                f"{size / 1e6:,.0f} MB; free some space, or choose another run.root"
            )
        used = sum(f.stat().st_size for d in list_checkpoints(directory) for f in d.iterdir())
        num_kept = keep_last + 2  # the best one, and the one being written
        if free + used < num_kept * size:
            log.warning(
                "checkpoint.keep_last=%d takes up to %s MB, and %s has space for %s MB",
                keep_last,
                f"{num_kept * size / 1e6:,.0f}",
                directory,
                f"{(free + used) / 1e6:,.0f}",
            )

    # --- restoring ------------------------------------------------------------------------------

    def resume(
        self, run_name: str, allow_changes: bool, up_to: int | None = None
    ) -> tuple[RunState, LoadedGroups]:
        """Collective. Return the state and the groups of the newest valid checkpoint.

        A new run gets a new state and no groups. If this machine has no checkpoint, the newest copy
        at checkpoint.copy_to is fetched.

        Args:
            run_name: shown in messages.
            allow_changes: accept options and data that differ from the checkpoint's.
            up_to: only use checkpoints of this step or before, and write nothing.

        Raises:
            NoCheckpoint: checkpoints or copies exist, but none is valid.
            ConfigError: the checkpoint belongs to a run with other options or data.
        """

        def choose() -> Path | None:
            if up_to is None:
                clean_up(self._directory)
            newest = find_newest(self._directory, up_to)
            if newest is None and up_to is None:
                newest = self._fetch_copy()
            if newest is not None and not allow_changes:
                check_same_run(run_name, newest, self._identity, self._data)
            return newest

        newest = from_main(choose, self._world)
        if newest is None:
            return RunState(), {}
        record, names = self._read_record(newest)
        self._log_numerics(record)
        state = RunState(
            **{name: record[name] for name in RunState.__dataclass_fields__ if name in record}
        )
        if self._has_other_classes():
            state.best = {}
            state.since_best = 0
            state.evaluated_at = None
        return state, self._read_groups(newest, names)

    def newest(self) -> tuple[int, LoadedGroups]:
        """Collective. Return the step and the groups of the newest valid checkpoint.

        Raises Diverged if there is none.
        """

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
        _, names = self._read_record(newest)
        return step_of(newest), self._read_groups(newest, names)

    def _read_record(self, directory: Path) -> tuple[dict[str, Any], list[str]]:
        """Collective. Return a checkpoint's state.json, and the groups that this run restores."""

        def read() -> tuple[dict[str, Any], list[str]]:
            record = read_state(directory)
            record["classes"] = classes_of(directory, record)
            return record, group_names(directory)

        record, names = from_main(read, self._world)
        self.classes_read = (record["classes"] or {}).get("ids")
        return record, groups_to_restore(names, record["identity"], self._identity)

    def _read_groups(self, directory: Path, names: list[str]) -> LoadedGroups:
        """Collective. Read groups on rank 0 and send them to all ranks."""
        is_main = self._world.is_main
        return {
            name: broadcast_tensors(read_tensors(directory, name) if is_main else {}, self._world)
            for name in names
        }

    def _has_other_classes(self) -> bool:
        """Return whether the classes differ from the checkpoint's, so its metrics do not count."""
        if self._data is None or not self.classes_read:
            return False
        return set(self.classes_read) != set(self._data.classes["ids"])

    def _log_numerics(self, record: dict[str, Any]) -> None:
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

    def _fetch_copy(self) -> Path | None:
        """Fetch the newest copy at checkpoint.copy_to, if there is one. Raises NoCheckpoint."""
        if not self._copy_url:
            return None
        try:
            fetched = fetch_newest_copy(self._copy_url, self._directory)
        except (OSError, Rejected, ValueError, ImportError) as error:
            raise NoCheckpoint(
                f"checkpoint.copy_to ({self._cfg.copy_to}): {error}; "
                "a run never starts afresh while there may be copies; "
                "repair or empty checkpoint.copy_to, or choose another run.name"
            ) from error
        if fetched is not None:
            log.info("fetched %s from %s", fetched.name, self._copy_url)
        return fetched


# --- shared memory ------------------------------------------------------------------------------


def _size_in_memory(groups: Groups, metadata: dict[str, str]) -> int:
    """Return the bytes that the files of all groups take in the shared memory."""
    return sum(_aligned(FileLayout.of(tensors, metadata).size) for tensors in groups.values())


def _copy_tensors(
    groups: Groups, metadata: dict[str, str], memory: mmap.mmap
) -> dict[str, tuple[int, int]]:
    """Copy all groups into shared memory, laid out as their files. A step waits only for this copy.

    Args:
        groups: the tensors.
        metadata: for the header of each file.
        memory: at least _size_in_memory() bytes.

    Returns:
        group -> (first byte, end) of its file.
    """
    data = torch.frombuffer(memory, dtype=torch.uint8)
    ranges = {}
    start = 0
    on_gpu = False
    for group, tensors in groups.items():
        layout = FileLayout.of(tensors, metadata)
        memory[start : start + len(layout.header)] = layout.header
        for name, tensor in tensors.items():
            at = start + layout.offsets[name]
            target = data[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if isinstance(tensor, Tensor):
                target.copy_(tensor.detach(), non_blocking=True)
                on_gpu |= tensor.is_cuda
            else:
                tensor.collect(target)
        ranges[group] = (start, start + layout.size)
        start += _aligned(layout.size)
    if on_gpu:
        torch.cuda.synchronize()
    return ranges


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
