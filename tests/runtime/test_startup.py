"""From the first line of a command on: stop signals end it with one line, and lost output does not end it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_ddp.runtime.startup import STOP_SIGNALS

PROJECT = Path(__file__).parents[2]
NEEDS_NO_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


def python(code: str, command: str = "train", **popen) -> subprocess.Popen:
    """A process that calls startup.begin(command), and then runs `code`."""
    env = {name: value for name, value in os.environ.items() if name not in NEEDS_NO_TORCH}
    text = f"import sys, time\nfrom alexnet_ddp.runtime import startup\nstartup.begin({command!r})\n{code}"
    env |= {"PYTHONPATH": str(PROJECT)} | popen.pop("env", {})
    # Under nohup, SIGHUP is ignored in the tests too, and children inherit that.
    heed_hup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | heed_hup | popen
    return subprocess.Popen([sys.executable, "-c", text], env=env, text=True, **options)


def signalled(code: str, number: int, **popen) -> tuple[int, str]:
    """Send `number` once the process has printed a line; (exit code, stderr)."""
    process = python(f"print('ready', flush=True)\n{code}", **popen)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.sampled
@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("command", ["train", "evaluate", "prepare"])
def test_a_command_that_can_continue_ends_with_75_and_one_line(command, number):
    line = (
        f"alexnet_ddp: stopped by {signal.Signals(number).name} while it started; nothing is lost: "
    )
    assert signalled("time.sleep(60)", number, command=command) == (
        75,
        f"{line}start the same command again\n",
    )


@pytest.mark.sampled
@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("command", ["predict", "plan", "doctor"])
def test_a_command_that_keeps_nothing_ends_with_128_and_the_signal(command, number):
    line = f"alexnet_ddp: stopped by {signal.Signals(number).name}\n"
    assert signalled("time.sleep(60)", number, command=command) == (128 + number, line)


# The main thread is in C code that releases the GIL and is not interrupted by a signal, as in a wait for other ranks.
IN_C = "import ctypes\nm = ctypes.CDLL(None)\nwhile True: m.usleep(900000)"
# An import that catches everything, KeyboardInterrupt too: this lost the signal before.
GREEDY = "while True:\n    try: time.sleep(0.001)\n    except BaseException: pass"


@pytest.mark.parametrize("code", [IN_C, GREEDY])
def test_a_signal_ends_c_code_and_a_loop_that_catches_everything(code):
    assert signalled(code, signal.SIGINT)[0] == 75


def test_another_handler_takes_over(tmp_path):
    code = "from alexnet_ddp.runtime.signals import StopSignal\nstop = StopSignal()\nprint('on', flush=True)\n"
    process = python(code + "while not stop.received: time.sleep(0.01)\nsys.exit(9)")
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGTERM)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 9)


def test_a_signal_just_before_another_handler_takes_over_is_not_lost():
    code = "import os\nfrom alexnet_ddp.runtime.signals import StopSignal\nos.kill(os.getpid(), 15)\nStopSignal()\n"
    process = python(code + "time.sleep(20)")
    assert (process.communicate(timeout=60)[1].count("\n"), process.returncode) == (1, 75)


def test_nohup_keeps_sighup_away():
    process = python(
        "print('ready', flush=True)\ntime.sleep(1)\nsys.exit(9)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 9)


def test_the_exit_code_file_is_written_and_only_rank_0_prints(tmp_path):
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env = rank | {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "ALEXNET_DDP_EXIT_CODE_FILE": str(tmp_path / "code"),
    }
    assert signalled("time.sleep(60)", signal.SIGTERM, env=env) == (75, "")
    assert (tmp_path / "code").read_text() == "75\n"


def test_registered_actions_run_before_the_exit(tmp_path):
    code = f"""
def note(name): open({str(tmp_path)!r} + "/" + name, "w").close()
with startup.before_exit(lambda: note("left")): pass
with startup.before_exit(lambda: note("within")):
    print("go", flush=True)
    time.sleep(60)
