"""A stop signal or a fault reaches one rank; all ranks know it at the same step."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from alexnet_ddp.config import Device
from alexnet_ddp.distributed import session
from alexnet_ddp.errors import DataError
from alexnet_ddp.resilience import signals
from alexnet_ddp.resilience.health import Health, Verdict, Wish
from alexnet_ddp.resilience.signals import StopSignal
from tests.ranks import run_ranks  # its forkserver has torch loaded

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def own_handlers():
    """The handlers of the test run come back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_does_nothing_else(number):
    stop = StopSignal()
    assert not stop.received
    signal.raise_signal(number)
    assert stop.received


def test_a_second_signal_within_five_seconds_is_the_same_event():
    assert signals._SAME_EVENT_S == 5
    stop = StopSignal()
    for number in SIGNALS:  # a launcher and a scheduler pass on the same stop
        signal.raise_signal(number)
    assert stop.received


def signalled_twice(same_event_s: float, pause_s: float) -> None:
    """Ends with 75 in the second signal, or with 3 if that does nothing."""
    signals._SAME_EVENT_S = same_event_s
    stop = StopSignal()
    signal.raise_signal(signal.SIGTERM)
    time.sleep(pause_s)
    signal.raise_signal(signal.SIGTERM)
    os._exit(3 if stop.received else 4)


@pytest.mark.parametrize(("same_event_s", "pause_s", "exit_code"), [(0.05, 0.1, 75), (5, 0, 3)])
def test_a_later_signal_exits_at_once_with_75(same_event_s, pause_s, exit_code):
    process = multiprocessing.get_context("forkserver").Process(target=signalled_twice, args=(same_event_s, pause_s))
    process.start()
    process.join(60)
    assert process.exitcode == exit_code


# --- the health vector ------------------------------------------------------------------------------------------

# What each of two ranks brings: (its loss, its number of images, its wish).
STEPS = {
    "well": [(1.0, 5, Wish()), (2.0, 4, Wish())],
    "stop": [(1.0, 5, Wish()), (2.0, 4, Wish(stop=True))],
    "save": [(1.0, 5, Wish(save=True)), (2.0, 4, Wish())],
    "failed": [(1.0, 5, Wish()), (2.0, 4, Wish(error=DataError("x")))],
    "nan": [(float("nan"), 5, Wish()), (2.0, 4, Wish())],
    "infinite": [(1.0, 5, Wish()), (float("-inf"), 4, Wish())],
    "all at once": [(float("inf"), 0, Wish(stop=True, save=True)), (float("inf"), 0, Wish(stop=True, save=True))],
    "huge": [(3e38, 2**31, Wish()), (3e38, 2**31 + 1, Wish())],  # no overflow on the way
    "well again": [(1.0, 5, Wish()), (2.0, 0, Wish())],
}


def verdicts() -> dict[str, Verdict]:
    with session(Device.cpu) as world:
        health, found = Health(world), {}
        for name, ranks in STEPS.items():
            loss, num_images, wish = ranks[world.rank]
            health.begin(torch.tensor(loss), num_images, wish)
            found[name] = health.finish()
        return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Verdict]]:
    return run_ranks(verdicts, 2)


def verdict(num_images: int, **flags: bool) -> Verdict:
    return Verdict(**{"stop": False, "diverged": False, "failed": False, "save": False, **flags}, num_images=num_images)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("well", verdict(9)),
        ("stop", verdict(9, stop=True)),
        ("save", verdict(9, save=True)),
        ("failed", verdict(9, failed=True)),
        ("nan", verdict(9, diverged=True)),
        ("infinite", verdict(9, diverged=True)),
        ("all at once", verdict(0, stop=True, save=True, diverged=True)),
        ("huge", verdict(2**32 + 1)),
        ("well again", verdict(5)),
    ],
)
def test_what_one_rank_brings_both_ranks_know(by_rank, step, expected):
    assert [found[step] for found in by_rank] == [expected] * 2
