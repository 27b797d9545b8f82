"""A checkpoint on disk: an immutable directory of safetensors and JSON files with checksums.

    step-00000120/  model.safetensors  optimizer.safetensors
                    [ema, hook, adapters, ranks, ema_adapters].safetensors
                    state.json  MANIFEST.json

A checkpoint is written to a hidden directory, verified, and committed by renaming that directory.
torch.load and safetensors load a flipped bit silently, so MANIFEST.json contains the SHA-256 of
every file; a checkpoint is verified before it is loaded and before an older one is deleted.
Nothing is pickled. This module needs no torch, because the writer process imports it.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import safetensors

from alexnet_ddp.runtime.errors import ConfigError, DataError, NoCheckpoint
from alexnet_ddp.runtime.files import durable_file, sync_directory
from alexnet_ddp.runtime.printing import listed
from alexnet_ddp.runtime.run_record import read_classes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
_REQUIRED = {"model.safetensors", "optimizer.safetensors", STATE}
_MAY_BE_INFINITE = {"hook"}  # its own load_state_dict checks it: see parallel/hooks.py
_NAME = re.compile(r"step-(\d+)")
_CHUNK = 1 << 24  # bytes
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_DTYPES = {  # names of torch's dtypes -> safetensors
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


class Rejected(Exception):
    """A checkpoint directory must not be loaded. The message names the file and the reason."""


class NotFinite(Rejected):
    """The files are intact, but a value is NaN or infinite."""


# --- names --------------------------------------------------------------------------------------


def step_of(directory: Path) -> int:
    """Return the step in the name of a checkpoint directory."""
    found = _NAME.search(directory.name)
    if found is None:
        raise ValueError(f"{directory.name} does not name a step")
    return int(found[1])


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the committed checkpoints in a directory, oldest first. They may be damaged."""
    if not checkpoints.is_dir():
        return []
    return sorted((d for d in checkpoints.iterdir() if is_checkpoint_name(d.name)), key=step_of)


# --- writing ------------------------------------------------------------------------------------


class TensorLike(Protocol):
    """The attributes of a tensor that a file's header contains."""

    @property
    def shape(self) -> "torch.Size": ...

    @property
    def dtype(self) -> "torch.dtype": ...

    @property
    def nbytes(self) -> int: ...

    def element_size(self) -> int: ...


