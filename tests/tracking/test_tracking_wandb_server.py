"""What a local server receives of real runs: options, summary, classes, artifacts, alerts, stop button, sweep agent."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from alexnet_ddp.config.schema import ROOTS, options
from tests.drills.wandb_server import ReceivedRun, WandbServer
from tests.network import QUICK, WAITING
from tests.ranks import run_command, started
from tests.tracking.test_tracking import start_program

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wandb")]

PROJECT = Path(__file__).parents[2]
SMALL = ["data=folder", "data.image_size=64", "trainer.log_every_steps=1", "trainer.epochs=9999"]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


def environment(server: WandbServer, folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    own = {"PYTHONPATH": str(PROJECT), "XDG_CACHE_HOME": str(folder / "cache")}
    return {**kept, **own, "NETRC": "/dev/null", "HOME": str(folder), **server.env}


def until(is_true: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def documented_sweep() -> dict:
    """The sweep.yaml of docs/tracking.md."""
    page = (PROJECT / "docs/tracking.md").read_text()
    return yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])


def only_run(server: WandbServer) -> tuple[str, ReceivedRun]:
    ((run_id, run),) = server.runs.items()
    return run_id, run


def memory_mb(run: ReceivedRun) -> list[float]:
    """The memory of the run's process tree, at each time it was measured."""
    name = "system.proc.memory.rssMB"
    return [sample[name] for sample in run.system if name in sample]


def test_a_complete_run_of_two_ranks(server, image_folder, tmp_path):
    options = ["logger.wandb_tags=[a,b c]", "logger.wandb_group=mine", "logger.wandb_artifacts=all"]
    arguments = [*SMALL, *QUICK, f"data.root={image_folder}", "run.name=x", "trainer.max_steps=4"]
    arguments += [*options, "logger.wandb=online", "trainer.eval_every_steps=2"]
    env = environment(server, tmp_path) | {
        "WANDB_PROJECT": "of-the-variable",
        "WANDB_RUN_GROUP": "not-mine",
        "WANDB_NOTES": "a note",
        "WANDB_JOB_TYPE": "train",
        "WANDB_NAME": "shown",
    }
    with started("alexnet_ddp.train", arguments, 2, tmp_path, env) as command:
        assert command.wait(180) == 0, command.said()
        run_dir = tmp_path / "runs/x"
        run_id, run = only_run(server)
        until(lambda: run.exit_codes, 30, "the end of the run in wandb")
        said = command.said()
    assert "warning: wandb" not in said, said
    assert run_id == (run_dir / "wandb_id.txt").read_text().strip()
    _check_start(run)
    _check_numbers(run, run_dir)
    _check_classes(run, run_id, server)
    _check_artifacts(run, run_id, run_dir, server)
    assert run.exit_codes == [0]
    assert [(one["title"], one["severity"]) for one in run.alerts] == [("x is complete", "INFO")]
    _check_export(run, run_id, tmp_path, env, server)


def _check_start(run: ReceivedRun) -> None:
    """The option counts before the variable, the variable before the default; the configuration is nested."""
    first = run.started[0]
    assert (first["project"], first["groupName"]) == ("of-the-variable", "mine")
    assert (first["displayName"], first["notes"], first["jobType"]) == ("shown", "a note", "train")
    assert first["tags"] == ["a", "b c"]
    assert run.config["trainer"]["max_steps"] == 4
    assert run.config["optimizer"]["lr"] > 0


def _check_numbers(run: ReceivedRun, run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        received = run.history[row["step"]]
        assert (
            row.items() - {("time_s", row["time_s"]), ("epoch", row["epoch"])} <= received.items()
        )
    top1 = [row["val/top1"] for row in rows if "val/top1" in row]
    loss = [row["val/loss"] for row in rows if "val/loss" in row]
    assert len(top1) == 2
    summary = run.summary
    assert summary["best/val/top1"] == summary["val/top1"]["max"] == max(top1)
    assert summary["best/val/loss"] == summary["val/loss"]["min"] == min(loss)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True
    )
    assert summary["git_commit"] == run.started[0]["commit"] == commit.stdout.strip()
    assert summary["version_torch"] == metadata.version("torch")
    assert (summary["world_size"], summary["num_parameters"]) == (2, 619_205)


