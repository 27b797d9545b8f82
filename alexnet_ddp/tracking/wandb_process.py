"""The helper process that sends a run to wandb. wandb_sink.py runs this file.

It imports nothing of this package. Arguments: a JSON file (see WandbSink) and the mode, online or
offline. Standard input: one line, {"code": exit code, "message": text}, when the run ends; end of
file without it means that the run was killed. Standard output: one JSON object per line,
{"say": text} for the user, {"directory": path} that `wandb sync` takes, or {"stop": true} if the
service asks the run to stop. Exit codes: 0; "not_online" and "unsent" of the JSON file.

What it sends it reads from the run's directory: metrics.jsonl, batch.png, checkpoints/,
wandb/classes.json and wandb/examples.json. If "folder" is given, it sends that folder instead.
"""

import contextlib
import fcntl
import json
import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

INIT_S = 5.0
FINISH_S = 60.0  # in which the server gets what remains when the run has ended
POLL_S = 0.5
UNLINK_S = 4.0
PROBE_S = 3.0  # a server that does not answer in this time is not waited for
LIMIT_S = 70.0  # this process exits at most so long after the run, even if wandb hangs
KILLED = 137  # 128 + SIGKILL, the exit code that a shell reports
PREEMPTED = 75
BEST = {"val/top1": max, "val/loss": min}
CLASS_COLUMNS: list[str | int] = [
    *("class", "images", "correct1", "correct5"),
    *("top1", "top1_low", "top1_high"),
]
MAX_MATRIX = 50  # classes of a confusion matrix that is drawn
MAX_CONFUSIONS = 1000  # rows of the table of confusions


class End(NamedTuple):
    """How the run ended."""

    code: int
    message: str


Ends = queue.Queue[End]
Mode = Literal["online", "offline"]
Send = Callable[[dict[str, Any]], None]