"""
    process = python(code)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["within"]


@pytest.mark.parametrize(
    "module", ["runtime.startup", "runtime.watchdog_process", "checkpoint.writer"]
)
def test_helper_processes_and_the_start_of_a_command_import_no_torch(module):
    code = f"import sys, alexnet_ddp.{module}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=60, check=False)
    assert done.returncode == 0


def test_importing_the_package_changes_no_handler_and_no_stream():
    code = "import signal, sys\nbefore = signal.getsignal(2), signal.getsignal(15), sys.stdout\n"
    code += "import alexnet_ddp.runtime.startup, alexnet_ddp.runtime.signals, alexnet_ddp.runtime.helper_process\n"
    code += "assert before == (signal.getsignal(2), signal.getsignal(15), sys.stdout)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=60, check=False)
    assert done.returncode == 0


# --- output that is lost ----------------------------------------------------------------------------------------

PRINTS = """
for k in range(2000): print("x" * 100)
sys.stdout.flush()
print("to stderr", file=sys.stderr)
sys.exit(9)
"""


@pytest.mark.parametrize(
    "closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>/dev/full"]
)
def test_output_that_cannot_be_written_does_not_change_the_exit_code(closed, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nfrom alexnet_ddp.runtime import startup\nstartup.begin('plan')\n{PRINTS}"
    )
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = ["bash", "-c", f"'{sys.executable}' '{script}' {closed}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 9, done.stderr
    if closed == ">/dev/full":
        lines = [
            "warning: some output could not be written to stdout (No space left on device)",
            "to stderr",
        ]
        assert done.stderr.splitlines() == lines


def test_a_closed_pipe_does_not_change_the_exit_code():
    process = python(PRINTS)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == "to stderr\n"
    assert process.wait(60) == 9


def test_a_closed_stream_is_not_taken_by_the_next_file(tmp_path):
    code = f"import os\nfile = open({str(tmp_path / 'data')!r}, 'w')\nos.write(1, b'x')\nos.write(2, b'x')\nsys.exit(9)"
    process = python(code, stdout=None, stderr=None, preexec_fn=lambda: [os.close(1), os.close(2)])
    assert process.wait(60) == 9
    assert (tmp_path / "data").read_text() == ""


# --- the commands themselves ------------------------------------------------------------------------------------

TRAIN = ["device=cpu", "model=alexnet_small", "data.image_size=64", "trainer.global_batch_size=8"]
TRAIN += [
    "data=synthetic",
    "data.num_train=64",
    "data.num_val=8",
    "data.num_classes=4",
    "run.name=s",
]
TRAIN += [
    "logger.tensorboard=false",
    "trainer.epochs=1000",
    "trainer.eval_every_epochs=1000",
    "logger.progress=false",
]
COMMANDS = {
    "train": ([sys.executable, "-m", "alexnet_ddp.train", *TRAIN], (75,)),
    "local.sh": ([str(PROJECT / "launch/local.sh"), *TRAIN], (75,)),
    "evaluate": (
        [sys.executable, "-m", "alexnet_ddp.evaluate", *TRAIN, "model.weights=none"],
        (75, 64),
    ),
    "plan": (
        [sys.executable, "-m", "alexnet_ddp.plan"],
        (128 + signal.SIGINT, 128 + signal.SIGTERM, 0),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_stop_signal_at_any_moment_prints_one_line_and_the_right_code(command, tmp_path, full):
    """Delays from the first line of the command on: Python itself prints a trace if SIGINT ends its own start.

    The delays are spread evenly, on a logarithmic scale, from 0.3 s to 9 s: 4 of them, with --full 20.
    """
    arguments, codes = COMMANDS[command]
    moments = random.Random(command)
    env = {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "PYTHON": sys.executable,
        "NPROC": "2",
        "WANDB_MODE": "disabled",
    }
    numbers = [signal.SIGINT, signal.SIGTERM] * (10 if full else 2)
    for k, number in enumerate(numbers):
        process = subprocess.Popen(
            arguments, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        delay = 0.3 * 30 ** ((k + moments.random()) / len(numbers))
        time.sleep(delay)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
        context = f"{command} {number.name} after {delay:.2f} s: {process.returncode}\n{errors}"
        assert process.returncode in codes, context
        assert "Traceback" not in errors, context
        lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        assert len(lines) <= 1 or process.returncode in (0, 64), context
        saved = list((tmp_path / "runs/s/checkpoints").glob("step-*"))
        assert ("and saved" in errors) <= bool(saved), context
        status = tmp_path / "runs/s/status.json"
        if status.exists() and command in ("train", "local.sh"):
            assert json.loads(status.read_text())["exit_code"] in (75, None), context
        deadline = time.monotonic() + 20
        while is_running(process.pid):
            assert time.monotonic() < deadline, context
            time.sleep(0.05)


def is_running(group: int) -> bool:
    """True if a process of the group is left."""
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def test_garbage_is_not_collected_during_the_imports_of_a_command_only():
    code = """
import gc, sys
sys.argv[1:] = ["images=x"]
from alexnet_ddp.runtime import startup
startup.begin("predict")
from alexnet_ddp import cli
during = gc.isenabled()
cli.run("predict", lambda cfg, overrides: print(during, gc.isenabled(), gc.get_freeze_count() > 0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False True True\n", done.stderr
