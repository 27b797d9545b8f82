"""Save, verify, find, resume: a checkpoint is the whole run or nothing, and the newest valid one wins."""

import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from alexnet_ddp.atomic import write_json
from alexnet_ddp.checkpoint import files
from alexnet_ddp.checkpoint.files import Rejected
from alexnet_ddp.checkpoint.identity import check_same_run, identity, numerics
from alexnet_ddp.config import CheckpointConfig, ConfigError
from alexnet_ddp.distributed import World, broadcast_tensors, from_main
from alexnet_ddp.errors import CheckpointIOError, Diverged, NoCheckpoint, RunError

__all__ = ["Checkpoints", "RunState", "find_best", "find_newest", "identity", "load_model", "load_weights"]

log = logging.getLogger(__name__)

_MAX_FAILURES = 3  # writes in a row


@dataclass
class RunState:
    """All of a run that is not a tensor. Everything else is a function of `step`."""

    step: int = 0  # optimizer steps that are done
    evaluated_at: int | None = None  # the step of the last complete evaluation
    best: dict[str, float | int] = field(default_factory=dict)  # step and val/top1 of the best evaluation
    sums: dict[str, float] = field(default_factory=dict)  # of the training row that is being collected
    scaler: dict[str, float] = field(default_factory=dict)  # of fp16's loss scale
    bad_steps: dict[str, int] = field(default_factory=dict)  # how many were skipped, ...: see resilience/guard.py

    def note_evaluation(self, top1: float) -> None:
        """The best one is the first of the highest."""
        self.evaluated_at = self.step
        if not self.best or top1 > self.best["val/top1"]:
            self.best = {"step": self.step, "val/top1": top1}


class Checkpoints:
    """The checkpoints of one run. Rank 0 writes; all ranks read the same one."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, identity: dict[str, object], world: World) -> None:
        self._directory, self._cfg, self._identity, self._world = run_dir / "checkpoints", cfg, identity, world
        self._failures = 0

    def save(self, state: RunState, tensors: dict[str, dict[str, torch.Tensor]], is_last: bool) -> RunError | None:
        """Rank 0 writes, verifies, then drops what is not kept; other ranks do nothing.

        A failure is a warning and the run goes on; the third in a row, and that of the last checkpoint, comes back as
        the error to end with.
        """
        if not self._world.is_main:
            return None
        host = {stem: {k: t.detach().cpu().contiguous() for k, t in group.items()} for stem, group in tensors.items()}
        record = {**asdict(state), "identity": self._identity, "numerics": numerics()}
        record["world_size"] = self._world.world_size
        try:
            written = files.write(self._directory, state.step, host, record)
        except (OSError, Rejected) as error:
            size = sum(t.nbytes for group in host.values() for t in group.values())
            return self._failed(state.step, error, size, is_last)
        self._failures = 0
        self._tidy(state, written)
        return None

    def resume(
        self, run_name: str, allow_changes: bool, up_to: int | None = None
    ) -> tuple[RunState, dict[str, dict[str, torch.Tensor]]]:
        """Collective. State and tensors of the newest valid checkpoint; a fresh state without tensors for a new run.

        up_to: only look at checkpoints of this step or before, and write nothing. Raises NoCheckpoint where checkpoints
        exist but none is valid, ConfigError where it is another run's.
        """

        def choose() -> Path | None:
            if up_to is None:
                files.clean_up(self._directory)
            newest = find_newest(self._directory, up_to)
            if newest is not None and not allow_changes:
                check_same_run(run_name, files.read_state(newest)["identity"], self._identity)
            return newest

        newest = from_main(choose, self._world)
        if newest is None:
            return RunState(), {}
        # Only rank 0 reads: the others need not see its disk.
        record = from_main(lambda: files.read_state(newest), self._world)
        self._note_numerics(record)
        state = RunState(**{name: record[name] for name in RunState.__dataclass_fields__ if name in record})
        stems = ["model", "optimizer"]
        if record["identity"].get("optimizer") != self._identity.get("optimizer"):
            log.warning("another optimizer than the checkpoint's: its state starts afresh")
            stems.remove("optimizer")
        return state, self._read(newest, stems)

    def newest(self) -> tuple[int, dict[str, dict[str, torch.Tensor]]]:
        """Collective. Step and tensors of the newest valid checkpoint. Raises Diverged where there is none."""

        def choose() -> Path:
            newest = find_newest(self._directory)
            if newest is None:
                raise Diverged(f"{self._directory} has no checkpoint yet to roll back to; lower optimizer.lr")
            return newest

        newest = from_main(choose, self._world)
        return files.step_of(newest), self._read(newest, ["model", "optimizer"])

    def _read(self, directory: Path, stems: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Collective. Only rank 0 reads."""
        main = self._world.is_main
        return {
            stem: broadcast_tensors(files.read_tensors(directory, stem) if main else {}, self._world) for stem in stems
        }

    def _note_numerics(self, record: dict) -> None:
        then, now = record["numerics"], numerics()
        changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        if record["world_size"] != self._world.world_size:
            changed.append(f"world size {record['world_size']} -> {self._world.world_size}")
        if changed:
            log.info("resuming with other numerics (%s): equal to rounding, not bit for bit", ", ".join(changed))

    def _tidy(self, state: RunState, written: Path) -> None:
        """best.json, then the end of old checkpoints; neither can make a saved step unsaved."""
        try:
            if state.best:
                write_json(
                    written.parents[1] / "best.json", {**state.best, "checkpoint": f"step-{state.best['step']:08d}"}
                )
            self._drop_old(state)
        except OSError as error:
            log.warning("old checkpoints in %s could not be tidied up: %s", self._directory, error)

    def _drop_old(self, state: RunState) -> None:
        """Those of later steps go too: they were rejected when this run resumed, and must not count as kept."""
        found = files.listed(self._directory)
        kept = [d for d in found if files.step_of(d) <= state.step][-self._cfg.keep_last :]
        for directory in found:
            if directory not in kept and files.step_of(directory) != state.best.get("step"):
                files.remove(directory)

    def _failed(self, step: int, error: Exception, size: int, is_last: bool) -> RunError | None:
        self._failures += 1
        space = f"it needs {size / 1e6:,.0f} MB, {_free_mb(self._directory):,.0f} MB are free"
        reason = f"the checkpoint of step {step} could not be written ({error}); {space}"
        if is_last or self._failures >= _MAX_FAILURES:
            remedy = f"make room below {self._directory}, then start the same command again"
            return CheckpointIOError(f"{reason}; {remedy}")
        log.warning("%s; training goes on, and the checkpoints before it are untouched", reason)
        return None


