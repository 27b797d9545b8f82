"""A checkpoint on disk: an immutable directory, checksummed, committed by rename. No pickle, no torch.save.

    step-00000120/  model.safetensors  optimizer.safetensors  [ema, hook].safetensors  state.json  MANIFEST.json

torch.load and safetensors both load a flipped bit without a word, so MANIFEST.json holds the SHA-256 of every file, and
nothing is loaded, or deleted in favour of, what was not read back and compared. Needs no torch: writer.py has none.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors

from alexnet_ddp.runtime.files import sync_directory

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d+)")
_PIECE = 1 << 24  # bytes
_FINITE = {
    "model",
    "ema",
    "optimizer",
}  # file stems; parallel/hooks.py checks what a hook remembers
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Rejected(Exception):
    """A checkpoint directory that must not be loaded; the message names file and reason."""


class NotFinite(Rejected):
    """The files are as they were written, but a weight or a moment is NaN or infinite."""


def step_of(directory: Path) -> int:
    return int(_NAME.search(directory.name).group(1))


def is_name(name: str) -> bool:
    """Whether a directory of this name would be a checkpoint."""
    return _NAME.fullmatch(name) is not None


def listed(checkpoints: Path) -> list[Path]:
    """The committed checkpoints, oldest first. They may be damaged."""
    if not checkpoints.is_dir():
        return []
    return sorted((d for d in checkpoints.iterdir() if is_name(d.name)), key=step_of)


def write(checkpoints: Path, step: int, contents: dict[str, bytes | memoryview]) -> Path:
    """Commit checkpoints/step-N and return it. Raises OSError or Rejected, with nothing changed.

    contents: file name -> its bytes.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    draft = checkpoints / f".tmp-step-{step}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        entries = {name: _write_durably(draft / name, data) for name, data in contents.items()}
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": entries}
        _write_durably(
            draft / MANIFEST, json.dumps(manifest, indent=1).encode()
        )  # the manifest comes last
        sync_directory(draft)
        verify(draft)
        final = checkpoints / f"step-{step:08d}"
        _commit(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def _write_durably(path: Path, data: bytes | memoryview) -> dict[str, int | str]:
    """Its entry in the manifest. On the disk, and out of the page cache: it is the images that should be there."""
    digest, view = hashlib.sha256(), memoryview(data)
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"size": len(view), "sha256": digest.hexdigest()}


def manifest_of(directory: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, SHA-256). Raises Rejected."""
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
    lacking = {"model.safetensors", "optimizer.safetensors", "state.json"} - expected.keys()
    if lacking:
        raise Rejected(f"{MANIFEST} lists no {min(lacking)}")
    strange = [name for name in expected if not re.fullmatch(r"\w+\.\w+", name)]
    if strange:
        raise Rejected(f"{MANIFEST} lists {strange[0]!r}, which is no file of a checkpoint")
    return expected


def verify(directory: Path) -> None:
    """Raises Rejected unless every file of the manifest is there, byte for byte, and all weights are finite."""
    for name, (size, digest) in manifest_of(directory).items():
        try:
            with open(directory / name, "rb") as file:
                found_size, found = (
                    os.fstat(file.fileno()).st_size,
                    hashlib.file_digest(file, "sha256").hexdigest(),
                )
        except OSError as error:
            raise Rejected(f"{name} is unreadable ({error.strerror})") from error
        if found_size != size:
            raise Rejected(f"{name} has {found_size} bytes instead of {size}")
        if found != digest:
            raise Rejected(f"{name} does not match its SHA-256 checksum")
        _check_format(directory / name)
        if name.endswith(".safetensors") and Path(name).stem in _FINITE:
            _check_finite(directory / name)


def _check_format(path: Path) -> None:
    """A manifest can be forged; what is neither safetensors nor JSON is refused before anything else looks at it."""
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
        if dtype is None:  # integers, and the file's metadata
            continue
        begin, end = entry["data_offsets"]
        for at in range(begin, end, _PIECE):
            values = data[at : min(end, at + _PIECE)].view(dtype)
            # numpy has no bfloat16: there, an exponent of ones is infinite or NaN.
            bad = (values & 0x7F80) == 0x7F80 if dtype is np.uint16 else ~np.isfinite(values)
            if bad.any():
                raise NotFinite(f"{path.name} has values that are not finite (in {name})")


def read_state(directory: Path) -> dict:
    """state.json of a verified checkpoint."""
    return json.loads((directory / "state.json").read_bytes())


def classes_of(directory: Path, state: dict) -> dict[str, list[str]] | None:
    """Ids (folder names) and names of a checkpoint's classes, in the order of the labels; None if they are not known.

    state: its state.json. Those of older versions name no classes; the run's classes.json does.
    """
    if state.get("classes"):
        return state["classes"]
    try:
        return json.loads((directory.parent.parent / "classes.json").read_bytes())
    except (OSError, ValueError):
        return None


def read_tensors(directory: Path, stem: str) -> "dict[str, Tensor]":
    """Tensors by name of a verified checkpoint, on the CPU."""
    from safetensors.torch import load_file

    return load_file(directory / f"{stem}.safetensors")


def stems_of(directory: Path) -> list[str]:
    """The files of tensors, without their suffix. Raises Rejected."""
    return [Path(name).stem for name in manifest_of(directory) if name.endswith(".safetensors")]


def stem_of_weights(directory: Path) -> str:
    """Which tensors evaluate and predict: the averaged weights, where the run keeps them (trainer.ema_decay)."""
    return "ema" if "ema" in stems_of(directory) else "model"


def clean_up(checkpoints: Path) -> None:
    """After a crash: drop drafts; put back a checkpoint that was being replaced."""
    for old in checkpoints.glob(".old-step-*"):
        final = checkpoints / old.name.removeprefix(".old-")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for draft in checkpoints.glob(".tmp-step-*"):
        shutil.rmtree(draft, ignore_errors=True)


def remove(directory: Path) -> None:
    """Take a checkpoint out of sight at once, then delete it: a half-deleted one is never listed."""
    doomed = directory.with_name(f".tmp-{directory.name}-{secrets.token_hex(4)}")
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _commit(draft: Path, final: Path) -> None:
    old = final.with_name(f".old-{final.name}")
    replaces = (
        final.exists()
    )  # the same step again: after an interrupted evaluation, or in place of a damaged one
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    draft.rename(final)
    sync_directory(final.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
