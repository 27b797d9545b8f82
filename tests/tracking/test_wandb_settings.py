"""What wandb is asked for: options before variables before defaults, sweeps, and who starts a run again."""

import re
from pathlib import Path

import pytest

from alexnet_ddp.cli import compose
from alexnet_ddp.config import Artifacts, ConfigError, LoggerConfig, Wandb
from alexnet_ddp.runtime.errors import FINAL_CODES, code_for_caller
from alexnet_ddp.tracking.wandb_process import End, report_end
from alexnet_ddp.tracking.wandb_settings import (
    check_wandb,
    init_arguments,
    wandb_id,
    wandb_mode,
)
from alexnet_ddp.tracking.wandb_sink import _is_last_start

ON = {"wandb": Wandb.online}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("MODE", "PROJECT", "RUN_ID", "SWEEP_ID", "NAME", "RESUME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")


def test_wandb_mode_of_the_environment_narrows_the_configuration(monkeypatch):
    def mode(wanted, environment):
        monkeypatch.setenv("WANDB_MODE", environment)
        return wandb_mode(wanted)

    assert [mode("online", name) for name in ("disabled", "offline", "dryrun", "online", "bad")] == [
        "disabled", "offline", "offline", "online", "online",
    ]  # fmt: skip
    assert [mode("offline", name) for name in ("disabled", "online")] == ["disabled", "offline"]
    assert mode("disabled", "online") == mode(None, "online") == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_mode("online") == "online"


def test_a_run_of_a_sweep_is_online_unless_it_is_told_otherwise(sweep, monkeypatch):
    assert wandb_mode(None) == "online"
    assert wandb_mode(Wandb.disabled) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(None) == "offline"


def test_an_option_counts_before_the_variable_and_that_before_the_default(tmp_path, monkeypatch):
    directory = tmp_path / "name"
    directory.mkdir()
    defaults = init_arguments(LoggerConfig(**ON), directory)
    own_id = (directory / "wandb_id.txt").read_text().strip()
    assert defaults == {"project": "alexnet_ddp", "id": own_id, "resume": "allow", "name": "name"}
    for name in ("PROJECT", "RUN_ID", "NAME", "RESUME"):
        monkeypatch.setenv(f"WANDB_{name}", f"of-{name}")
    # wandb reads the variables that are missing here.
    of_variables = {"project": "of-PROJECT", "id": "of-RUN_ID"}
    assert init_arguments(LoggerConfig(**ON), directory) == of_variables
    given = {"project": "p", "id": "i", "entity": "e", "group": "g", "job_type": "j"}
    given |= {"tags": ["t"], "notes": "n"}
    cfg = LoggerConfig(**ON, **{f"wandb_{key}": value for key, value in given.items()})
    assert init_arguments(cfg, directory) == given


def test_all_starts_of_a_run_have_one_id(tmp_path, monkeypatch):
    first = wandb_id(tmp_path)
    assert wandb_id(tmp_path) == first
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    assert wandb_id(tmp_path) == "of-the-agent"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_id(tmp_path) == "of-the-agent"  # started again by hand
    (tmp_path / "wandb_id.txt").write_text("two words\n")
    assert wandb_id(tmp_path) == (tmp_path / "wandb_id.txt").read_text().strip() != "two words"


def test_a_run_of_a_sweep_takes_id_and_project_from_it(tmp_path, sweep):
    for name in ("s1-r1", "mine"):
        (tmp_path / name).mkdir()
    assert init_arguments(LoggerConfig(), tmp_path / "s1-r1") == {"resume": "allow"}
    own_name = {"resume": "allow", "name": "mine"}
    assert init_arguments(LoggerConfig(), tmp_path / "mine") == own_name
    assert (tmp_path / "mine/wandb_id.txt").read_text() == "r1\n"


def test_a_trial_of_a_sweep_is_named_after_it(tmp_path, monkeypatch):
    trial = tmp_path / "s/003"
    trial.mkdir(parents=True)
    assert init_arguments(LoggerConfig(**ON), trial)["name"] == "003"
    (tmp_path / "s/sweep.json").write_text("{}")
    assert init_arguments(LoggerConfig(**ON), trial)["name"] == "s/003"
    monkeypatch.chdir(trial.parent)
    assert init_arguments(LoggerConfig(**ON), Path("003"))["name"] == "s/003"


def test_the_name_of_a_run_derives_from_its_sweep(sweep):
    assert compose([]).run.name == "s1-r1"
    assert compose(["run.name=mine"]).run.name == "mine"