@dataclass(frozen=True)
class FileLayout:
    """The positions of tensors in a safetensors file.

    Such a file (github.com/huggingface/safetensors) contains 8 bytes with the length of the header,
    the header as JSON, and the bytes of the tensors.
    """

    header: bytes  # with the 8 bytes before it
    offsets: dict[str, int]  # tensor name -> position of its first byte in the file
    size: int  # bytes of the file

    @classmethod
    def of(cls, tensors: Mapping[str, TensorLike], metadata: dict[str, str]) -> "FileLayout":
        """Lay out `tensors`, largest elements first, so that all are aligned.

        Args:
            tensors: tensors by name.
            metadata: text values for the header.
        """
        entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        begins = {}
        end = 0
        for name, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            begins[name] = end
            end += t.nbytes
            entries[name] = {
                "dtype": _DTYPES[str(t.dtype)],
                "shape": list(t.shape),
                "data_offsets": [begins[name], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {name: len(header) + begin for name, begin in begins.items()}
        return cls(header, offsets, len(header) + end)


def write_checkpoint(
    checkpoints: Path, step: int, contents: Mapping[str, bytes | memoryview]
) -> Path:
    """Commit the checkpoint of `step` and return its directory.

    Args:
        checkpoints: the directory of all checkpoints of the run.
        step: completed optimizer steps.
        contents: file name -> its bytes.

    Raises:
        OSError, Rejected: it could not be written, or reads back differently. Nothing has changed.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    draft = checkpoints / f".tmp-step-{step}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        entries = {name: _write_file(draft / name, data) for name, data in contents.items()}
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": entries}
        _write_file(draft / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_directory(draft)
        verify(draft)
        final = checkpoints / f"step-{step:08d}"
        _commit(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def _write_file(path: Path, data: bytes | memoryview) -> dict[str, int | str]:
    """Write a file, evict it from the page cache in favour of images; return its manifest entry."""
    digest = hashlib.sha256()
    view = memoryview(data)
    with durable_file(path, evict=True) as file:
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            digest.update(chunk)
            file.write(chunk)
    return {"size": len(view), "sha256": digest.hexdigest()}


def _commit(draft: Path, final: Path) -> None:
    """Rename `draft` to `final`.

    `final` exists if an interrupted evaluation repeats a step, or if it is damaged.
    """
    old = final.with_name(f".old-{final.name}")
    replaces = final.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    draft.rename(final)
    sync_directory(final.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def clean_up(checkpoints: Path) -> None:
    """Remove the drafts of a crash, and restore a checkpoint that was being replaced."""
    for old in checkpoints.glob(".old-step-*"):
        final = checkpoints / old.name.removeprefix(".old-")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for draft in checkpoints.glob(".tmp-step-*"):
        shutil.rmtree(draft, ignore_errors=True)


def remove_checkpoint(directory: Path) -> None:
    """Hide a checkpoint by renaming it, then delete it: a half-deleted one is never listed."""
    hidden = directory.with_name(f".tmp-{directory.name}-{secrets.token_hex(4)}")
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


# --- verifying and reading ----------------------------------------------------------------------


def read_manifest(directory: Path) -> dict[str, tuple[int, str]]:
    """Return file name -> (bytes, SHA-256). Raises Rejected if the manifest is invalid."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        version, step, files = manifest["schema_version"], manifest["step"], manifest["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Rejected(f"{MANIFEST} is unreadable ({error})") from error
    if version != SCHEMA_VERSION:
        raise Rejected(
            f"{MANIFEST} has schema version {version}, this program reads {SCHEMA_VERSION}"
        )
    if step != step_of(directory):
        raise Rejected(f"{MANIFEST} is of step {step}")
    missing = _REQUIRED - expected.keys()
    if missing:
        raise Rejected(f"{MANIFEST} lists no {min(missing)}")
    invalid = [name for name in expected if not re.fullmatch(r"\w+\.\w+", name)]
    if invalid:
        raise Rejected(f"{MANIFEST} lists {invalid[0]!r}, which is no file of a checkpoint")
    return expected


def verify(directory: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        Rejected: a file is missing, differs by a byte, or is not of its format.
        NotFinite: a value of the weights or of the optimizer state is NaN or infinite.
    """
    for name, (size, digest) in read_manifest(directory).items():
        path = directory / name
        try:
            with open(path, "rb") as file:
                found_size = os.fstat(file.fileno()).st_size
                found_digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Rejected(f"{name} is unreadable ({error.strerror})") from error
        if found_size != size:
            raise Rejected(f"{name} has {found_size} bytes instead of {size}")
        if found_digest != digest:
            raise Rejected(f"{name} does not match its SHA-256 checksum")
        _check_format(path)
        if path.suffix == ".safetensors" and path.stem not in _MAY_BE_INFINITE:
            _check_finite(path)


def _check_format(path: Path) -> None:
    """Raise Rejected if the file is neither safetensors nor JSON: a manifest can be forged."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "np"):
                return
        json.loads(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise Rejected(f"{path.name} is not a safetensors file ({error})") from error
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{path.name} is not a JSON file ({error})") from error


def _check_finite(path: Path) -> None:
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    if path.stat().st_size == start:
        return
    data = np.memmap(path, np.uint8, "r", start)
    for name, entry in header.items():
        dtype = _FLOATS.get(entry.get("dtype"))
        if dtype is None:  # integers, or the metadata
            continue
        begin, end = entry["data_offsets"]
        for at in range(begin, end, _CHUNK):
            values = data[at : min(end, at + _CHUNK)].view(dtype)
            # numpy lacks bfloat16: a value whose exponent bits are all 1 is infinite or NaN.
            bad = (values & 0x7F80) == 0x7F80 if dtype is np.uint16 else ~np.isfinite(values)
            if bad.any():
                raise NotFinite(f"{path.name} has values that are not finite (in {name})")


def read_state(directory: Path) -> dict[str, Any]:
    """Return state.json of a verified checkpoint."""
    return json.loads((directory / STATE).read_bytes())


def classes_of(directory: Path, state: dict[str, Any]) -> dict[str, list[str]] | None:
    """Return the "ids" (directory names) and "names" of a checkpoint's classes, ordered by label.

    Checkpoints of older versions do not contain them; then they are read from the run's
    classes.json. Returns None if they are unknown.

    Args:
        directory: the checkpoint.
        state: its state.json.
    """
    if state.get("classes"):
        return state["classes"]
    try:
        return read_classes(directory.parent.parent)
    except DataError:
        return None


def classes_beside(file: Path) -> dict[str, list[str]] | None:
    """Return the classes that the checkpoint with a file of weights records, as classes_of.

    None if they are unknown, or the file is in no checkpoint.
    """
    if not is_checkpoint_name(file.parent.name):
        return None
    try:
        return classes_of(file.parent, read_state(file.parent))
    except (OSError, ValueError):  # a copy without state.json, or with a damaged one
        return None


def weights_metadata(transform_input: bool, classes: dict[str, list[str]] | None) -> dict[str, str]:
    """Return the metadata of a file of weights, for programs that load only that file.

    Args:
        transform_input: the network rescales its inputs, as some GoogLeNets do.
        classes: "ids" and "names" of the classes, ordered by label; None if they are unknown.
    """
    metadata = {"format": "pt", "transform_input": str(transform_input).lower()}
    if classes is not None:
        metadata["classes"] = json.dumps(classes["ids"])
        metadata["class_names"] = json.dumps(classes["names"])
    return metadata


def read_tensors(directory: Path, group: str) -> "dict[str, torch.Tensor]":
    """Return the tensors of a group by name, on the CPU. The checkpoint must be verified."""
    from safetensors.torch import load_file

    return load_file(directory / f"{group}.safetensors")


def mean_tensors(
    directories: list[Path], group: str
) -> "tuple[dict[str, torch.Tensor], frozenset[str]]":
    """Return the mean of each tensor of a group over checkpoints, and the names of those that vary.

    It is computed in float64. Integers are those of the last checkpoint. All must be verified; one
    is enough.
    Raises ConfigError if their tensors have other names or shapes.
    """
    import torch

    with ExitStack() as stack:
        files = [
            stack.enter_context(safetensors.safe_open(one / f"{group}.safetensors", "pt"))
            for one in directories
        ]
        shapes = [
            {name: file.get_slice(name).get_shape() for name in _names(file)} for file in files
        ]
        for directory, found in zip(directories, shapes):
            if found != shapes[-1]:
                rule = f"{directory.name} has other tensors than {directories[-1].name}"
                raise ConfigError(f"average: {rule}; leave it out")
        mean, varying = {}, set()
        for name in shapes[-1]:
            first, *others = (file.get_tensor(name) for file in files)
            mean[name] = others[-1] if others else first
            if all(torch.equal(first, one) for one in others):
                continue
            varying.add(name)
            if first.is_floating_point():
                total = sum((one.double() for one in others), first.double())
                mean[name] = (total / len(files)).to(first.dtype)
    return mean, frozenset(varying)


def _names(file: Any) -> list[str]:
    return list(file.keys())  # it is no mapping, and not iterable


def group_names(directory: Path) -> list[str]:
    """Return the names of a checkpoint's groups of tensors. Raises Rejected."""
    return [Path(name).stem for name in read_manifest(directory) if name.endswith(".safetensors")]


def weights_group(directory: Path) -> str:
    """Return the group to evaluate: the averaged weights, if there are any (trainer.ema_decay)."""
    return "ema" if "ema" in group_names(directory) else "model"


# --- finding ------------------------------------------------------------------------------------


def find_newest(checkpoints: Path, up_to: int | None = None) -> Path | None:
    """Return the newest checkpoint that verifies; None if none was ever committed.

    Logs a warning for each checkpoint that is rejected.

    Args:
        checkpoints: the directory of all checkpoints of the run.
        up_to: ignore checkpoints of later steps.

    Raises:
        NoCheckpoint: all are rejected. A run never silently starts from scratch.
    """
    candidates = [d for d in list_checkpoints(checkpoints) if up_to is None or step_of(d) <= up_to]
    for candidate in reversed(candidates):
        try:
            verify(candidate)
            return candidate
        except Rejected as reason:
            log.warning("checkpoint %s is rejected: %s", candidate.name, reason)
    if candidates:
        raise NoCheckpoint(
            f"none of the {len(candidates)} checkpoints in {checkpoints} is usable; "
            "restore one, or choose another run.name to start afresh"
        )
    return None


def find_best(checkpoints: Path) -> Path:
    """Return the checkpoint of the best evaluation, or the newest if there was no evaluation.

    If the best one is rejected, logs a warning and returns the newest. Raises NoCheckpoint.
    """
    newest = find_newest(checkpoints)
    if newest is None:
        raise NoCheckpoint(f"there is no checkpoint in {checkpoints}; train the run first")
    step = read_state(newest)["best"].get("step")
    best = next((d for d in list_checkpoints(checkpoints) if step_of(d) == step), newest)
    try:
        verify(best)
    except Rejected as reason:
        log.warning(
            "checkpoint %s, the best one, is rejected: %s; using %s instead",
            best.name,
            reason,
            newest.name,
        )
        return newest
    return best


def find_step(checkpoints: Path, step: str) -> Path:
    """Return the checkpoint `step`: "best" (see find_best), "last", or a number.

    Raises:
        NoCheckpoint: there is no checkpoint, or the one of this number is damaged.
        ConfigError: there is no checkpoint of this number.
    """
    if step == "best":
        return find_best(checkpoints)
    if step == "last":
        newest = find_newest(checkpoints)
        if newest is None:
            raise NoCheckpoint(f"there is no checkpoint in {checkpoints}; train the run first")
        return newest
    return _verified(_numbered(checkpoints, int(step), "at_step"), "use at_step=best")


def find_several(checkpoints: Path, wanted: int | list[int]) -> list[Path]:
    """Return several checkpoints, oldest first: the `wanted` last ones, or those of these steps.

    Raises:
        NoCheckpoint: one of them is damaged.
        ConfigError: there are not as many, or there is none of a step.
    """
    if isinstance(wanted, int):
        found = list_checkpoints(checkpoints)
        if len(found) < wanted:
            rule = f"{checkpoints} has {len(found)} checkpoints"
            remedy = f"take fewer, or train with checkpoint.keep_last={wanted}"
            raise ConfigError(f"average ({wanted}): {rule}; {remedy}")
        chosen = found[-wanted:]
    else:
        chosen = [_numbered(checkpoints, step, "average") for step in sorted(wanted)]
    return [_verified(directory, "leave it out of average") for directory in chosen]


def _numbered(checkpoints: Path, step: int, option: str) -> Path:
    """The checkpoint of a step. Raises ConfigError. option: that gives the step."""
    found = {step_of(directory): directory for directory in list_checkpoints(checkpoints)}
    if step not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        rule = f"{checkpoints} has no such checkpoint; it has {known}"
        raise ConfigError(f"{option} ({step}): {rule}")
    return found[step]


def _verified(directory: Path, remedy: str) -> Path:
    """`directory`, if it is intact. Raises NoCheckpoint."""
    try:
        verify(directory)
    except Rejected as reason:
        raise NoCheckpoint(f"checkpoint {directory.name} is rejected: {reason}; {remedy}") from None
    return directory


def weights_of_run(weights: str, root: str) -> tuple[str, list[str] | None]:
    """Resolve the option model.weights, if it names a run, to the file of the run's best weights.

    Args:
        weights: runs/NAME, run:NAME (in `root`), or the directory of a checkpoint. Any other text
            is returned unchanged.
        root: the directory of all runs.

    Returns:
        The path of a file, and the ids of its classes, ordered by label, if they are known.

    Raises:
        ConfigError: there is no such run, or the checkpoint is damaged.
        NoCheckpoint: the run has no usable checkpoint.
    """
    if weights.startswith("run:"):
        directory = Path(root) / weights.removeprefix("run:")
    else:
        directory = Path(weights)
    if is_checkpoint_name(directory.name) and directory.is_dir():
        try:
            verify(directory)
        except Rejected as reason:
            raise ConfigError(
                f"model.weights ({weights}) is refused: {reason}; give another checkpoint"
            ) from reason
        checkpoint = directory
    elif (directory / "checkpoints").is_dir():
        checkpoint = find_best(directory / "checkpoints")
    elif weights.startswith("run:"):
        known = listed(sorted(d.parent.name for d in Path(root).glob("*/checkpoints"))) or "none"
        raise ConfigError(
            f"model.weights ({weights}): {root} has no such trained run; there are: {known}"
        )
    else:
        return weights, None
    group = weights_group(checkpoint)
    kind = "averaged weights" if group == "ema" else "weights"
    log.info("model.weights=%s takes the %s of %s", weights, kind, checkpoint)
    classes = classes_of(checkpoint, read_state(checkpoint))
    return str(checkpoint / f"{group}.safetensors"), classes["ids"] if classes else None
