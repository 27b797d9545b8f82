"""Starts a helper process that sends the run to wandb. The run never waits for wandb.

In the run's own process, wandb would replace sys.exit and sys.excepthook, and wait for an
unreachable server at the start and again in an exit hook (12 s, measured with wandb 0.31 and a
server that hangs). With a helper process, a row costs the run only its line in metrics.jsonl.
close() waits for the last rows, at most CLOSE_S, and at most STOP_S if the run was stopped, because
SIGKILL may follow. If the run is killed, the helper's standard input is closed: it sends the last
rows and ends.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from alexnet_ddp.runtime.errors import FINAL_CODES, Diverged, Preempted, StoppedByService
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.tracking.classes import ClassResults, Examples
from alexnet_ddp.tracking.histograms import Histogram
from alexnet_ddp.tracking.sinks import Say
from alexnet_ddp.tracking.wandb_settings import is_sweep

CLOSE_S = 75.0  # the helper exits before that, even if wandb hangs
STOP_S = 10.0
PATIENCE_S = 3.0  # a longer wait is announced
UPLOAD_S = 600.0  # that the helper may outlive the run, to upload the last checkpoints
NOT_ONLINE = 3  # the helper's exit code if it cannot reach the server, or has no key
UNSENT = 4  # its exit code if the server did not get everything
_STOPS = (Preempted.exit_code, StoppedByService.exit_code)  # torchrun then ends rank 0 in 30 s
HELPER = Path(__file__).with_name("wandb_process.py")


class _Helper(NamedTuple):
    """The helper process, its standard input, and the thread that reads its messages."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    reader: threading.Thread