def test_a_null_is_read_as_the_agent_writes_it():
    cfg = compose(["trainer.ema_decay=None", "trainer.drop_last=True", "run.name=None"])
    assert (cfg.trainer.ema_decay, cfg.trainer.drop_last, cfg.run.name) == (None, True, "None")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"wandb_tags": ["a"]}, "logger.wandb_tags (['a']) would be ignored without logger.wandb; give logger.wandb=online (or offline)"),
        ({"wandb_artifacts": Artifacts.best}, "logger.wandb_artifacts (best) would be ignored without logger.wandb; give logger.wandb=online (or offline)"),
        ({**ON, "wandb_project": "a/b"}, "logger.wandb_project (a/b) must not contain '/'; leave it out"),
        ({**ON, "wandb_id": "x" * 129}, "logger.wandb_id (xxx"),
        ({**ON, "wandb_tags": ["x" * 65]}, "logger.wandb_tags: xxx"),
    ],
)  # fmt: skip
def test_what_wandb_would_ignore_or_refuse_is_refused(options, line):
    with pytest.raises(ConfigError) as refused:
        check_wandb(LoggerConfig(**options))
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_a_sweep_refuses_an_id_and_allows_tags(sweep):
    check_wandb(LoggerConfig(wandb_tags=["a"]))
    with pytest.raises(ConfigError, match=r"logger.wandb_id \(x\) would be ignored: the sweep"):
        check_wandb(LoggerConfig(wandb_id="x"))


def test_options_stay_when_wandb_is_switched_off():
    check_wandb(LoggerConfig(wandb=Wandb.disabled, wandb_tags=["a"]))


def test_a_stopped_run_is_no_failure_for_the_agent(sweep, monkeypatch):
    codes = (0, 1, 64, 70, 75, 76, 79)
    monkeypatch.delenv("ALEXNET_DDP_EXIT_CODE_FILE", raising=False)
    assert [code_for_caller(code) for code in codes] == [0, 1, 64, 70, 0, 76, 0]
    monkeypatch.setenv("ALEXNET_DDP_EXIT_CODE_FILE", "file")  # launch/ translates it
    assert [code_for_caller(code) for code in codes] == list(codes)
    monkeypatch.delenv("ALEXNET_DDP_EXIT_CODE_FILE")
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert [code_for_caller(code) for code in codes] == list(codes)


def test_the_launch_scripts_do_not_restart_after_the_final_codes():
    text = (Path(__file__).parents[2] / "launch/common.sh").read_text()
    found = re.search(r"\[\[ ! \$code =~ \^\(([\d|]+)\)\$", text)
    assert tuple(map(int, found[1].split("|"))) == FINAL_CODES


def test_a_run_knows_its_last_start(monkeypatch):
    monkeypatch.delenv("ALEXNET_DDP_EXIT_CODE_FILE", raising=False)
    assert _is_last_start(40)
    monkeypatch.setenv("ALEXNET_DDP_EXIT_CODE_FILE", "file")
    monkeypatch.setenv("ALEXNET_DDP_GIVES_UP_AT", "")
    assert not _is_last_start(40)
    monkeypatch.setenv("ALEXNET_DDP_GIVES_UP_AT", "40")
    assert (_is_last_start(40), _is_last_start(50)) == (True, False)


class Recorder:
    """What a run of wandb is asked for at the end."""

    def __init__(self):
        self.alerts, self.is_preempting = [], False

    def alert(self, title, text, level):
        self.alerts.append((title, level))

    def mark_preempting(self):
        self.is_preempting = True


@pytest.mark.parametrize(
    ("code", "is_sweep", "is_last_start", "alerts"),
    [
        (0, False, False, [("x is complete", "INFO")]),
        (0, True, False, []),
        (70, False, False, [("x diverged, and nothing restarts it", "ERROR")]),
        (70, True, False, [("x diverged, and nothing restarts it", "ERROR")]),
        (76, False, False, []),
        (76, False, True, [("x failed, and nothing restarts it", "ERROR")]),
        (137, False, True, [("x failed, and nothing restarts it", "ERROR")]),
        (75, False, True, []),
        (75, True, True, []),
        (79, False, True, []),
    ],
)
def test_a_run_alerts_at_ends_that_need_a_person(code, is_sweep, is_last_start, alerts):
    spec = {"is_sweep": is_sweep, "is_last_start": is_last_start, "name": "x", "diverged": 70}
    spec |= {"final_codes": FINAL_CODES, "quiet_codes": [0, 75, 79]}
    run = Recorder()
    report_end(run, spec, End(code, ""), {})
    assert run.alerts == alerts
    assert run.is_preempting == (code == 75 and not is_sweep)
