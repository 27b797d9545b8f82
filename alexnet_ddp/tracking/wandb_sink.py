"""Starts a helper process that sends metrics.jsonl to wandb. The run never waits for wandb.

In the run's own process, wandb would replace sys.exit and sys.excepthook, and wait for an
unreachable server at the start and again in an exit hook (12 s, measured with wandb 0.31 and a
server that hangs). With a helper process, a row costs the run only its line in metrics.jsonl, and
close() takes at most CLOSE_S. If the run is killed, the helper's standard input is closed: it sends
the last rows and ends.
"""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from alexnet_ddp.runtime.files import write_bytes, write_json
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.tracking.sinks import Say

CLOSE_S = 10.0
NOT_ONLINE = 3  # the helper's exit code if it cannot reach the server, or has no key
HELPER = Path(__file__).with_name("wandb_process.py")


def wandb_mode(wanted: str) -> str:
    """Return the lower of `wanted` and WANDB_MODE, in the order online > offline > disabled."""
    modes = ("disabled", "offline", "online")
    asked = os.environ.get("WANDB_MODE", wanted).lower().replace("dryrun", "offline")
    return modes[min(modes.index(wanted), modes.index(asked) if asked in modes else 2)]


def wandb_id(run_dir: Path) -> str:
    """Return the run's id in wandb; the first call creates it and writes wandb_id.txt."""
    path = run_dir / "wandb_id.txt"
    found = path.read_text().strip() if path.exists() else ""
    if not re.fullmatch(r"[\w\-]{1,64}", found):
        found = secrets.token_hex(4)
        write_bytes(path, f"{found}\n".encode())
    return found


class _Helper(NamedTuple):
    """The helper process and its pipes."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]


class WandbSink:
    """Starts the helper process and prints its messages.

    spec: "mode", and the input of wandb_process.py that this class does not know itself.
    """

    name = "wandb"

    def __init__(self, run_dir: Path, spec: dict[str, Any], say: Say) -> None:
        directory = run_dir.resolve() / "wandb"
        directory.mkdir(exist_ok=True)
        self._say = say
        self._directory = directory
        self._mode = spec["mode"]
        own = {
            "run_dir": str(directory.parent),
            "id": wandb_id(run_dir),
            "pid": os.getpid(),
            "not_online": NOT_ONLINE,
        }
        self._upload = f"upload with: wandb sync {directory}/offline-run-*"
        write_json(directory / "helper.json", redact(spec) | own | {"upload": self._upload})
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

    def close(self, exit_code: int) -> None:
        """Give the helper CLOSE_S to send the remaining rows; unsent rows stay on disk.

        Raises TimeoutError, or RuntimeError if it has failed.
        """
        deadline = time.monotonic() + CLOSE_S
        try:
            code = self._finish(exit_code, deadline)
            if self._check(code):
                self._check(self._finish(exit_code, deadline))
        finally:
            self._end()

    def _start(self) -> "_Helper":
        with (self._directory / "helper.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    str(HELPER),
                    str(self._directory / "helper.json"),
                    self._mode,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"WANDB_ERROR_REPORTING": "false", **os.environ},
                start_new_session=True,  # no Ctrl-C, and no terminal for wandb to prompt on
            )
        assert process.stdin is not None  # a pipe, and so is the next
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        return _Helper(process, process.stdin, process.stdout)

    def _check(self, code: int | None) -> bool:
        """Handle an exit code of the helper; True if it was restarted offline."""
        if code == NOT_ONLINE and self._mode == "online":
            self._end()
            self._mode = "offline"  # wandb cannot start a run twice in one process
            self._helper = self._start()
            return True
        if code:
            raise RuntimeError(
                f"its process ended with code {code}, see {self._directory / 'helper.log'}"
            )
        return False

    def _finish(self, exit_code: int, deadline: float) -> int:
        # The helper may have ended already; its exit code is checked below.
        with contextlib.suppress(BrokenPipeError):
            self._helper.stdin.write(f"{exit_code}\n".encode())
            self._helper.stdin.flush()
        try:
            return self._helper.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"it did not finish in {CLOSE_S:.0f} s") from None

    def _end(self) -> None:
        self._helper.process.kill()
        self._helper.process.wait()
        self._pass_on()
        self._helper.stdout.close()
        try:
            self._helper.stdin.close()
        except BrokenPipeError:
            return  # the helper ended before it read the exit code

    def _pass_on(self) -> None:
        for line in (self._helper.stdout.read() or b"").decode(errors="replace").splitlines():
            self._say(line)
