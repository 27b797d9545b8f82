"""The wandb helper process: with the real wandb offline, and with a fake one that fails in many ways."""

import json
import signal
import struct
import subprocess
import time

import pytest

from alexnet_ddp.config import Wandb
from alexnet_ddp.tracking import wandb_sink
from tests.tracking.test_tracking import rows, start_program, tracker

# One pytest worker runs these tests: the fixtures start real wandb processes, which takes 20 s.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wandb")]  # real wandb processes take 40 s

FAKE_WANDB = """
import os, sys, time, types
class Settings(types.SimpleNamespace):
    model_fields = {"x_stats_pid": 0, "x_stats_track_process_tree": 0}
class Run:
    url, id, offline, summary, step = "https://wandb.test/run", "1", False, {}, 0
    dir, resumed, settings = "/wandb/run-1/files", False, types.SimpleNamespace(base_url="http://127.0.0.1:9")
    def define_metric(self, *a, **k): step("define")
    def log(self, *a, **k): step("log")
    def finish(self, **k): step("finish")
    def alert(self, **k): step("alert")
def step(name):
    if os.environ["FAKE"] == name: raise ValueError("fake\\nerror in " + name)
    if os.environ["FAKE"] == "hang-" + name: time.sleep(60)
    if os.environ["FAKE"] == "die-" + name: os._exit(5)
def init(**k):
    print("settings", sorted(vars(k["settings"])), file=sys.stderr)
    step("init"); step("init-" + k["mode"])
    return Run()
"""


