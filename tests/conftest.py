"""Fixtures: small data sets of real files, made once a session."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Two workers share the cores. OpenMP threads that wait actively would take the CPU from the others: steps of the tests'
# network need a quarter of the CPU time with this, and the results are the same. Set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="repeat the drills as often as docs/faults-and-drills.md states, and export every network",
    )


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores: a third of the time of the tests is spent waiting for processes."""
    return (
        len(os.sched_getaffinity(0)) + 1
        if hasattr(os, "sched_getaffinity")
        else (os.cpu_count() or 1) + 1
    )


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """True with --full. Otherwise a test that repeats a check repeats it a few times, which takes seconds."""
    return request.config.getoption("full")


@pytest.fixture
def limit(full: bool) -> Callable[[float], float]:
    """limit(seconds): the bound of a duration that docs/faults-and-drills.md states.

    It holds with --full, which runs one drill at a time. Beside other tests a drill may take ten times as long.
    """
    return lambda seconds: seconds if full else 10 * seconds


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that share a server, and drills of one file, run one after the other in the same worker.

    Tests with the marker `full`, whose kind of check a shorter test repeats, run with --full only.
    Of a test with the marker `sampled`, three cases in four are slow tests.

    In pytest_collection_modifyitems the group would come too late: a worker of pytest-xdist has read the groups.
    """
    markers = {marker.name for marker in item.iter_markers()}
    if "full" in markers and not item.config.getoption("full"):
        item.add_marker(pytest.mark.skip(reason="with --full"))
    if "sampled" in markers and sum(item.callspec.indices.values()) % 4:
        item.add_marker(pytest.mark.slow)
    if markers & {"drill", "slurm", "spark"}:
        server = next(iter(markers & {"slurm", "spark"}), None)
        item.add_marker(pytest.mark.xdist_group(server or item.path.stem))


def make_folder(
    root: Path, num_train: int, num_val: int, num_classes: int = 5, size: int = 72
) -> Path:
    """A coloured square on noise, the colour is the class. Sizes differ, nothing divides anything."""
    rng = np.random.default_rng(3)
    for split, count in (("train", num_train), ("val", num_val)):
        for i in range(count):
            label = i % num_classes
            height, width = size + rng.integers(0, 20, 2)
            pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
            y, x = rng.integers(0, height - 30), rng.integers(0, width - 30)
            pixels[y : y + 30, x : x + 30, label % 3] += np.uint8(120 if label < 3 else 60)
            directory = root / split / f"class{label}"
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(directory / f"{i:05d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """103 training and 61 validation images of 5 classes, JPEG, 72 to 92 pixels."""
    return make_folder(tmp_path_factory.mktemp("data") / "folder", 103, 61)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restore the handlers of stop signals: a command that ran in this process ignores them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
