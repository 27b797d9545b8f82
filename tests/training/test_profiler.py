"""trainer.profile_steps: the files, and the conclusion on three planted bottlenecks."""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.training.profiler import StepProfiler, TimeShares, _overlap, _union, _without
from tests.cluster import Hosts, why_not
from tests.network import QUICK
from tests.test_train import ENV, SMALL, rows, run

PROFILED = ["trainer.profile_steps=1:3", "trainer.max_steps=4", "trainer.epochs=99"]
SYNTHETIC = ["data=synthetic", "data.image_size=64", "data.num_train=64", "data.num_val=4"]


ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def conclusion(run_dir: Path, rank: int = 0) -> str:
    found = json.loads((run_dir / f"profile/rank{rank}.json").read_text())
    shares = [found[name] for name in ("data", "compute", "communication", "other")]
    assert sum(shares) == pytest.approx(1, abs=0.02)
    assert min(shares) >= 0
    return found["conclusion"]


def test_spans():
    some = _union([(5, 7), (0, 2), (1, 3), (7, 8)])
    assert some == [(0, 3), (5, 8)]
    assert _overlap(some, [(2, 6), (7, 9)]) == [(2, 3), (5, 6), (7, 8)]
    assert _without(some, [(1, 2), (6, 20)]) == [(0, 1), (2, 3), (5, 6)]
    assert _without(some, []) == some


def test_the_conclusion_names_the_largest_share():
    shares = TimeShares(12.5, data=0.1, compute=0.3, communication=0.55, other=0.05)
    assert shares.conclusion.startswith(
        "bound by communication: 55 % of a step of 12.5 ms waits for"
    )


def test_a_profile_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "profile").touch()
    profiler = StepProfiler((1, 2), [0], 0, 9, tmp_path / "profile", ALONE)
    for step in range(2):
        with profiler.step(step):
            torch.ones(2).sum()
    assert profiler.is_due(2)
    profiler.write()
    profiler.close()
    (warning,) = caplog.messages
    assert re.match(
        r"profile of rank 0: bound by .*; its files cannot be written: .*Errno", warning
    )
    assert not profiler.is_due(3)


def test_steps_or_ranks_that_do_not_exist_are_refused(tmp_path):
    StepProfiler((3, 9), [0], 0, 9, tmp_path, ALONE)
    with pytest.raises(ConfigError) as error:
        StepProfiler((3, 10), [0], 0, 9, tmp_path, ALONE)
    assert str(error.value) == (
        "trainer.profile_steps (3:10) must end at the last step of the run, 9, or before it; "
        "give earlier steps"
    )
    with pytest.raises(ConfigError, match=r"profile_ranks \(\[0, 1\]\) must be less than"):
        StepProfiler((3, 9), [0, 1], 0, 9, tmp_path, ALONE)


def test_a_run_that_resumes_after_the_profiled_steps_warns_unless_there_is_a_profile(
    tmp_path, caplog
):
    world = World(0, 0, 2, 2, torch.device("cpu"))
    (tmp_path / "rank1.json").touch()
    StepProfiler((1, 3), [1], 3, 9, tmp_path, world)
    StepProfiler((1, 3), [0, 1], 2, 9, tmp_path, world)  # step 2 is profiled
    assert caplog.messages == []
    StepProfiler((1, 3), [0, 1], 3, 9, tmp_path, world)
    assert caplog.messages == [
        "trainer.profile_steps (1:3): the run resumes at step 3, so there is no profile of "
        "ranks [0]; give later steps"
    ]