def wandb_records(file):
    """The records of an offline run: LevelDB's log format, a protocol buffer each."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, body = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        body += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield Record.FromString(body)
            body = b""


def wandb_run(file):
    records = list(wandb_records(file))
    history = [
        {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.history.item
    ]
    return {
        "ids": {r.run.run_id for r in records if r.HasField("run")},
        "resume": [r.run.resumed for r in records if r.HasField("run")],
        "metrics": {
            r.metric.glob_name or r.metric.name: r.metric.step_metric
            for r in records
            if r.HasField("metric")
        },
        "history": history,
        "exit": [r.exit.exit_code for r in records if r.HasField("exit")],
    }


@pytest.fixture(scope="module")
def resumed_offline(tmp_path_factory):
    """A run that is killed after step 40 with a checkpoint at 30, and resumes from it to 60."""
    run_dir = tmp_path_factory.mktemp("wandb")
    body = """
        t = start(sys.argv[1], "offline", int(sys.argv[2]))
        for step in range(int(sys.argv[2]) + 10, int(sys.argv[3]) + 1, 10):
            t.log(step, step / 10, {"train/loss": float("nan") if step == 20 else 1 / step, "data/index_hash": "ab"})
            t.log(step, step / 10, {"val/top1": 50.0 + step})
        assert "wandb" not in sys.modules
        print("ready", flush=True)
        time.sleep(float(sys.argv[4]))
        t.close(0)
    """
    first = start_program(
        body, run_dir, 0, 40, 60, stdout=subprocess.PIPE, env={"MY_SECRET": "CANARY"}
    )
    while b"ready" not in (line := first.stdout.readline()):
        assert line, "the program ended"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    deadline = time.monotonic() + 15
    while not any(
        wandb_run(file)["exit"] for file in run_dir.glob("wandb/offline-run-*/run-*.wandb")
    ):
        assert time.monotonic() < deadline, (run_dir / "wandb/helper.log").read_text()
        time.sleep(0.1)
    time.sleep(1)  # names of offline runs are second-wise
    second = start_program(body, run_dir, 30, 60, 0, stdout=subprocess.PIPE)
    output = second.communicate(timeout=30)[0].decode()
    assert second.returncode == 0, output
    return (
        run_dir,
        output,
        [wandb_run(file) for file in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))],
    )


def test_a_resumed_run_keeps_its_wandb_id(resumed_offline):
    run_dir, output, (first, second) = resumed_offline
    assert first["ids"] == second["ids"] == {(run_dir / "wandb_id.txt").read_text().strip()}
    assert f"wandb: offline; upload with: wandb sync {run_dir}/wandb/offline-run-*" in output
    assert [row["step"] for row in rows(run_dir)] == [
        10,
        10,
        20,
        20,
        30,
        30,
        40,
        40,
        50,
        50,
        60,
        60,
    ]


def test_wandb_has_every_row_even_of_a_killed_run(resumed_offline):
    _, _, (first, second) = resumed_offline
    assert [(row["step"], row["_step"], row["val/top1"]) for row in first["history"]] == [
        (step, step, 50.0 + step) for step in (10, 20, 30, 40)
    ]
    assert [row["_step"] for row in second["history"]] == [40, 50, 60]
    assert first["metrics"]["*"] == second["metrics"]["*"] == "step"
    assert (first["exit"], second["exit"]) == ([137], [0])


def test_secrets_reach_no_file_of_wandb(resumed_offline):
    files = [path for path in resumed_offline[0].rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if b"CANARY" in path.read_bytes()]


@pytest.fixture(scope="module", autouse=True)
def without_server(tmp_path_factory):
    """Two runs in the background: one with an unreachable server, one without a key."""
    body = """
        marks = [time.perf_counter()]
        t = start(sys.argv[1], "online", 0)
        marks.append(time.perf_counter())
        worst = 0.0
        offline, step, end = Path(sys.argv[1], "wandb"), 0, time.monotonic() + 60
        while step < 20 or not (any(offline.glob("offline-run-*")) or time.monotonic() > end):
            step += 1
            began = time.perf_counter()
            t.log(step, step / 10, {"train/loss": 1 / step})
            worst = max(worst, time.perf_counter() - began)
            time.sleep(0.1)
        marks.append(time.perf_counter())
        t.close(0)
        print("seconds", marks[1] - marks[0], worst, time.perf_counter() - marks[2])
    """
    refused, keyless = tmp_path_factory.mktemp("refused"), tmp_path_factory.mktemp("keyless")
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "c" * 40}
    home = {"HOME": str(keyless), "WANDB_CONFIG_DIR": str(keyless)}
    programs = {
        run_dir: start_program(body, run_dir, stdout=subprocess.PIPE, env=env)
        for run_dir, env in ((refused, server), (keyless, home))
    }
    yield programs
    for program in programs.values():
        program.kill()
        program.communicate()


def collect(without_server, position):
    run_dir, program = list(without_server.items())[position]
    lines = program.communicate(timeout=90)[0].decode().splitlines()
    assert program.returncode == 0
    return (
        run_dir,
        [line for line in lines if "wandb" in line],
        [float(word) for word in lines[-1].split()[1:]],
    )


@pytest.mark.parametrize(
    ("fake", "mode", "words"),
    [
        (
            "init",
            "offline",
            ["offline;", "warning: wandb cannot start (ValueError: fake error in init)"],
        ),
        ("init", "online", ["cannot connect (ValueError: fake error in init)", "cannot start"]),
        (
            "log",
            "online",
            ["https://wandb.test/run", "wandb failed (ValueError: fake error in log)"],
        ),
        (
            "finish",
            "online",
            ["https://wandb.test/run", "wandb failed (ValueError: fake error in finish)"],
        ),
        ("die-log", "online", ["https://wandb.test/run", "its process ended with code 5"]),
        ("hang-init", "offline", ["offline;", "it did not finish in 1 s"]),
        (
            "hang-log",
            "online",
            [
                "https://wandb.test/run",
                "did not get everything in time; upload with: wandb sync",
                "it did not finish in 1 s",
            ],
        ),
        (
            "hang-finish",
            "online",
            [
                "https://wandb.test/run",
                "did not get everything in time; upload with: wandb sync",
                "it did not finish in 1 s",
            ],
        ),
    ],
)
def test_a_failing_wandb_is_reported_in_one_line(fake, mode, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "path/wandb").mkdir(parents=True)
    (tmp_path / "path/wandb/__init__.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("FAKE", fake)
    close_s = 1.0 if fake.startswith("hang") else 10.0
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_sink, "CLOSE_S", close_s)
    monkeypatch.setattr(wandb_sink, "STOP_S", close_s)
    log = tracker(tmp_path / "run", wandb=Wandb(mode))
    for step in range(1, 11):
        log.log(step, step / 10, {"train/loss": 1 / step})
    time.sleep(0.5 if fake.startswith("hang") else 0)
    began = time.monotonic()
    log.close(0)
    assert time.monotonic() - began < 2 * close_s + 2
    assert len(rows(tmp_path / "run")) == 10
    said = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    assert [word for word, line in zip(words, said, strict=True) if word not in line] == []


@pytest.mark.parametrize("prefix", ["WANDB__", "WANDB_X_"])
def test_settings_of_the_system_metrics_can_be_set_by_variables(prefix, tmp_path, monkeypatch):
    (tmp_path / "path/wandb").mkdir(parents=True)
    (tmp_path / "path/wandb/__init__.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("FAKE", "nothing")
    monkeypatch.setenv(f"{prefix}STATS_PID", "1")
    tracker(tmp_path / "run", wandb=Wandb.offline).close(0)
    log = (tmp_path / "run/wandb/helper.log").read_text()
    assert "settings ['x_stats_track_process_tree']" in log


def test_online_without_a_key_is_offline_without_a_prompt(without_server):
    run_dir, said, _ = collect(without_server, 1)
    assert len(said) == 1
    assert "No API key" in said[0]
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 1


def test_an_unreachable_server_delays_neither_start_nor_log_and_the_run_is_offline(without_server):
    run_dir, said, (start_s, log_s, close_s) = collect(without_server, 0)
    assert len(said) == 1
    assert "cannot connect" in said[0]
    assert "connection refused" in said[0]
    # wandb itself would try for minutes
    assert (start_s < 20, log_s < 5, close_s < 30) == (True, True, True), (start_s, log_s, close_s)
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    steps = [row["step"] for row in wandb_run(file)["history"]]
    assert steps == list(range(1, len(rows(run_dir)) + 1))
    assert not [
        path for path in run_dir.rglob("*") if path.is_file() and b"c" * 40 in path.read_bytes()
    ]
