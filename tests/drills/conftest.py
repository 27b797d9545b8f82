"""What drills share: an undisturbed run to compare with, and a place for what they measure."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import Slurm, why_not
from tests.conftest import make_folder
from tests.drills.harness import Job

pytestmark = pytest.mark.drill


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
    """measured["seconds to detection"] = 3.2: printed, and kept for README's table. Numbers are shown with a unit."""
    found: dict[str, object] = {}
    yield found
    name = request.node.name
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
    where = os.environ.get("ALEXNET_DDP_DRILLS")  # a folder: see tests/drills/__main__.py
    if where:
        (Path(where) / f"{name}.json").write_text(json.dumps(found))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A cluster of two nodes, n1 and n2."""
    reason = why_not(slurm=True)
    if reason:
        pytest.skip(reason)
    with Slurm() as cluster:
        yield cluster