def main() -> None:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # Only the run handles them; this process ends when its standard input does.
        signal.signal(name, signal.SIG_IGN)
    stdout = os.dup(1)
    os.dup2(2, 1)  # output of libraries is written to the log
    spec = json.loads(Path(sys.argv[1]).read_bytes())
    end: Ends = queue.Queue()
    threading.Thread(target=listen, args=(end, spec), daemon=True).start()
    mode: Mode = "online" if sys.argv[2] == "online" else "offline"

    def send(message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the run has ended
            os.write(stdout, f"{json.dumps(message)}\n".encode())

    with after_earlier_start(Path(sys.argv[1]).with_name("helper.lock")):
        code = follow(spec, mode, end, send)
    os._exit(code)  # wandb's exit hook would wait for its service without a timeout


def follow(spec: dict[str, Any], mode: Mode, end: Ends, send: Send) -> int:
    """Send the run until it ends. Errors of wandb become one line each; return the exit code."""
    try:
        run = init(spec, mode, lambda: send({"stop": True}))
    except Exception as error:
        reason = one_line(error)
        if mode == "online":
            text = f"warning: wandb cannot connect ({reason}) and logs offline; {spec['upload']}"
            send({"say": text})
            return spec["not_online"]
        send({"say": f"warning: wandb cannot start ({reason}); the run continues without it"})
        return 0
    send({"directory": str(Path(run.dir).parent)})
    if mode == "online":
        send({"say": f"wandb: {run.url}"})
    try:
        if "folder" in spec:
            return log_folder(run, spec, end, send)
        return log_all(run, spec, end, send)
    except Exception as error:
        text = f"warning: wandb failed ({one_line(error)}); the run continues without it"
        send({"say": text})
    return 0


def init(spec: dict[str, Any], mode: Mode, on_stop: Callable[[], None]) -> Any:
    """Return a new or resumed wandb run. Raises what wandb raises.

    on_stop: called, in a thread, if the service asks the run to stop.
    """
    import wandb

    wanted = {
        "console": "off",
        "silent": True,
        "disable_code": True,
        "disable_git": True,  # it would copy the uncommitted changes; the commit is in the summary
        "init_timeout": INIT_S,
        "finish_timeout": FINISH_S + spec["upload_s"],
        "finish_timeout_raises": True,
        "program": spec["program"],
        "git_commit": spec["facts"].get("git_commit"),
        "x_stats_pid": spec["pid"],
        "x_stats_track_process_tree": True,  # all ranks of this machine
    }
    # A variable that the user sets counts before these, but not before stop_fn.
    settings = {name: value for name, value in wanted.items() if not is_in_environment(name)}
    settings["stop_fn"] = on_stop
    known = wandb.Settings.model_fields
    if "stop_fn" not in known:  # older versions of wandb send SIGINT to this process
        signal.signal(signal.SIGINT, lambda *_: on_stop())
    return wandb.init(
        dir=spec["dir"],
        mode=mode,
        config=spec["config"],
        settings=wandb.Settings(**{key: settings[key] for key in settings if key in known}),
        **spec["init"],
    )


def is_in_environment(setting: str) -> bool:
    """Whether the user sets it: x_stats_pid by WANDB__STATS_PID, which wandb also calls so."""
    names = {f"WANDB_{setting.upper()}", f"WANDB_{setting.removeprefix('x').upper()}"}
    return not names.isdisjoint(os.environ)


def log_all(run: Any, spec: dict[str, Any], end: Ends, send: Send) -> int:
    """Send everything until the run ends; return the exit code.

    wandb ignores rows with steps that an earlier, killed start has sent.
    """
    define_metrics(run, spec["is_sweep"])
    run.summary.update(spec["facts"])
    picture = Picture(run, spec)
    classes, examples = Classes(run, spec), Examples(run, spec)
    checkpoints = Checkpoints(run, spec, send)
    with Path(spec["run_dir"], "metrics.jsonl").open("rb") as file:
        log_missing(run, file, spec["offset"])
        best = Best(run, file, spec["offset"])
        ended = None
        while ended is None:
            ended = poll_end(end)
            picture.poll()  # at step 0, so before the rows
            for row in new_rows(file):
                run.log(row, step=row["step"])
                best.update(row)
            classes.poll()
            examples.poll()
            checkpoints.poll()
    report_end(run, spec, ended, best.values)
    code = finish(run, spec, ended.code, send)
    checkpoints.close()
    return code


def log_missing(run: Any, file: BinaryIO, offset: int) -> None:
    """Send the rows of earlier starts that the server does not have, and rewind `file`.

    `wandb sync` sends those of an earlier start that was offline.
    """
    first = run.step
    if not run.offline and not list(Path(run.dir).parents[1].glob(f"offline-run-*-{run.id}")):
        for row in new_rows(file, offset):
            if row["step"] >= first:
                run.log(row, step=row["step"])
    file.seek(0)


def log_folder(run: Any, spec: dict[str, Any], end: Ends, send: Send) -> int:
    """Upload spec["folder"] as a version of the artifact export-ID. The run keeps its exit code."""
    import wandb

    artifact = wandb.Artifact(f"export-{run.id}", type="model", metadata=spec["metadata"])
    # A copy, because the user may move the folder during the upload.
    artifact.add_dir(spec["folder"], skip_cache=True, policy="mutable")
    run.log_artifact(artifact, aliases=spec["aliases"])
    end.get()
    return finish(run, spec, spec["exit_code"], send)


def finish(run: Any, spec: dict[str, Any], exit_code: int, send: Send) -> int:
    """Wait until the server has everything, at most FINISH_S; return the exit code.

    If the server does not answer, exit with "not_online".
    """

    def exit_if_unreachable() -> None:
        time.sleep(PROBE_S)
        if not answers(run.settings.base_url):
            text = "warning: wandb's server does not answer and did not get everything"
            send({"say": f"{text}; {spec['upload']}"})
            os._exit(spec["not_online"])

    if not run.offline:
        threading.Thread(target=exit_if_unreachable, daemon=True).start()
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        return spec["unsent"]
    return 0


def answers(url: str) -> bool:
    """Whether the server answers in PROBE_S, and not with an error of its own."""
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except urllib.error.URLError as error:  # wandb may know a certificate that Python does not
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def after_earlier_start(lock: Path) -> Iterator[None]:
    """Wait until the helper process of an earlier start has ended, which would overwrite rows.

    Without effect on a file system without locks. The training does not wait.
    """
    with lock.open("ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def define_metrics(run: Any, is_sweep: bool) -> None:
    """Plot against the step, and summarise accuracy and loss by their best value.

    A summary of "max" is an object, and the optimizers of sweeps read the metric as a number: in a
    sweep the summary is the last value. best/val/top1 and best/val/loss are always in the summary.
    """
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if is_sweep:
        return
    for name, choose in BEST.items():
        run.define_metric(name, step_metric="step", summary=choose.__name__)


class Best:
    """Keeps best/val/top1 and best/val/loss in the summary, over all starts of the run."""

    def __init__(self, run: Any, file: BinaryIO, offset: int) -> None:
        """Read the rows of earlier starts, and leave `file` at `offset`, the first new row."""
        self._run = run
        self.values: dict[str, float] = {}
        for row in new_rows(file, offset):
            note_best(self.values, row)
        file.seek(offset)

    def update(self, row: dict[str, Any]) -> None:
        """Note a row, and write the summary if it is the best so far."""
        before = dict(self.values)
        note_best(self.values, row)
        if self.values != before:
            self._run.summary.update(self.values)


def note_best(best: dict[str, float], row: Mapping[str, Any]) -> None:
    """Update best/val/top1 and best/val/loss with a row. Only finite values count."""
    for name, choose in BEST.items():
        value = float(row.get(name, math.nan))
        if math.isfinite(value):
            key = f"best/{name}"
            best[key] = choose(best.get(key, value), value)


class Picture:
    """Sends the picture of the first batch of a new run, once it is written."""

    def __init__(self, run: Any, spec: dict[str, Any]) -> None:
        self._run = run
        self._path = Path(spec["run_dir"], "batch.png")
        self._is_due = spec["offset"] == 0  # a new run

    def poll(self) -> None:
        if self._is_due and self._path.exists():
            import wandb

            self._is_due = False
            self._run.log({"batch": wandb.Image(str(self._path))}, step=0)


class Classes:
    """Sends the results by class of the last evaluation: see WandbSink.classes."""

    def __init__(self, run: Any, spec: dict[str, Any]) -> None:
        self._run = run
        self._path = Path(spec["run_dir"], "wandb/classes.json")

    def poll(self) -> None:
        if not self._path.exists():
            return
        found = json.loads(self._path.read_bytes())
        self._path.unlink()
        import wandb

        names = found["names"]
        logged: dict[str, Any] = {
            "val/classes": wandb.Table(
                columns=CLASS_COLUMNS,
                data=[
                    [name, *counts, 100 * counts[1] / counts[0] if counts[0] else None, *interval]
                    for name, counts, interval in zip(
                        names, found["per_class"], found["top1_intervals"]
                    )
                ],
            )
        }
        counts = [
            [names[label], names[found_class], images]
            for label, found_class, images in found["confusions"]
        ]
        wrong = sorted((one for one in counts if one[0] != one[1]), key=lambda one: -one[2])
        if wrong:
            columns: list[str | int] = ["label", "prediction", "images"]
            logged["val/confusions"] = wandb.Table(columns=columns, data=wrong[:MAX_CONFUSIONS])
        if counts and len(names) <= MAX_MATRIX:
            logged["val/confusion_matrix"] = confusion_matrix(counts, names)
        self._run.log(logged, step=found["step"])


class Examples:
    """Sends the images with the largest losses: see WandbSink.examples."""

    def __init__(self, run: Any, spec: dict[str, Any]) -> None:
        self._run = run
        self._path = Path(spec["run_dir"], "wandb/examples.json")

    def poll(self) -> None:
        if not self._path.exists():
            return
        found = json.loads(self._path.read_bytes())
        self._path.unlink()
        import wandb

        images = [wandb.Image(one["file"], caption=one["caption"]) for one in found["images"]]
        self._run.log({"val/largest_losses": images}, step=found["step"])


def confusion_matrix(counts: list[list[Any]], names: list[str]) -> Any:
    """The chart of wandb.plot.confusion_matrix, which takes images and not counts."""
    import wandb

    found = {(label, prediction): images for label, prediction, images in counts}
    columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
    data = [[row, column, found.get((row, column), 0)] for row in names for column in names]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=columns, data=data),
        fields={str(column): column for column in columns},
        string_fields={"title": "validation images"},
    )


