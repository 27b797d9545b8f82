"""Which exports are sent to wandb; test_tracking_wandb_server.py shows what arrives of one."""

import pytest

from alexnet_ddp.config import Artifacts, LoggerConfig, Wandb
from alexnet_ddp.runtime.files import lock_run
from alexnet_ddp.tracking.exported import send_export

ARTIFACTS = LoggerConfig(wandb=Wandb.offline, wandb_artifacts=Artifacts.best)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_a_run_that_is_trained_gets_no_export(tmp_path, capsys):
    with lock_run(tmp_path):
        send_export(ARTIFACTS, tmp_path, tmp_path, "onnx", {})
    said = capsys.readouterr().out
    assert said.startswith("warning: wandb does not get the exported model: run.name=")
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    "cfg",
    [
        LoggerConfig(wandb=Wandb.offline),
        LoggerConfig(wandb_artifacts=Artifacts.all),
        LoggerConfig(),
    ],
)
def test_a_run_without_artifacts_sends_no_export(cfg, tmp_path, capsys):
    send_export(cfg, tmp_path, tmp_path, "onnx", {})
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
