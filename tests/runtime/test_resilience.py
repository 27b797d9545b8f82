"""A stop signal or a fault reaches one rank; all ranks know it at the same step."""

import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from alexnet_ddp.config import Device
from alexnet_ddp.runtime import signals
from alexnet_ddp.runtime import watchdog_process as watch
from alexnet_ddp.runtime.distributed import session
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.runtime.watchdog import Heartbeat
from alexnet_ddp.training.vote import StepSnapshot, StepVote, VoteExchange, VoteResult
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
    process = multiprocessing.get_context("forkserver").Process(
        target=signalled_twice, args=(same_event_s, pause_s)
    )
    process.start()
    process.join(60)
    assert process.exitcode == exit_code


# --- the health vector ------------------------------------------------------------------------------------------

# What each of two ranks brings: (its loss, its number of images, its vote).
STEPS = {
    "well": [(1.0, 5, StepVote()), (2.0, 4, StepVote())],
    "stop": [(1.0, 5, StepVote()), (2.0, 4, StepVote(stop=True))],
    "save": [(1.0, 5, StepVote(save=True)), (2.0, 4, StepVote())],
    "failed": [(1.0, 5, StepVote()), (2.0, 4, StepVote(error=DataError("x")))],
    "nan": [(float("nan"), 5, StepVote()), (2.0, 4, StepVote())],
    "infinite": [(1.0, 5, StepVote()), (float("-inf"), 4, StepVote())],
    "all at once": [
        (float("inf"), 0, StepVote(stop=True, save=True)),
        (float("inf"), 0, StepVote(stop=True, save=True)),
    ],
    "huge": [(3e38, 2**31, StepVote()), (3e38, 2**31 + 1, StepVote())],  # no overflow on the way
    "late": [(1.0, 5, StepVote()), (2.0, 4, StepVote())],
    "well again": [(1.0, 5, StepVote()), (2.0, 0, StepVote())],
}


def votes() -> dict[str, VoteResult]:
    with session(Device.cpu) as world:
        exchange, found = VoteExchange(world), {}
        for name, ranks in STEPS.items():
            loss, num_images, vote = ranks[world.rank]
            late = torch.tensor(float(name == "late"))
            exchange.start(torch.tensor(loss), num_images, vote, late)
            found[name] = exchange.finish()
        return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, VoteResult]]:
    return run_ranks(votes, 2)


def outcome(num_images: int, **flags: bool) -> VoteResult:
    none = dict.fromkeys(("stop", "nonfinite_loss", "nonfinite_previous", "failed", "save"), False)
    return VoteResult(
        **{**none, **flags}, num_images=num_images, loss=0, weight=num_images, trained_s=0
    )


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("well", outcome(9)),
        ("stop", outcome(9, stop=True)),
        ("save", outcome(9, save=True)),
        ("failed", outcome(9, failed=True)),
        ("nan", outcome(9, nonfinite_loss=True)),
        ("infinite", outcome(9, nonfinite_loss=True)),
        ("all at once", outcome(0, stop=True, save=True, nonfinite_loss=True)),
        ("huge", outcome(2**32 + 1)),
        ("late", outcome(9, nonfinite_previous=True)),
        ("well again", outcome(5)),
    ],
)
def test_a_vote_of_one_rank_is_known_to_both(by_rank, step, expected):
    assert [replace(found[step], loss=0) for found in by_rank] == [expected] * 2


def test_the_loss_of_a_step_is_the_mean_over_the_images_of_all_ranks(by_rank):
    assert [found["well"].loss for found in by_rank] == [3 / 9] * 2
    assert all(math.isnan(found["nan"].loss) for found in by_rank)


def test_bad_steps_are_the_previous_gradient_and_the_current_loss():
    assert outcome(9).nonfinite_steps(7) == []
    assert outcome(9, nonfinite_previous=True, nonfinite_loss=True).nonfinite_steps(7) == [6, 7]


def test_a_snapshot_is_restored_if_the_step_is_bad():
    tensors = [
        torch.ones(2, 3),
        torch.tensor(4),
        torch.ones(5, dtype=torch.float64),
        torch.zeros(2, 2),
    ]
    before = StepSnapshot(tensors)
    for bad, expected in ((0.0, [2, 5, 2, float("nan")]), (1.0, [1, 4, 1, 0])):
        for tensor, value in zip(tensors, (1, 4, 1, 0)):
            tensor.fill_(value)
        before.snapshot()
        for tensor, value in zip(tensors, (2, 5, 2, float("nan"))):
            tensor.fill_(value)
        before.restore(torch.tensor(bad))
        for tensor, value in zip(tensors, expected):
            assert torch.equal(
                tensor.double().nan_to_num(9), torch.full_like(tensor, value).double().nan_to_num(9)
            )


@pytest.mark.parametrize(
    ("jumps", "killed"), [([0, 100, 0, 0], False), ([0, 1, 1, 1, *[1] * 40], True)]
)
def test_a_rank_without_progress_is_hung_but_not_after_the_machine_slept(
    monkeypatch, jumps, killed
):
    """jumps: seconds that pass between two looks of the watchdog."""
    now, looks, ended = [time.monotonic()], iter(jumps), []
    heartbeat = Heartbeat()
    heartbeat.report_progress(30.0, "data", 12, [1, 2])

    def look(*arguments):
        jump = next(looks, None)
        now[0] += jump or 0
        heartbeat.tick()  # its threads run
        return [[jump] if jump is None else [], [], []]

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.select, "select", look)
    monkeypatch.setattr(watch, "_kill", lambda rank, state, cause, started: ended.append(cause))
    monkeypatch.setattr(watch, "_report", lambda *arguments: None)
    watched = watch.Watched(os.getpid(), 0, "here", "runs/a", os.dup(heartbeat.file.fileno()), 0)
    watch.watch(watched)
    assert ended == (["made no progress for 31 s"] if killed else [])
