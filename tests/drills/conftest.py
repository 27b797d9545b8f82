"""What drills share: an undisturbed run to compare with, and a place for what they measure."""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cluster import Slurm, why_not
from tests.conftest import make_folder
from tests.drills.harness import Job, preloaded_server
from tests.network import WAITING

pytestmark = pytest.mark.drill


@pytest.fixture(scope="session", autouse=True)
def python(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --full torchrun and each rank are a new Python, as a user's, and the network is alexnet_small."""
    if request.config.getoption("full"):
        Job.python = Path(sys.executable)
        yield
        return
    Job.network = tuple(WAITING)
    with TemporaryDirectory() as folder:  # a short path: a socket's has at most 107 characters
        Job.servers = Path(folder)
        with preloaded_server(Job.servers, socket.gethostname()):
            yield
    Job.servers, Job.network = None, ()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """205 training and 21 validation images: an epoch of batches of 8 has 26 steps, the last one of 5 images."""
    return make_folder(tmp_path_factory.mktemp("images") / "folder", 205, 21)


@pytest.fixture(scope="session")
def calm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The undisturbed run: 2 ranks, 2 epochs, 52 steps."""
    job = Job(tmp_path_factory.mktemp("calm"), "calm", f"data.root={images}")
    assert job.run() == 0, job.said()
    return job


@pytest.fixture
def new_job(images: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """new_job("name", *overrides, ranks=2, env={}): the same training as calm's. Nothing of it outlives the test."""
    jobs: list[Job] = []

    def build(name: str, *overrides: str, **how: object) -> Job:
        jobs.append(Job(tmp_path, name, f"data.root={images}", *overrides, **how))
        return jobs[-1]

    yield build
    for job in jobs:
        job.end()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """measured["detected after, s"] = 3.2: printed, and kept for the table of drills. Keys carry the unit."""
    found: dict[str, object] = {}
    request.node.user_properties.append(("measured", found))
    yield found
    print(f"\n{request.node.name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    """Each drill's outcome as a file in the folder ALEXNET_DDP_DRILLS: see tests/drills/__main__.py."""
    report = yield
    where = os.environ.get("ALEXNET_DDP_DRILLS")
    if (
        where
        and item.name.startswith("test_d")
        and (report.when == "call" or report.outcome != "passed")
    ):
        row = {"test": item.name, "outcome": report.outcome, "seconds": round(call.duration, 1)}
        row["measured"] = dict(item.user_properties).get("measured", {})
        (Path(where) / f"{item.name}.json").write_text(json.dumps(row))
    return report


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A cluster of two nodes, n1 and n2."""
    reason = why_not(slurm=True)
    if reason:
        pytest.skip(
            reason
        )  # the real thing or nothing: a laptop has no Slurm; .ci/run installs it and shows skips
    with Slurm() as cluster, ExitStack() as servers:
        for host in ("n1", "n2") if Job.servers else ():
            servers.enter_context(preloaded_server(Job.servers, host, cluster.command(host)))
        yield cluster
