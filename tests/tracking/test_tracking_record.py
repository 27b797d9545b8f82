"""Records of a run: complete files, every start, and no secrets."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest

from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.run_record import read_classes
from alexnet_ddp.tracking import record_run, write_status
from alexnet_ddp.tracking.record import _git
from tests.tracking.test_tracking import start_program

CLASSES = {"ids": ["n1", "n2"], "names": ["cat", "dog"]}


@pytest.mark.slow
def test_json_is_replaced_atomically_under_kill(tmp_path):
    body = """
        from alexnet_ddp.runtime.files import write_json
        print("ready", flush=True)
        while True:
            write_json(Path(sys.argv[1], "a.json"), {"numbers": list(range(5_000)), "nan": float("nan")})
    """
    for _ in range(2):
        program = start_program(body, tmp_path, stdout=subprocess.PIPE)
        assert program.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):  # before the first one
                assert json.loads((tmp_path / "a.json").read_bytes())["nan"] == "nan"
        program.kill()
        program.communicate()
        assert json.loads((tmp_path / "a.json").read_bytes())["numbers"][-1] == 4_999


def test_json_that_cannot_be_written_leaves_the_old_file_and_no_temporary_file(
    tmp_path, monkeypatch
):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"new": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_each_start_of_a_run_is_recorded_and_a_damaged_record_is_replaced(tmp_path, caplog):
    for start_step in (0, 20):
        record_run(
            tmp_path,
            "seed: 1\n",
            {"world_size": 2, "overrides": ["seed=1"], "start_step": start_step},
            CLASSES,
        )
    run = json.loads((tmp_path / "run.json").read_text())
    assert [start["start_step"] for start in run["starts"]] == [0, 20]
    assert (run["world_size"], run["start_step"], run["versions"]["python"]) == (
        2,
        20,
        sys.version.split()[0],
    )
    assert {"torch", "torchvision", "numpy", "cv2", "alexnet_ddp"} <= set(run["versions"])
    assert {"host", "git", "command", "time", "pid", "overrides"} <= set(run)
    for torn in ('{"starts": [', '"text"', "[]", '{"starts": 3}'):
        (tmp_path / "run.json").write_text(torn)
        record_run(tmp_path, "seed: 1\n", {"start_step": 40}, CLASSES)
        assert [
            start["start_step"]
            for start in json.loads((tmp_path / "run.json").read_text())["starts"]
        ] == [40]
    assert "is replaced" in caplog.text
    assert read_classes(tmp_path) == CLASSES
    for torn in ("[]", "3", '{"ids": ["a"]}', '{"ids": ["a"], "names": "a"}', "[" * 5000):
        (tmp_path / "classes.json").write_text(torn)
        with pytest.raises(DataError, match=r"classes.json cannot be read .*; start the training"):
            read_classes(tmp_path)
    (tmp_path / "classes.json").unlink()
    with pytest.raises(
        DataError, match=r"classes.json cannot be read .*; start the training again"
    ):
        read_classes(tmp_path)


def test_the_commit_is_recorded_only_for_files_of_the_tree(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True
        )

    package, installed = tmp_path / "package", tmp_path / "venv"
    for directory in (package, installed):
        directory.mkdir()
        (directory / "__init__.py").touch()
    assert _git(package) is None
    git("init")
    git("add", "package")
    git("commit", "-m", "one")
    (tmp_path / ".git/info/exclude").write_text("venv\n")
    assert _git(installed) is None
    assert (_git(package)["dirty"], len(_git(package)["commit"])) == (False, 40)
    (package / "__init__.py").write_text("x = 1")
    assert _git(package)["dirty"] is True


def test_status_contains_the_state_of_the_run(tmp_path):
    write_status(tmp_path, "preempted", 120, 75, "SIGTERM")
    status = json.loads((tmp_path / "status.json").read_text())
    assert set(status) == {"state", "step", "exit_code", "message", "time", "pid", "host"}
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", 120, 75)
    assert status["time"].endswith("+00:00")


def test_secrets_reach_neither_run_json_nor_config_nor_status(tmp_path):
    record_run(
        tmp_path, "data:\n  root: s3://me:CANARY@host/x\n  api_key: CANARY\n  keep_last: 2\n",
        {"overrides": ["data.token=CANARY", "seed=1"], "password": "CANARY"}, CLASSES,
    )  # fmt: skip
    write_status(tmp_path, "failed", 3, 65, "cannot read https://u:CANARY@host/x")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"CANARY" in path.read_bytes()]
    assert (tmp_path / "config.yaml").read_text() == (
        "data:\n  root: s3://***@host/x\n  api_key: '***'\n  keep_last: 2\n"
    )
