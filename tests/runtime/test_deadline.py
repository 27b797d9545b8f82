"""A run stops early enough before Slurm's time limit. A fake squeue returns the limit."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from alexnet_ddp.runtime import deadline
from alexnet_ddp.runtime.deadline import Deadline, time_left
from alexnet_ddp.runtime.signals import StopSignal
from tests.runtime.test_resilience import own_handlers  # noqa: F401  # autouse: the handlers of the test run come back


class Flag:
    received = False


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """squeue(answer) sets the next answers; asked() returns the arguments of the calls so far."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)

    def answer(text: str, code: int = 0) -> None:
        (tmp_path / "answer").write_text(f"{text}\n")
        lines = [
            "#!/bin/sh",
            f'echo "$SLURM_TIME_FORMAT $*" >>{tmp_path}/asked',
            f"/bin/cat {tmp_path}/answer",
        ]
        script = "\n".join([*lines, f"exit {code}\n"])
        new = tmp_path / "new"
        new.write_text(script)
        new.chmod(0o755)
        new.rename(tmp_path / "squeue")

    answer.asked = lambda: (tmp_path / "asked").read_text().splitlines()
    return answer


def test_time_left_is_read_from_squeue(squeue):
    squeue(f"{time.time() + 90:.0f}")
    assert 85 < time_left() < 91
    assert squeue.asked() == ["%s --noheader --jobs 12 --format %e"]


@pytest.mark.parametrize("answer", ["NONE", "Unknown", ""])
def test_a_job_without_a_limit_has_no_deadline(squeue, answer):
    squeue(answer)
    assert time_left() is None


def test_a_task_of_an_array_asks_for_itself(squeue, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    squeue(f"{time.time() + 90:.0f}")
    time_left()
    assert "--jobs 12_3" in squeue.asked()[0]


def test_without_squeue_the_environment_is_used(squeue, monkeypatch):
    squeue("slurm_load_jobs error", code=1)
    assert time_left() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + 90:.0f}")
    assert 85 < time_left() < 91


@pytest.fixture
def left_at_stop(monkeypatch):
    """Seconds of a job of so many that are left when the run is stopped, by a clock that only sleeping moves."""

    def measure(limit_s: float, save_s: float = 0.0, longer_s: float = 0.0) -> float:
        clock = SimpleNamespace(now=0.0, end=limit_s)

        def sleep(seconds: float) -> None:
            clock.now += seconds
            if clock.now > limit_s / 3:
                clock.end = limit_s + longer_s

        monkeypatch.setattr(deadline, "time", SimpleNamespace(sleep=sleep))
        monkeypatch.setattr(deadline, "time_left", lambda: clock.end - clock.now)
        stop = Flag()
        Deadline(stop, lambda: save_s)._watch()
        assert stop.received
        return clock.end - clock.now

    return measure


def test_the_run_is_stopped_half_a_minute_before_the_end(left_at_stop):
    assert left_at_stop(3600) == pytest.approx(30, abs=0.5)


def test_a_slow_save_starts_earlier(left_at_stop):
    assert left_at_stop(3600, save_s=100) == pytest.approx(30 + 2 * 100, abs=0.5)


def test_at_least_half_of_the_time_is_for_training(left_at_stop):
    assert left_at_stop(40) == pytest.approx(20, abs=0.5)


def test_a_limit_that_is_moved_moves_the_stop(left_at_stop):
    assert left_at_stop(3600, longer_s=7200) == pytest.approx(30, abs=0.5)


def test_a_signal_after_the_deadline_does_not_cut_the_save_short():
    stop = StopSignal()  # Slurm's own signal, some seconds later
    stop.received = True
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.received


def test_other_ranks_and_runs_without_slurm_watch_nothing(squeue, monkeypatch, tmp_path):
    squeue("0")
    stop = Flag()
    Deadline(stop, lambda: 0).watch(is_main=False)
    monkeypatch.delenv("SLURM_JOB_ID")
    Deadline(stop, lambda: 0).watch(is_main=True)
    assert "deadline" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "asked").exists()
