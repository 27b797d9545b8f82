"""The process that writes checkpoints while training continues, and the rank's side of it.

`python -m alexnet_ddp.checkpoint.writer FD` maps the shared memory FD, reads one SaveRequest per
line of its standard input, as JSON, and answers each with one SaveResult. If the training process
ends for any reason, the writer completes the checkpoint that it has begun. It also deletes old
checkpoints and copies new ones to a URL. It needs no torch, so the process starts in 0.1 s.
"""

import hashlib
import json
import logging
import mmap
import os
import queue
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import wait as wait_readable
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.checkpoint.format import (
    MANIFEST,
    STATE,
    NotFinite,
    Rejected,
    is_checkpoint_name,
    list_checkpoints,
    read_manifest,
    remove_checkpoint,
    step_of,
    verify,
    write_checkpoint,
)
from alexnet_ddp.runtime import helper_process
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.startup import ignore_stop_signals

_PARENT = os.getppid()  # in the writer process: the process that trains
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class SaveRequest:
    """One checkpoint to write, and which older ones to keep."""

    directory: str  # of all checkpoints of the run
    step: int
    ranges: dict[str, tuple[int, int]]  # group -> (first byte, end) of its file in the memory
    state: dict[str, Any]  # the content of state.json
    best: dict[str, float | int]  # of RunState; empty without an evaluation
    keep_last: int
    keep_every_steps: int | None
    copy_to: str | None  # URL


@dataclass(frozen=True)
class SaveResult:
    """What became of a SaveRequest."""

    step: int
    error: str = ""  # why the checkpoint was not written
    not_finite: bool = False  # the reason: a value is NaN or infinite
    warning: str = ""  # it was written, but old ones were not deleted or a copy failed


# --- in the training process --------------------------------------------------------------------


class BackgroundWriter:
    """Starts the writer process and sends it one request at a time; there is no queue."""

    def __init__(self) -> None:
        self._process: _Process | None = None
        self._step: int | None = None  # of the request that is not answered yet

    @property
    def is_busy(self) -> bool:
        return self._step is not None

    def prepare(self, size: int) -> mmap.mmap:
        """Return shared memory of at least `size` bytes, and have the process started.

        Call it before the first step, so that no step waits for it. Raises OSError.
        """
        if self._process is None or len(self._process.memory) < size:
            self.close()
            self._process = _Process(size)
        return self._process.memory

    def start(self, request: SaveRequest) -> None:
        """Send a request whose files are in the memory, which must not change until the result.

        Requires prepare(), and that is_busy is false.
        """
        assert self._process is not None
        assert not self.is_busy
        self._step = request.step
        self._process.send(request)

    def result(self, wait: bool = False) -> SaveResult | None:
        """Return the result of the last request, once; None if there is none yet.

        If the process died, the result is an error.

        Args:
            wait: block until the result arrives.
        """
        if self._process is None or self._step is None:
            return None
        if not wait and not self._process.has_output():
            return None
        result = self._process.receive()
        if result is None:
            code = self._process.end()
            self._process = None
            result = SaveResult(
                self._step, error=f"the process that writes checkpoints ended with {code}"
            )
        self._step = None
        return result

    def close(self) -> SaveResult | None:
        """Wait for unfinished writes and copies, and end the process.

        Returns a result with a warning if the last copy failed.
        """
        self.result(wait=True)
        if self._process is None:
            return None
        self._process.close_input()
        last = self._process.receive()
        self._process.end()
        self._process = None
        return last