def _check_classes(run: ReceivedRun, run_id: str, server: WandbServer) -> None:
    logged = run.history[4]
    assert logged["val/classes"]["nrows"] == 5
    table = json.loads(server.uploads[f"{run_id}/{logged['val/classes']['path']}"])
    columns = ["class", "images", "correct1", "correct5", "top1", "top1_low", "top1_high"]
    assert table["columns"] == columns
    assert all(row[5] <= row[4] <= row[6] for row in table["data"])
    assert sum(row[2] for row in table["data"]) == logged["val/correct1"]
    assert sum(row[1] for row in table["data"]) == logged["val/num_images"]
    matrix = json.loads(server.uploads[f"{run_id}/{logged['val/confusion_matrix_table']['path']}"])
    assert len(matrix["data"]) == 25
    assert sum(row[2] for row in matrix["data"]) == logged["val/num_images"]
    assert sum(row[2] for row in matrix["data"] if row[0] == row[1]) == logged["val/correct1"]
    worst = logged["val/largest_losses"]
    assert (worst["_type"], worst["count"]) == ("images/separated", 16)
    assert worst["captions"][0].startswith("loss ")
    assert all(f"{run_id}/{file}" in server.uploads for file in worst["filenames"])
    assert run.history[0]["batch"]["_type"] == "image-file"
    assert f"{run_id}/{run.history[0]['batch']['path']}" in server.uploads


def _check_artifacts(run: ReceivedRun, run_id: str, run_dir: Path, server: WandbServer) -> None:
    models = [one for one in run.artifacts if one["artifactTypeName"] == "model"]
    assert {one["artifactCollectionName"] for one in models} == {f"model-{run_id}"}
    aliases = [{alias["alias"] for alias in one["aliases"]} for one in models]
    best = [json.loads((run_dir / "best.json").read_text())["step"]]
    assert aliases[0] == {"latest", "step-2", "best"}
    assert aliases[1] == {"latest", "step-4"} | ({"best"} if best == [4] else set())
    weights = (run_dir / "checkpoints/step-00000004/model.safetensors").read_bytes()
    assert weights in server.uploads.values()
    until(lambda: not list((run_dir / "wandb/artifacts").iterdir()), 10, "the end of the links")


def _check_export(
    run: ReceivedRun, run_id: str, folder: Path, env: dict[str, str], server: WandbServer
) -> None:
    """export sends the folder to the same run, which stays complete."""
    options = [*QUICK[:1], "run.name=x", "format=safetensors", "output=exported"]
    done = run_command("alexnet_ddp.export", options, 0, folder, env)
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout
    assert [*server.runs] == [run_id]
    until(lambda: len(run.exit_codes) == 2, 30, "the end of the export in wandb")
    assert run.exit_codes == [0, 0]
    assert len(run.alerts) == 1
    (sent,) = (one for one in run.artifacts if one["artifactCollectionName"].startswith("export"))
    assert sent["artifactCollectionName"] == f"export-{run_id}"
    assert {alias["alias"] for alias in sent["aliases"]} == {"latest", "safetensors"}
    metadata, metrics = (
        json.loads(text)
        for text in (sent["metadata"], (folder / "exported/metrics.json").read_text())
    )
    assert metadata["top1"] == metrics["top1"]
    weights = (folder / "exported/model.safetensors").read_bytes()
    assert weights in server.uploads.values()


ROWS = """
    t = start(sys.argv[1], "online", int(sys.argv[2]))
    first = int(sys.argv[2]) + 1
    for step in range(first, first + 30):
        t.log(step, step / 10, {"train/loss": 1 / step})
        t.log(step, step / 10, {"val/top1": 50.0 + step})
    print("ready", flush=True)
    sys.stdin.readline()
    t.close(int(sys.argv[3]))
"""