@pytest.mark.slow
def test_a_heavy_network_is_bound_by_compute_and_all_ranks_can_be_profiled(tmp_path):
    heavy = [*SYNTHETIC, "data.num_classes=10", "model=alexnet", "trainer.global_batch_size=16"]
    options = [*heavy, *PROFILED, "trainer.profile_ranks=[0,1]", "run.name=x"]
    done = run("train", *options, "logger.tensorboard=false", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "profile of rank 0: bound by compute: " in done.stdout
    folder = tmp_path / "runs/x/profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank{rank}.{kind}" for rank in (0, 1) for kind in ("json", "trace.json.gz", "txt")
    ]
    assert conclusion(tmp_path / "runs/x", rank=1).startswith("bound by compute: ")
    trace = json.loads(gzip.decompress((folder / "rank0.trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("alexnet_ddp.step") == 2
    assert "aten::convolution_backward" in (folder / "rank0.txt").read_text()


class Waves(nn.Module):
    """One kernel if it is compiled: then no operator of aten computes it."""

    def forward(self, x: torch.Tensor, wait_s: float) -> torch.Tensor:
        sleep(wait_s)
        for _ in range(8):
            x = (x.sin() * x.cos()).exp().tanh()
        return x


@torch.compiler.disable
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("wait_s", "what"), [(0.0, "compute"), (2.0, "other")])
def test_a_compiled_graph_is_compute_and_the_python_around_it_is_not(tmp_path, wait_s, what):
    model = torch.compile(Waves())
    images = torch.randn(4_000_000)
    model(images, wait_s)
    profiler = StepProfiler((0, 1), [0], 0, 1, tmp_path / "profile", ALONE)
    with profiler.step(0):
        model(images, wait_s)
    profiler.write()
    assert conclusion(tmp_path).startswith(f"bound by {what}: ")
    assert json.loads((tmp_path / "profile/rank0.json").read_text())["compute"] > 0


@pytest.mark.slow
def test_large_images_and_a_small_network_are_bound_by_data(tmp_path):
    large = io.BytesIO()
    Image.linear_gradient("L").resize((2500, 2500)).convert("RGB").save(large, "PNG")
    for k in range(8):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(large.getvalue())
    data = [f"data.root={tmp_path / 'images'}", "data.val_fraction=0.3"]
    # The first four batches are loaded ahead.
    steps = ["trainer.profile_steps=6:8", "trainer.max_steps=9", "trainer.epochs=99"]
    steps.append("trainer.eval_every_epochs=99")
    options = [*SMALL, *data, *steps, "trainer.global_batch_size=6", "run.name=x"]
    done = run("train", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert conclusion(tmp_path / "runs/x").startswith("bound by data: ")


@pytest.mark.drill
def test_a_slow_link_is_bound_by_communication(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    options = [*SYNTHETIC, *QUICK, *PROFILED, "trainer.global_batch_size=8", "run.name=x"]
    options += ["logger.tensorboard=false", "trainer.check_every_steps=null", "device=cpu"]
    with Hosts(2) as hosts:
        for host in ("n1", "n2"):
            hosts.rate(host, "20mbit")
        started = [
            subprocess.Popen(
                hosts.command(host, sys.executable, "-m", "alexnet_ddp.train", *options),
                env={**ENV, **rank_env(rank)},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, host in enumerate(("n1", "n2"))
        ]
        said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert conclusion(tmp_path / "runs/x").startswith("bound by communication: ")
    *_, row = rows(tmp_path / "runs/x", "time/exchange_s")
    others = ("data", "forward", "backward", "update")
    assert row["time/exchange_s"] > 4 * max(row[f"time/{part}_s"] for part in others)


def rank_env(rank: int) -> dict[str, str]:
    env = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    return env | {"MASTER_ADDR": "n1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["trainer.profile_steps=5"], "must be FIRST:END with 1 to 1000 steps, such as 100:110"),
        (["trainer.profile_steps=5:5"], "must be FIRST:END with 1 to 1000 steps, such as 100:110"),
        (["trainer.profile_ranks=[1]"], "would be ignored without trainer.profile_steps"),
        (["trainer.profile_steps=1:2", "trainer.profile_ranks=[]"], "must be ranks, which count"),
    ],
)
def test_a_wrong_profile_is_refused(options, line):
    from alexnet_ddp.config.compose import compose

    with pytest.raises(ConfigError, match=line):
        compose("train", ["run.name=x", "data=synthetic", *options])
