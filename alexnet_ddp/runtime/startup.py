"""The first line of each command: standard streams, stop signals and ranks, before the seconds that torch takes.

    if __name__ == "__main__":
        startup.begin("train")

Importing a module of the package changes nothing. Needs no torch.
"""

import io
import os
import signal
import sys
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_FORMS_A_WORLD = ("train", "evaluate", "doctor", "replay")
_CAN_CONTINUE = (
    "train",
    "evaluate",
    "prepare",
)  # the same command continues or starts again: 75, also under Slurm

_before_exit: list[Callable[[], object]] = []
_noticed: set[int] = set()  # signals that arrived while _noted was their handler


def begin(command: str) -> None:
    """Prepare this process for `command`. Exits with 64 and one line if the environment contradicts itself.

    From here on a stop signal ends the process with one line, whatever it is importing or waiting for, until
    another handler is installed: see StopSignal.
    """
    make_streams_safe()  # first, because a pipe would get the number of a closed stream
    exit_on_stop(can_continue=command in _CAN_CONTINUE)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if command not in _FORMS_A_WORLD:
        return
    from alexnet_ddp.runtime.environment import read_ranks, refuse_lone_tasks
    from alexnet_ddp.runtime.errors import ConfigError, write_exit_code
    from alexnet_ddp.runtime.printing import say

    try:
        read_ranks(os.environ)
        if command != "doctor":  # which reports it in its table
            refuse_lone_tasks(os.environ)
    except ConfigError as error:
        say(f"alexnet_ddp: {error}", sys.stderr)
        write_exit_code(error.exit_code)
        sys.exit(error.exit_code)


def exit_on_stop(can_continue: bool) -> None:
    """Exit when a stop signal arrives. A thread does so: the main thread may be in C code for minutes.

    can_continue: the same command continues, or starts again and loses nothing, so the exit code is 75.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a silent end, while Python's own handler would print a trace
    import threading  # and all other imports come later

    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, end == reader)
    threading.Thread(
        target=_exit_when_stopped, args=(reader, can_continue), name="stop signals", daemon=True
    ).start()
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, _noted)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def _noted(number: int, frame: object) -> None:
    """Python needs a handler to write a signal's number to the wakeup pipe; the thread acts on it."""
    _noticed.add(number)


def _exit_when_stopped(reader: int, can_continue: bool) -> None:
    while True:
        (number,) = os.read(reader, 1)
        # Otherwise another handler has replaced it, and has had this signal. It may have been replaced just now.
        if number in _noticed or signal.getsignal(number) is _noted:
            _exit(number, can_continue)


def _exit(number: int, can_continue: bool) -> None:
    """Exit now. Files are replaced by renaming, so none is left incomplete."""
    from alexnet_ddp.runtime.errors import Preempted, speaks_for_all, write_exit_code
    from alexnet_ddp.runtime.printing import say

    line, code = f"stopped by {signal.Signals(number).name}", 128 + number
    if can_continue:
        line += " while it started; nothing is lost: start the same command again"
        code = Preempted.exit_code
    try:
        for action in reversed(_before_exit):
            action()
        write_exit_code(code)
        if speaks_for_all():
            say(f"alexnet_ddp: {line}", sys.stderr)
    finally:
        os._exit(code)


class before_exit:
    """Within it, action() is called before a stop signal ends the process. (contextlib is slow to import.)"""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def __enter__(self) -> None:
        _before_exit.append(self._action)

    def __exit__(self, *error: object) -> None:
        _before_exit.remove(self._action)


def end_with_parent() -> None:
    """From here on the kernel sends SIGTERM when the process that started this one is gone (Linux only).

    A launcher that is killed cannot end what it started.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def ignore_stop() -> None:
    """The exit code is known: a signal must not replace it while the interpreter ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_streams_safe() -> None:
    """Output that cannot be written is dropped: a closed stream, a lost reader and a full disk do not end a command.

    A closed standard stream becomes /dev/null, because the next file that is opened would get its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115 (until the process ends)
        elif number:
            setattr(sys, name, _never_failing(stream))


class _NeverFailing(io.FileIO):
    """Drops what cannot be written. A full stdout is reported once on stderr; a reader that has gone is not."""

    has_failed = False

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if (
                not self.has_failed
                and not isinstance(error, BrokenPipeError)
                and self.fileno() == 1
            ):
                from alexnet_ddp.runtime.printing import say

                self.has_failed = True
                say(
                    f"warning: some output could not be written to stdout ({error.strerror})",
                    sys.stderr,
                )
            return len(data)


def _never_failing(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file, so nothing of it can fail
        return stream
    raw = _NeverFailing(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or number == 2,
    )