def rows_of(
    server: WandbServer,
    folder: Path,
    first: int,
    code: int,
    mode: str = "work",
    latency_s: float = 0,
    variables: dict[str, str] | None = None,
) -> str:
    """Log 30 rows, and end with `code` when the server has the mode and the latency. The output."""
    num_runs = server.num_runs
    program = start_program(
        *(ROWS, folder / "run", first, code),
        env=environment(server, folder) | (variables or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    until(lambda: server.num_runs > num_runs, 60, "the start of the run in wandb")
    server.latency_s = latency_s
    server.become(mode)
    said = program.communicate("\n", timeout=120)[0]
    assert program.returncode == 0, said
    return said


def test_a_complete_run_waits_until_a_slow_server_has_everything(server, tmp_path):
    """2 s per request need more than the 4 s that a helper once had for all that remained."""
    said = rows_of(server, tmp_path, 0, 0, latency_s=2.0)
    _, run = only_run(server)
    assert "waiting until the server has everything" in said
    assert "warning" not in said
    assert sorted(run.history) == list(range(1, 31))
    assert run.exit_codes == [0]
    assert len(run.alerts) == 1


@pytest.mark.parametrize(
    ("mode", "latency_s", "words"),
    [
        ("hang", 0, "does not answer and did not get everything"),
        ("500", 0, "does not answer and did not get everything"),
        ("work", 2.0, "did not get everything in time"),
    ],
)
def test_what_a_lost_server_did_not_get_is_sent_by_the_command_of_the_warning(
    server, tmp_path, mode, latency_s, words
):
    limit = {"WANDB_FINISH_TIMEOUT": "2"} if latency_s else {}  # in place of a minute
    said = rows_of(server, tmp_path, 0, 0, mode, latency_s, limit)
    (warning,) = [line for line in said.splitlines() if "warning" in line]
    _, run = only_run(server)
    assert run.exit_codes == []
    server.latency_s = 0.0
    server.become("work")
    command = re.fullmatch(rf"warning: wandb's server {words}; upload with: wandb (.*)", warning)
    subprocess.run(
        f"{sys.executable} -m wandb {command[1]}",  # with the shell's *
        shell=True,
        cwd=tmp_path,
        env=environment(server, tmp_path),
        check=True,
        timeout=120,
    )
    assert sorted(run.history) == list(range(1, 31))
    assert [row["val/top1"] for _, row in sorted(run.history.items())] == [
        50.0 + step for step in range(1, 31)
    ]
    assert 0 in run.exit_codes


def test_the_next_start_sends_the_rows_that_were_lost_with_a_machine(server, tmp_path):
    env = environment(server, tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    program = start_program(ROWS, tmp_path / "run", 0, 0, env=env, **pipes)
    until(lambda: server.num_runs, 60, "the start of the run in wandb")
    server.become("hang")
    while b"ready" not in (line := program.stdout.readline()):
        assert line, "the program ended"
    helper = int(subprocess.check_output(["pgrep", "-P", str(program.pid), "-f", "wandb_process"]))
    for process in (helper, program.pid):
        os.kill(process, signal.SIGKILL)
    program.communicate()
    server.become("work")
    rows_of(server, tmp_path, 30, 0)
    _, run = only_run(server)
    assert sorted(run.history) == list(range(1, 61))
    assert run.exit_codes == [0]


def test_a_stop_signal_ends_the_wait_for_a_slow_server_and_not_the_run(
    server, image_folder, tmp_path
):
    arguments = [*SMALL, *QUICK, f"data.root={image_folder}", "run.name=x", "trainer.max_steps=4"]
    env = environment(server, tmp_path)
    arguments += ["logger.wandb=online"]
    with started("alexnet_ddp.train", arguments, 0, tmp_path, env) as command:
        until(lambda: server.num_runs, 90, "the start of the run in wandb")
        server.latency_s = 30.0
        until(lambda: "waiting until the server" in command.said(), 60, "the wait at the end")
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 0, command.said()
        said = command.said()
    assert "wandb's server did not get everything in time; upload with: wandb sync" in said
    assert list(tmp_path.glob("runs/x/wandb/offline-run-*/*.wandb"))
    assert status(tmp_path / "runs/x")["state"] == "complete"


CRASHING = """
import os
from alexnet_ddp import register_model
from tests.network import Quick
@register_model("crashing")
class Crashing(Quick):
    num_steps = 0
    def forward(self, images):
        self.num_steps += self.training
        if self.num_steps == 2:  # before the first checkpoint
            os._exit(9)
        return super().forward(images)
"""


def test_the_helper_of_a_run_that_crashes_under_launch_sends_its_end(
    server, image_folder, tmp_path
):
    """launch/ ends what a crashed start leaves behind, but not the process that still sends rows."""
    (tmp_path / "crashing.py").write_text(CRASHING)
    options = ["plugins=[crashing]", "model=plugin", "model.name=crashing", "run.name=x"]
    options += [*SMALL, f"data.root={image_folder}", "logger.wandb=online", "device=cpu"]
    env = environment(server, tmp_path) | {"NPROC": "1", "RESTART_DELAY": "0"}
    env |= {"PYTHON": sys.executable, "PYTHONPATH": f"{PROJECT}:{tmp_path}"}
    server.latency_s = 0.3
    done = subprocess.run(
        [PROJECT / "launch/local.sh", *options],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 93, done.stdout + done.stderr
    _, run = only_run(server)
    until(lambda: len(run.exit_codes) == 4, 60, "the end of all four starts in wandb")
    assert run.exit_codes == [137] * 4
    assert [one["title"] for one in run.alerts] == ["x failed, and nothing restarts it"]
    rows = (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in rows} <= set(run.history)


def test_a_killed_run_keeps_its_id_and_the_stop_button_ends_it_for_good(
    server, image_folder, tmp_path
):
    arguments = [*SMALL, *WAITING, f"data.root={image_folder}", "run.name=x", "logger.wandb=online"]
    arguments += ["trainer.eval_every_epochs=99", "checkpoint.save_every_steps=5"]
    env = environment(server, tmp_path) | {"WANDB__STATS_SAMPLING_INTERVAL": "1"}
    run_dir = tmp_path / "runs/x"
    with started("alexnet_ddp.train", arguments, 0, tmp_path, env) as command:
        until(lambda: any(run.history for run in server.runs.values()), 60, "a row in wandb")
        until(lambda: list(run_dir.glob("checkpoints/step-*")), 60, "a checkpoint")
        until(lambda: memory_mb(only_run(server)[1]), 60, "the memory of one rank in wandb")
        of_one_rank = max(memory_mb(only_run(server)[1]))
        command.send_signal(signal.SIGKILL)
    run_id, run = only_run(server)
    until(lambda: run.exit_codes, 30, "the end of the killed run in wandb")
    with started("alexnet_ddp.train", arguments, 2, tmp_path, env) as command:
        until(lambda: max(memory_mb(run)) > 1.5 * of_one_rank, 90, "the memory of both ranks")
        server.stopped.add(run_id)
        command.wait(120)
        said = command.said()
    assert f"stopped at step {status(run_dir)['step']} of " in said
    assert "and saved, as wandb asked" in said
    assert (status(run_dir)["state"], status(run_dir)["exit_code"]) == ("stopped", 79)
    newest = max(run_dir.glob("checkpoints/step-*"))
    assert newest.name == f"step-{status(run_dir)['step']:08d}"
    assert [*server.runs] == [run_id]
    until(lambda: len(run.exit_codes) == 2, 30, "the end of the stopped run in wandb")
    assert run.exit_codes == [137, 79]
    titles = [one["title"] for one in run.alerts]
    assert titles == ["x failed, and nothing restarts it"]  # of the killed one


def test_the_sweep_agent_starts_a_run_and_stops_it(server, image_folder, tmp_path):
    """wandb's own agent, with the command of docs/tracking.md. The early termination of hyperband is its command "stop"."""
    given = {"optimizer.lr": 0.03, "trainer.ema_decay": None, "trainer.drop_last": True}
    trial = {"type": "run", "run_id": "trial1", "program": "unused"}
    trial["args"] = {key: {"value": value} for key, value in given.items()}
    fixed = [*SMALL, *WAITING, f"data.root={image_folder}", "trainer.eval_every_epochs=99"]
    sweep = documented_sweep()
    assert set(sweep["parameters"]) <= set(options(ROOTS["train"]))
    server.sweep_config = yaml.safe_dump(sweep | {"command": sweep["command"] + fixed})
    server.commands = [[trial]]
    env = environment(server, tmp_path)
    env |= {"WANDB_AGENT_MAX_INITIAL_FAILURES": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # the agent starts `python`
    agent = subprocess.Popen(
        [sys.executable, "-m", "wandb", "agent", "--count", "1", "us/p/sweep1"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        run_dir = tmp_path / "runs/sweep1-trial1"
        until(lambda: "trial1" in server.runs and server.runs["trial1"].history, 120, "a row")
        server.commands.append([{"type": "stop", "run_id": "trial1"}])
        said = agent.communicate(timeout=90)[0]
    finally:
        agent.kill()
    run = server.runs["trial1"]
    assert [*server.runs] == ["trial1"], said
    assert run.started[0]["sweep"] == "sweep1"
    assert (run.started[0]["project"], run.started[0]["entity"]) == ("p", "us")
    assert run.config["optimizer"]["lr"] == 0.03
    assert run.config["trainer"]["ema_decay"] is None
    assert run.config["trainer"]["drop_last"] is True
    assert (status(run_dir)["state"], status(run_dir)["exit_code"]) == ("preempted", 75)
    assert list(run_dir.glob("checkpoints/step-*"))
    assert "failed runs" not in said  # the agent ends after a failure: see the variable above
    assert not run.alerts
    assert not run.preempting