class WandbSink:
    """Starts the helper process and prints its messages.

    spec: "mode", "init" (arguments of wandb.init), "name", "config", "facts" (for the summary),
    "offset" (of the first new row in metrics.jsonl), "start_step", "artifacts" and "program"; for
    an export "folder", "aliases", "metadata" and "exit_code" too.
    on_stop: called in a thread if the service asks the run to stop.
    is_urgent: returns whether a stop signal has arrived, so that close() must be short.
    """

    name = "wandb"

    def __init__(
        self,
        run_dir: Path,
        spec: dict[str, Any],
        say: Say,
        on_stop: Callable[[], None] = lambda: None,
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        directory = run_dir.resolve() / "wandb"
        directory.mkdir(exist_ok=True)
        self._say = say
        self._on_stop = on_stop
        self._is_urgent = is_urgent
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._directory = directory
        self._to_sync: str | None = None  # wandb's directory of this start, once it is connected
        self._mode = spec["mode"]
        self._uploads = spec["artifacts"] != "none"
        self._may_outlive = False  # the helper, this process
        root = Path(os.environ.get("WANDB_DIR") or directory.parent).absolute()
        self._upload = f"upload with: wandb sync {root}/wandb/offline-run-*"
        own = {
            "run_dir": str(directory.parent),
            "dir": str(root),
            "pid": _process_to_measure(),
            "upload": self._upload,
            "upload_s": UPLOAD_S if self._uploads else 0.0,
            "is_sweep": is_sweep(),
            "not_online": NOT_ONLINE,
            "unsent": UNSENT,
            "final_codes": FINAL_CODES,
            "quiet_codes": [0, *_STOPS],
            "diverged": Diverged.exit_code,
            "is_last_start": _is_last_start(spec["start_step"]),
        }
        write_json(directory / "helper.json", redact(spec) | own)
        for name in ("classes.json", "examples.json"):
            (directory / name).unlink(missing_ok=True)  # of an earlier start
        if self._mode == "offline":
            say(f"wandb: offline; {self._upload}")
        self._helper = self._start()

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        """Print the helper's messages, and restart it offline if it could not connect.

        The helper reads the row from metrics.jsonl. Raises RuntimeError if it has failed.
        """
        self._pass_on()
        self._check(self._helper.process.poll())

    def image(self, name: str, pixels: np.ndarray) -> None:
        """Does nothing: the helper sends batch.png, which it finds in the run's directory."""

    def classes(self, results: ClassResults) -> None:
        """Have the helper send a table of the classes, and the confusions between them."""
        write_json(self._directory / "classes.json", results.as_json())

    def examples(self, examples: Examples) -> None:
        """Have the helper send the images with the largest losses, with their captions."""
        folder = self._directory / "largest_losses"
        folder.mkdir(exist_ok=True)
        images = []
        for k, (content, caption) in enumerate(zip(examples.jpegs, examples.captions)):
            file = folder / f"{k:02d}.jpg"
            file.write_bytes(content)
            images.append({"file": str(file), "caption": caption})
        write_json(self._directory / "examples.json", {"step": examples.step, "images": images})

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """Does nothing: they are shown by TensorBoard."""

    def close(self, exit_code: int, message: str) -> None:
        """Wait until wandb has what remains; print a warning if that takes too long.

        After a complete run, a helper that uploads checkpoints continues for UPLOAD_S at most.
        After another end, the next start uploads them. Raises TimeoutError if the helper was not
        connected yet, or RuntimeError if it has failed.
        """
        self._may_outlive = self._uploads and exit_code == 0
        end = {"code": exit_code, "message": redact(message)}
        try:
            if self._check(self._finish(end)):
                self._check(self._finish(end))
        finally:
            self._end()

    def _start(self) -> _Helper:
        command = [sys.executable, "-P", HELPER, self._directory / "helper.json", self._mode]
        with (self._directory / "helper.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"WANDB_ERROR_REPORTING": "false", **_environment()},
                start_new_session=True,  # no Ctrl-C, and no terminal for wandb to prompt on
            )
        assert process.stdin is not None  # a pipe, and so is the next
        assert process.stdout is not None
        reader = threading.Thread(
            target=self._read, args=(process.stdout,), name="wandb messages", daemon=True
        )
        reader.start()
        return _Helper(process, process.stdin, reader)

    def _read(self, stdout: IO[bytes]) -> None:
        """Handle the helper's messages until it ends. It is a thread, so that a stop is prompt."""
        with stdout:
            for line in stdout:
                message = json.loads(line)
                if message.get("stop"):
                    self._on_stop()
                elif "directory" in message:
                    self._to_sync = message["directory"]
                else:
                    self._said.put(message["say"])

    def _check(self, code: int | None) -> bool:
        """Handle an exit code of the helper; True if it was restarted offline."""
        if code == NOT_ONLINE and self._mode == "online":
            self._end()
            self._mode = "offline"  # wandb cannot start a run twice in one process
            self._helper = self._start()
            return True
        if code == UNSENT:
            sync = f"wandb sync --include-online {self._to_sync}"
            text = "warning: wandb's server did not get everything in time"
            self._said.put(f"{text}; upload with: {sync}")
        elif code:
            raise RuntimeError(
                f"its process ended with code {code}, see {self._directory / 'helper.log'}"
            )
        return False

    def _finish(self, end: dict[str, Any]) -> int | None:
        """Send the end of the run. Return the helper's exit code, or None if it still uploads."""
        # The helper may have ended already; its exit code is checked below.
        with contextlib.suppress(BrokenPipeError):
            self._helper.stdin.write(f"{json.dumps(end)}\n".encode())
            self._helper.stdin.flush()
        began = time.monotonic()
        is_stop = end["code"] in _STOPS
        code = self._wait(began, is_stop)
        if code is not None:
            return code
        if self._to_sync is None or self._mode == "offline":
            raise TimeoutError(f"it did not finish in {time.monotonic() - began:.0f} s")
        if self._may_outlive and not self._is_urgent():
            pid, minutes = self._helper.process.pid, UPLOAD_S / 60
            text = f"wandb: process {pid} uploads files for up to {minutes:.0f} minutes more"
            self._said.put(text)
            return None
        self._may_outlive = False
        text = "warning: wandb's server did not get everything in time"
        if is_stop:
            self._said.put(f"{text}; the next start sends the missing rows")
            return 0
        self._said.put(f"{text}; {self._upload}")
        return NOT_ONLINE  # wandb's file may be incomplete: write an offline run

    def _wait(self, began: float, is_stop: bool) -> int | None:
        """Wait for the end of the helper. Return its exit code, or None if that takes too long."""
        is_announced = self._mode == "offline"
        while (code := self._helper.process.poll()) is None:
            waited_s = time.monotonic() - began
            is_local = self._to_sync is None or self._mode == "offline"
            is_short = is_stop or is_local or self._is_urgent()
            if waited_s > (STOP_S if is_short else CLOSE_S):
                break
            if not (is_announced or is_short) and waited_s > PATIENCE_S:
                is_announced = True
                limit = f"for up to {CLOSE_S:.0f} s; Ctrl-C ends the wait"
                self._said.put(f"wandb: waiting until the server has everything, {limit}")
            self._pass_on()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._helper.process.wait(0.2)
        return code

    def _end(self) -> None:
        """Kill the helper, unless it still uploads, and print its last messages."""
        if self._may_outlive and self._helper.process.poll() is None:
            self._pass_on()
            return
        self._helper.process.kill()
        self._helper.process.wait()
        self._helper.reader.join()
        self._pass_on()
        try:
            self._helper.stdin.close()
        except BrokenPipeError:
            return  # the helper ended before it read the exit code

    def _pass_on(self) -> None:
        while not self._said.empty():
            self._say(self._said.get())


def _environment() -> dict[str, str]:
    """The helper's variables, without the one by which launch/ finds and ends leftover processes.

    After a crash the helper still sends the last rows, and it ends by itself.
    """
    return {
        name: value for name, value in os.environ.items() if name != "ALEXNET_DDP_EXIT_CODE_FILE"
    }


def _process_to_measure() -> int:
    """The process whose tree contains all ranks of this machine: torchrun, or this process."""
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    return os.getppid() if several else os.getpid()


def _is_last_start(start_step: int) -> bool:
    """True if nothing starts the run again if it crashes. launch/common.sh sets the variables."""
    is_supervised = "ALEXNET_DDP_EXIT_CODE_FILE" in os.environ
    return not is_supervised or os.environ.get("ALEXNET_DDP_GIVES_UP_AT") == str(start_step)
