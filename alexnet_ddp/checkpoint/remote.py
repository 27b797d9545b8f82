"""Copies of checkpoints at a URL that fsspec knows: files first, the manifest last, so that half a copy is none."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alexnet_ddp.checkpoint import format as files


def copy(directory: Path, url: str) -> None:
    """Copy a verified checkpoint to url/NAME and read it back. Raises what the store raises, or Rejected."""
    fs, root = _open(url)
    there = f"{root}/{directory.name}"
    fs.makedirs(there, exist_ok=True)
    expected = files.manifest_of(directory)
    if fs.exists(f"{there}/{files.MANIFEST}"):  # the same step again
        fs.rm_file(f"{there}/{files.MANIFEST}")
    for name in [*expected, files.MANIFEST]:
        fs.put_file(str(directory / name), f"{there}/{name}")
    for name, (size, digest) in expected.items():
        if _digest(fs, f"{there}/{name}") != digest:
            raise files.Rejected(
                f"{there}/{name} reads back differently ({size:,} bytes were written)"
            )


def keep_only(to_keep: Callable[[list[int]], set[int]], url: str) -> None:
    """Drop the copies whose steps `to_keep` does not choose of all, their manifests first."""
    fs, root = _open(url)
    steps = {name: files.step_of(Path(name)) for name in _listed(fs, root)}
    kept = to_keep(list(steps.values()))
    for name, step in steps.items():
        if step not in kept:
            fs.rm_file(f"{root}/{name}/{files.MANIFEST}")
            fs.rm(f"{root}/{name}", recursive=True)


def fetch_newest(url: str, checkpoints: Path) -> Path | None:
    """Bring the newest complete copy to an empty `checkpoints`; None where there is none.

    Raises what the store raises, Rejected where no copy verifies.
    """
    fs, root = _open(url)
    reason: Exception | None = None
    for name in reversed(_listed(fs, root)):
        draft = checkpoints / f".tmp-{name}-{secrets.token_hex(4)}"
        draft.mkdir(parents=True)
        try:
            entries = json.loads(fs.cat_file(f"{root}/{name}/{files.MANIFEST}"))["files"]
            for file in [*map(_plain, entries), files.MANIFEST]:
                fs.get_file(f"{root}/{name}/{file}", str(draft / file))
            files.verify(draft)
            return draft.rename(checkpoints / name)
        except (files.Rejected, ValueError, KeyError, TypeError, FileNotFoundError) as error:
            reason = error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if reason is not None:
        raise files.Rejected(f"no copy in {url} verifies; the last one: {reason}")
    return None


def _plain(name: str) -> str:
    if name != Path(name).name:
        raise files.Rejected(f"{files.MANIFEST} names {name}, which is outside")
    return name


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # slow to import, and few need it

    fs, root = url_to_fs(url)
    return fs, root.rstrip("/")


def _listed(fs: Any, root: str) -> list[str]:
    """Names of the copies that have a manifest, oldest first."""
    if not fs.exists(root):
        return []
    fs.invalidate_cache(root)
    names = [Path(entry.rstrip("/")).name for entry in fs.ls(root, detail=False)]
    found = [
        name
        for name in names
        if files.is_name(name) and fs.exists(f"{root}/{name}/{files.MANIFEST}")
    ]
    return sorted(found, key=lambda name: files.step_of(Path(name)))


def _digest(fs: Any, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()
