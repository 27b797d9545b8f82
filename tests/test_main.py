"""`alexnet-ddp COMMAND` and `python -m alexnet_ddp COMMAND`: real processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_ddp.__main__ import COMMANDS
from alexnet_ddp.launch import copy_scripts
from alexnet_ddp.runtime.errors import ConfigError

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "alexnet_ddp", *arguments]
    return subprocess.run(
        command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **more
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands_at_once(arguments):
    began = time.monotonic()
    done = run(*arguments)
    assert time.monotonic() - began < 1.5
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command}" in done.stdout


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "alexnet-ddp 0.1.0\n")


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("trian", "nearest: train"),
        ("model=alexnet", "write alexnet-ddp train model=alexnet"),
        ("frobnicate", "there are: train, evaluate, "),
    ],
)
def test_an_unknown_command_is_refused_in_one_line(argument, hint):
    done = run(argument)
    assert done.returncode == 64
    assert done.stdout.startswith(f"alexnet_ddp: {argument} is not a command; {hint}")
    assert done.stdout.count("\n") == 1


def test_a_command_gets_the_other_arguments():
    done = run("train", "traner.epochs=1")
    assert done.returncode == 64
    assert "traner.epochs is not a key; nearest: trainer.epochs" in done.stdout


def test_importing_the_package_and_its_plugins_imports_no_torch():
    code = (
        "import sys, alexnet_ddp; alexnet_ddp.register_model('x', lambda n: None); alexnet_ddp.Callback;"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_scripts_are_copied_but_overwrite_nothing(tmp_path):
    made = copy_scripts(tmp_path / "there")
    assert tmp_path / "there/launch/node.sh" in made
    assert tmp_path / "there/launch/setup.sh" not in made  # it sets up a checkout
    assert os.access(tmp_path / "there/launch/node.sh", os.X_OK)
    assert (tmp_path / "there/slurm/train.sbatch").exists()
    with pytest.raises(ConfigError, match="exists and is not overwritten; give another folder"):
        copy_scripts(tmp_path / "there")
    done = run("launch", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (64, 1)


@pytest.mark.slow
def test_an_entry_point_registers_a_network_for_any_command(tmp_path):
    info = tmp_path / "nets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[alexnet_ddp.plugins]\nnets = nets.tiny\n")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "tiny.py").write_text(
        "from torch import nn\nfrom alexnet_ddp import register_model\n\n\n"
        "@register_model('tiny')\ndef tiny(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    done = run("plan", "model=plugin", "model.name=tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "images/s" in done.stdout
