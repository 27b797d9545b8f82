"""The helper process that sends metrics.jsonl to wandb. wandb_sink.py runs this file.

It imports nothing of this package. Arguments: a JSON file (run_dir, id, pid, offset, project, name,
config, program, upload, not_online) and the mode, online or offline. Standard input: one line, the
exit code of the run; end of file without it means that the run was killed. Standard output: lines
for the user.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

INIT_S = 5.0
FINISH_S = 4.0
POLL_S = 0.5
LIMIT_S = 12.0  # this process exits at most so long after the run, even if wandb hangs
KILLED = 137  # 128 + SIGKILL, the exit code that a shell reports

End = queue.Queue[int]
Mode = Literal["online", "offline"]


def main() -> None:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # Only the run handles them; this process ends when its standard input does.
        signal.signal(name, signal.SIG_IGN)
    stdout = os.dup(1)
    os.dup2(2, 1)  # output of libraries is written to the log
    spec = json.loads(Path(sys.argv[1]).read_bytes())
    end: End = queue.Queue()
    threading.Thread(target=listen, args=(end,), daemon=True).start()
    mode: Mode = "online" if sys.argv[2] == "online" else "offline"
    code = follow(spec, mode, end, lambda text: os.write(stdout, f"{text}\n".encode()))
    os._exit(code)  # wandb's exit hook would wait for its service without a timeout


def follow(spec: dict[str, Any], mode: Mode, end: End, say: Callable[[str], object]) -> int:
    """Send rows until the run ends. Errors of wandb become one line each; return the exit code."""
    try:
        run = init(spec, mode)
    except Exception as error:
        if mode == "online":
            say(
                f"warning: wandb cannot connect ({one_line(error)}) and logs offline; "
                f"{spec['upload']}"
            )
            return spec["not_online"]
        say(f"warning: wandb cannot start ({one_line(error)}); the run continues without it")
        return 0
    if mode == "online":
        say(f"wandb: {run.url}")
    try:
        log_all(run, spec, end)
    except Exception as error:
        say(f"warning: wandb failed ({one_line(error)}); the run continues without it")
    return 0


def init(spec: dict[str, Any], mode: Mode) -> Any:
    """Return a new or resumed wandb run. Raises what wandb raises."""
    import wandb

    wanted = {
        "console": "off",
        "silent": True,
        "disable_code": True,
        "disable_git": True,  # it would copy the uncommitted changes; the commit is in run.json
        "init_timeout": INIT_S,
        "finish_timeout": FINISH_S,
        "program": spec["program"],
        "x_stats_pid": spec["pid"],
        "stop_fn": lambda: None,  # the default sends SIGINT
    }
    settings = wandb.Settings(
        **{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    )
    names = {name: spec[name] for name in ("id", "project", "name", "config")}
    return wandb.init(dir=spec["run_dir"], mode=mode, resume="allow", settings=settings, **names)


def log_all(run: Any, spec: dict[str, Any], end: End) -> None:
    """Send rows until the run ends. wandb ignores steps that an earlier, killed start has sent."""
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    with Path(spec["run_dir"], "metrics.jsonl").open("rb") as file:
        file.seek(spec["offset"])
        exit_code = None
        shows_batch = spec["offset"] == 0  # a new run
        while exit_code is None:
            exit_code = poll_exit_code(end)
            shows_batch = shows_batch and not log_batch(run, spec)
            for row in new_rows(file):
                run.log(row, step=row["step"])
    run.finish(exit_code=exit_code)


def log_batch(run: Any, spec: dict[str, Any]) -> bool:
    """Send the picture of the first batch. Return False if it is not written yet."""
    picture = Path(spec["run_dir"], "batch.png")
    if not picture.exists():
        return False
    import wandb

    run.log({"batch": wandb.Image(str(picture))}, step=0)
    return True


def new_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the complete rows since the last call. "nan" and the infinities become floats."""
    for line in iter(file.readline, b""):
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        row = json.loads(line)
        yield {
            name: float(value) if value in ("nan", "inf", "-inf") else value
            for name, value in row.items()
        }


def listen(end: End) -> None:
    """Wait for the run's exit code, then exit after LIMIT_S at the latest."""
    line = sys.stdin.buffer.readline().strip()
    threading.Timer(LIMIT_S, os._exit, (1,)).start()
    end.put(int(line) if line else KILLED)


def poll_exit_code(end: End) -> int | None:
    """Wait up to POLL_S for the run's exit code; None if the run has not ended."""
    try:
        return end.get(timeout=POLL_S)
    except queue.Empty:
        return None


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    main()