class _Process:
    """A writer process, and the memory of `size` bytes that it shares with this process."""

    def __init__(self, size: int) -> None:
        self._file = helper_process.shared_file("checkpoint", size)
        # Unmapped when the last tensor that uses it is freed.
        self.memory = mmap.mmap(self._file.fileno(), size)
        np.frombuffer(self.memory, np.uint8)[:] = 0  # cause the page faults now
        self.popen = helper_process.start(
            "checkpoint.writer", str(self._file.fileno()), [self._file], stdout=subprocess.PIPE
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self._stdin = self.popen.stdin
        self._stdout = self.popen.stdout

    def send(self, request: SaveRequest) -> None:
        with suppress(BrokenPipeError):  # the process died: receive() returns None
            self._stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            self._stdin.flush()

    def has_output(self) -> bool:
        """Return whether receive() would return at once."""
        return bool(wait_readable([self._stdout.fileno()], 0))

    def receive(self) -> SaveResult | None:
        """Wait for the next result and return it; None if the process ended without one."""
        line = self._stdout.readline()
        return SaveResult(**json.loads(line)) if line.endswith(b"\n") else None

    def close_input(self) -> None:
        """Have the process end when it has finished its work."""
        with suppress(BrokenPipeError):
            self._stdin.close()

    def end(self) -> int:
        """Wait for the end of the process; return its exit code, negative if a signal ended it."""
        self.close_input()
        self._stdout.close()
        self._file.close()
        return self.popen.wait()


# --- in the writer process ----------------------------------------------------------------------


def save(request: SaveRequest, memory: memoryview, copier: "Copier") -> SaveResult:
    """Write and verify a checkpoint, then delete those that are not kept, and offer it for copying.

    Args:
        request: what to write and what to keep.
        memory: the shared memory with the files of tensors.
        copier: copies the checkpoint later, while the next request may be handled.
    """
    directory = Path(request.directory)
    contents: dict[str, bytes | memoryview] = {
        f"{group}.safetensors": memory[start:end] for group, (start, end) in request.ranges.items()
    }
    contents[STATE] = json.dumps(request.state, indent=1).encode()
    try:
        written = write_checkpoint(directory, request.step, contents)
    except (OSError, Rejected) as error:
        return SaveResult(request.step, error=str(error), not_finite=isinstance(error, NotFinite))
    warnings = [copier.take_warning()]
    copier.offer(request, written)
    # If the training process has ended, its successor may be running, and decides what is old.
    if os.getppid() == _PARENT:
        warnings += [_attempt(lambda: _remove_old(directory, request, copier.held_steps()))]
    if request.best:
        best = {**request.best, "checkpoint": f"step-{request.best['step']:08d}"}
        warnings += [_attempt(lambda: write_json(directory.parent / "best.json", best))]
    return SaveResult(request.step, warning="; ".join(filter(None, warnings)))


def _attempt(action: Callable[[], object]) -> str:
    """Call an action that follows a successful save. Return its error as one line, or ""."""
    try:
        action()
        return ""
    except Exception as error:  # fsspec's stores raise errors of any type
        return " ".join(f"{type(error).__name__}: {error}".split())


def steps_to_keep(steps: list[int], request: SaveRequest) -> set[int]:
    """Return the steps to keep out of `steps`, which are ascending.

    Steps after the request's are deleted: they were rejected when this run resumed.
    """
    past = [step for step in steps if step <= request.step]
    every = request.keep_every_steps
    periodic = [step for step in past if every is not None and step % every == 0]
    best = [int(request.best["step"])] if request.best else []
    return {*past[-request.keep_last :], *periodic, *best}


def _remove_old(directory: Path, request: SaveRequest, held_steps: set[int]) -> None:
    found = list_checkpoints(directory)
    kept = steps_to_keep([step_of(checkpoint) for checkpoint in found], request) | held_steps
    for checkpoint in found:
        if step_of(checkpoint) not in kept:
            remove_checkpoint(checkpoint)


class Copier:
    """Copies checkpoints to a URL in a thread, so that a slow store delays neither saves nor stops.

    Of several waiting checkpoints only the newest is copied.
    """

    def __init__(self) -> None:
        self._offers: queue.SimpleQueue[tuple[SaveRequest, Path] | None] = queue.SimpleQueue()
        self._steps: list[int] = []  # being copied (the first) or waiting
        self._warning = ""
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def offer(self, request: SaveRequest, checkpoint: Path) -> None:
        """Copy `checkpoint` later, if the request names a URL."""
        if request.copy_to is not None:
            self._steps.append(request.step)
            self._offers.put((request, checkpoint))

    def held_steps(self) -> set[int]:
        """Return the steps that must not be deleted: the one being copied, and the newest."""
        return {*self._steps[:1], *self._steps[-1:]}

    def take_warning(self) -> str:
        """Return the error of the last copy, once, or ""."""
        found, self._warning = self._warning, ""
        return found

    def finish(self) -> None:
        """Wait for the last copy."""
        self._offers.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (offer := self._offers.get()) is not None:
            request, checkpoint = offer
            if request.step == self._steps[-1]:  # otherwise a newer one waits
                self._warning = _attempt(partial(self._copy, request, checkpoint))
            self._steps.pop(0)

    @staticmethod
    def _copy(request: SaveRequest, checkpoint: Path) -> None:
        assert request.copy_to is not None  # see offer()
        copy_to_url(checkpoint, request.copy_to)
        if os.getppid() == _PARENT:
            prune_copies(request.copy_to, lambda steps: steps_to_keep(steps, request))


# --- copies at a URL ----------------------------------------------------------------------------
# The manifest is copied last and deleted first, so a copy without a manifest is incomplete.


def copy_to_url(directory: Path, url: str) -> None:
    """Copy a verified checkpoint to url/NAME and compare its checksums.

    Raises Rejected if a file reads back differently, and the errors of the store.
    """
    fs, root = _open_url(url)
    target = f"{root}/{directory.name}"
    fs.makedirs(target, exist_ok=True)
    expected = read_manifest(directory)
    if fs.exists(f"{target}/{MANIFEST}"):  # an older copy of the same step
        fs.rm_file(f"{target}/{MANIFEST}")
    for name in [*expected, MANIFEST]:
        fs.put_file(str(directory / name), f"{target}/{name}")
    for name, (size, digest) in expected.items():
        if _remote_digest(fs, f"{target}/{name}") != digest:
            raise Rejected(f"{target}/{name} reads back differently ({size:,} bytes were written)")


def prune_copies(url: str, choose: Callable[[list[int]], set[int]]) -> None:
    """Delete the copies whose steps are not in choose(all steps, ascending)."""
    fs, root = _open_url(url)
    steps = {name: step_of(Path(name)) for name in _list_copies(fs, root)}
    kept = choose(list(steps.values()))
    for name, step in steps.items():
        if step not in kept:
            fs.rm_file(f"{root}/{name}/{MANIFEST}")
            fs.rm(f"{root}/{name}", recursive=True)


def fetch_newest_copy(url: str, checkpoints: Path) -> Path | None:
    """Download the newest complete copy into `checkpoints`, which contains no checkpoint yet.

    Returns None if there are no copies. Raises Rejected if no copy verifies, and the errors of the
    store.
    """
    fs, root = _open_url(url)
    reason: Exception | None = None
    for name in reversed(_list_copies(fs, root)):
        draft = checkpoints / f".tmp-{name}-{secrets.token_hex(4)}"
        draft.mkdir(parents=True)
        try:
            entries = json.loads(fs.cat_file(f"{root}/{name}/{MANIFEST}"))["files"]
            for file in [*map(_require_plain_name, entries), MANIFEST]:
                fs.get_file(f"{root}/{name}/{file}", str(draft / file))
            verify(draft)
            return draft.rename(checkpoints / name)
        except (Rejected, ValueError, KeyError, TypeError, FileNotFoundError) as error:
            reason = error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if reason is not None:
        raise Rejected(f"no copy in {url} verifies; the last one: {reason}")
    return None


def _require_plain_name(name: str) -> str:
    if name != Path(name).name:
        raise Rejected(f"{MANIFEST} names {name}, which is outside")
    return name


def _open_url(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # slow to import and rarely needed

    fs, root = url_to_fs(url)
    return fs, root.rstrip("/")


def _list_copies(fs: Any, root: str) -> list[str]:
    """Return the names of the complete copies, oldest first."""
    if not fs.exists(root):
        return []
    fs.invalidate_cache(root)
    names = [Path(entry.rstrip("/")).name for entry in fs.ls(root, detail=False)]
    found = [
        name
        for name in names
        if is_checkpoint_name(name) and fs.exists(f"{root}/{name}/{MANIFEST}")
    ]
    return sorted(found, key=lambda name: step_of(Path(name)))


def _remote_digest(fs: Any, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# --- the process --------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Handle requests until standard input closes."""
    ignore_stop_signals()  # the training process handles them and sends its last request
    os.nice(10)
    copier = Copier()
    request = None
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as memory:
        for line in sys.stdin:
            request = SaveRequest(**json.loads(line))
            _answer(save(request, memory, copier))
    copier.finish()
    warning = copier.take_warning()
    if warning and request is not None:
        _answer(SaveResult(request.step, warning=warning))


def _answer(result: SaveResult) -> None:
    with suppress(BrokenPipeError):  # the training process has ended; the checkpoint is written
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    logging.disable()
    main(int(sys.argv[1]))
