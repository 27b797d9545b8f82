"""What each command does first, before the seconds that importing torch takes.

    if __name__ == "__main__":
        startup.begin("train")

It makes the standard streams safe, handles stop signals and checks the ranks. Importing this module
changes nothing and imports only light modules of the standard library.
"""

import _thread
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_MULTI_RANK_COMMANDS = (
    *("train", "evaluate", "predict", "doctor", "replay", "lr_find", "export", "sweep"),
)
# If these are stopped, the same command continues or starts again: exit code 75, also under Slurm.
_RESTARTABLE_COMMANDS = ("train", "evaluate", "prepare", "sweep")

_before_exit: list[Callable[[], object]] = []
_exit_lock = _thread.allocate_lock()  # held while the actions run: nobody else ends the process
_recorded: set[int] = set()  # signals that arrived while _record was their handler


def begin(command: str) -> None:
    """Prepare this process for `command`.

    From here on a stop signal ends the process with one line, also during imports and waits, until
    another handler is installed (see StopSignal). Exits with 64 and one line if the environment
    variables of the ranks contradict each other.
    """
    make_streams_safe()  # first, because a new pipe would get the number of a closed stream
    exit_on_stop(can_continue=command in _RESTARTABLE_COMMANDS)
    pause_garbage_collection()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if command not in _MULTI_RANK_COMMANDS:
        return
    from alexnet_ddp.runtime.environment import read_ranks, refuse_lone_tasks
    from alexnet_ddp.runtime.errors import ConfigError, write_exit_code
    from alexnet_ddp.runtime.printing import say

    try:
        read_ranks(os.environ)
        if command != "doctor":  # doctor reports lone tasks in its table
            refuse_lone_tasks(os.environ)
    except ConfigError as error:
        say(f"alexnet_ddp: {error}", sys.stderr)
        write_exit_code(error.exit_code)
        sys.exit(error.exit_code)


# --- garbage collection ---------------------------------------------------------------------------


def pause_garbage_collection() -> None:
    """Collect nothing during the imports, whose objects all stay: a sixth of their time."""
    import gc

    gc.disable()


def resume_garbage_collection() -> None:
    """Collect garbage again, but never look at the objects that exist now."""
    import gc

    gc.freeze()
    gc.enable()


# --- stop signals -------------------------------------------------------------------------------


def handle_stop_signals(handler: Callable[..., object]) -> None:
    """Install `handler` for all stop signals, except for a SIGHUP that nohup has disabled."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """Ignore stop signals from here on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_on_stop(can_continue: bool) -> None:
    """Exit when a stop signal arrives.

    A thread handles the signal, because the main thread may be in C code for minutes.

    Args:
        can_continue: the same command continues, or starts again and loses nothing. The exit code
            is then 75 instead of 128 + the signal's number.
    """
    # Until the handlers are installed: Python's own SIGINT handler would print a trace.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import threading  # after that line, as are all other imports

    reader, writer = os.pipe()
    os.set_blocking(reader, True)
    os.set_blocking(writer, False)
    threading.Thread(
        target=_exit_when_stopped, args=(reader, can_continue), name="stop signals", daemon=True
    ).start()
    handle_stop_signals(_record)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def exit_on_stop_again() -> None:
    """Exit again when a stop signal arrives, after handle_stop_signals has installed a handler."""
    handle_stop_signals(_record)


def _record(number: int, frame: object) -> None:
    """Record the signal. Python writes its number to the wakeup pipe only if there is a handler."""
    _recorded.add(number)


def _exit_when_stopped(reader: int, can_continue: bool) -> None:
    while True:
        (number,) = os.read(reader, 1)
        # If another handler was installed, it handled this signal, unless _record had run already.
        if number in _recorded or signal.getsignal(number) is _record:
            _exit(number, can_continue)


def _exit(number: int, can_continue: bool) -> None:
    """Exit now. Files are replaced by renaming, so none is left incomplete."""
    from alexnet_ddp.runtime.errors import (
        Preempted,
        code_for_caller,
        is_rank_zero,
        write_exit_code,
    )
    from alexnet_ddp.runtime.printing import say

    line = f"stopped by {signal.Signals(number).name}"
    code = 128 + number
    if can_continue:
        line += " while it started; nothing is lost: start the same command again"
        code = Preempted.exit_code
    _exit_lock.acquire()
    try:
        for action in reversed(_before_exit):
            action()
        write_exit_code(code)
        if is_rank_zero():
            say(f"alexnet_ddp: {line}", sys.stderr)
    finally:
        os._exit(code_for_caller(code))


class before_exit:
    """Context manager: call `action` if a stop signal ends the process inside the block.

    The block does not end once that has begun, so an error that `action` causes in it is not
    reported. It is a class because contextlib is slow to import.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def __enter__(self) -> None:
        _before_exit.append(self._action)

    def __exit__(self, *error: object) -> None:
        with _exit_lock:  # for ever if a stop signal is ending the process
            _before_exit.remove(self._action)


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends (Linux only).

    A launcher that is killed cannot stop the processes that it started.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


# --- standard streams ---------------------------------------------------------------------------


def make_streams_safe() -> None:
    """Discard output that cannot be written, instead of failing.

    A closed stream, a reader that has ended and a full disk do not end the command. A closed
    standard stream is opened as /dev/null, because otherwise the next opened file gets its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        stream = getattr(sys, name)
        if stream is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open until the process ends)
        elif number:
            setattr(sys, name, _never_failing(stream))


class _NeverFailing(io.FileIO):
    """A file that discards what cannot be written.

    A full stdout is reported once on stderr; a reader that has ended is not.
    """

    has_failed = False

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not (self.has_failed or isinstance(error, BrokenPipeError) or self.fileno() != 1):
                from alexnet_ddp.runtime.printing import say

                self.has_failed = True
                say(
                    f"warning: some output could not be written to stdout ({error.strerror})",
                    sys.stderr,
                )
            return memoryview(data).nbytes


def _never_failing(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file, so writing to it does not fail
        return stream
    raw = _NeverFailing(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or number == 2,
    )