def _free_mb(directory: Path) -> float:
    """Of the file system that holds `directory`, which need not exist yet."""
    there = next(d for d in (directory, *directory.parents) if d.exists())
    return shutil.disk_usage(there).free / 1e6


def find_newest(directory: Path, up_to: int | None = None) -> Path | None:
    """The newest checkpoint that verifies; None where none was ever committed. Names every one that it rejects.

    up_to: the last step to look at. Raises NoCheckpoint where all are rejected: a run never silently starts afresh.
    """
    candidates = [d for d in files.listed(directory) if up_to is None or files.step_of(d) <= up_to]
    for candidate in reversed(candidates):
        try:
            files.verify(candidate)
            return candidate
        except Rejected as reason:
            log.warning("checkpoint %s is rejected: %s", candidate.name, reason)
    if candidates:
        remedy = "restore one, or choose another run.name to start afresh"
        raise NoCheckpoint(f"none of the {len(candidates)} checkpoints in {directory} is usable; {remedy}")
    return None


def find_best(directory: Path) -> Path:
    """The checkpoint of the best evaluation; the newest where no evaluation was made. Raises NoCheckpoint."""
    newest = find_newest(directory)
    if newest is None:
        raise NoCheckpoint(f"there is no checkpoint in {directory}; train the run first")
    step = files.read_state(newest)["best"].get("step")
    best = next((d for d in files.listed(directory) if files.step_of(d) == step), newest)
    try:
        files.verify(best)
    except Rejected as reason:
        log.warning("checkpoint %s, the best one, is rejected: %s; taking %s", best.name, reason, newest.name)
        return newest
    return best


def load_model(model: nn.Module, directory: Path) -> dict:
    """Load the weights of a verified checkpoint into `model`; return its state.json. Raises ConfigError."""
    load_weights(model, files.read_tensors(directory, "model"), str(directory))
    return files.read_state(directory)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Raises ConfigError where they are another network's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        remedy = "give the model that was trained, or another run.name"
        raise ConfigError(f"{origin} holds another network than the configuration: {difference}; {remedy}") from error