class Checkpoints:
    """Uploads checkpoints as versions of the artifact model-ID.

    An offline run keeps the files in wandb/artifacts, from which `wandb sync` uploads them.
    """

    def __init__(self, run: Any, spec: dict[str, Any], send: Send) -> None:
        self._run = run
        self._send = send
        self._which = spec["artifacts"]
        self._folder = Path(spec["run_dir"], "checkpoints")
        self._links = Path(spec["run_dir"], "wandb/artifacts")
        self._seen: set[str] = set()
        self._threads: list[threading.Thread] = []

    def poll(self) -> None:
        """Upload the checkpoints that are new: all of them, or those that were the best so far."""
        if self._which == "none":
            return
        # A checkpoint gets its final name when it is complete.
        for path in sorted(self._folder.glob("step-????????")):
            if path.name not in self._seen:
                self._seen.add(path.name)
                try:
                    self._upload(path)
                except Exception as error:
                    self._which = "none"
                    text = f"warning: wandb takes no checkpoints ({one_line(error)})"
                    self._send({"say": f"{text}; the run continues without their upload"})
                    return

    def _upload(self, path: Path) -> None:
        try:
            state = json.loads((path / "state.json").read_bytes())
            is_best = state["best"].get("step") == state["step"]
            if self._which == "best" and not is_best:
                return
            files = self._link(path)
        except FileNotFoundError:  # it is old, and was deleted in this moment
            return
        import wandb

        metadata = {"step": state["step"], **(state["best"] if is_best else {})}
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model", metadata=metadata)
        artifact.add_dir(str(files), skip_cache=True, policy="immutable")
        aliases = ["latest", f"step-{state['step']}"] + ["best"] * is_best
        logged = self._run.log_artifact(artifact, aliases=aliases)
        if not self._run.offline:
            thread = threading.Thread(target=self._finish, args=(logged, files), daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Call it when the run is finished, which waits for the uploads: remove the last links."""
        for thread in self._threads:
            thread.join(UNLINK_S)

    def _link(self, path: Path) -> Path:
        """Hard links to the files, because the run may delete a checkpoint during its upload."""
        files = self._links / path.name
        shutil.rmtree(files, ignore_errors=True)  # of an earlier start
        shutil.copytree(path, files, copy_function=link_or_copy)
        return files

    def _finish(self, artifact: Any, files: Path) -> None:
        """Wait for the upload, and remove the links."""
        try:
            artifact.wait()
        except Exception as error:
            text = f"warning: wandb did not upload {files.name} ({one_line(error)})"
            self._send({"say": f"{text}; the run continues"})
        shutil.rmtree(files, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def report_end(run: Any, spec: dict[str, Any], end: End, best: dict[str, float]) -> None:
    """Alert if the run is complete, or if it failed and nothing starts it again."""
    is_restarted = end.code not in spec["final_codes"] and not spec["is_last_start"]
    if end.code == 0 and not spec["is_sweep"]:  # a sweep would alert at each of its runs
        text = ", ".join(f"{name} {value:.4g}" for name, value in best.items())
        alert(run, spec, "is complete", text or "no evaluation", "INFO")
    elif end.code == PREEMPTED and not spec["is_sweep"]:
        # In a sweep another agent would get it, but the agent stops a run that the sweep ends, too.
        run.mark_preempting()
    elif end.code not in spec["quiet_codes"] and not is_restarted:
        what = "diverged" if end.code == spec["diverged"] else "failed"
        text = end.message or f"its process ended with code {end.code}"
        alert(run, spec, f"{what}, and nothing restarts it", text, "ERROR")


def alert(run: Any, spec: dict[str, Any], what: str, text: str, level: str) -> None:
    """Send an alert. wandb takes titles of less than 64 characters."""
    name = spec["name"]
    room = 63 - len(what) - 1
    short = name if len(name) <= room else f"{name[: room - 3]}..."
    run.alert(title=f"{short} {what}", text=text, level=level)


def new_rows(file: BinaryIO, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the complete rows since the last call. "nan" and the infinities become floats.

    limit: the position in the file after which no row is read.
    """
    while limit is None or file.tell() < limit:
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        row = json.loads(line)
        yield {
            name: float(value) if value in ("nan", "inf", "-inf") else value
            for name, value in row.items()
        }


def listen(end: Ends, spec: dict[str, Any]) -> None:
    """Wait for the end of the run, then exit after LIMIT_S at the latest.

    spec["upload_s"] is added to it if the run is complete.
    """
    line = sys.stdin.buffer.readline().strip()
    ended = End(**json.loads(line)) if line else End(KILLED, "it was killed")
    limit_s = LIMIT_S if ended.code else LIMIT_S + spec["upload_s"]
    threading.Timer(limit_s, os._exit, (spec["unsent"],)).start()
    end.put(ended)


def poll_end(end: Ends) -> End | None:
    """Wait up to POLL_S for the end of the run; None if it has not ended."""
    try:
        return end.get(timeout=POLL_S)
    except queue.Empty:
        return None


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    main()
