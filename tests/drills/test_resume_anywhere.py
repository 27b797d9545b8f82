"""D43, D44: a run goes on with another number of ranks, or of threads, in the middle of an epoch."""

import pytest

from tests.drills.harness import assert_same_run

pytestmark = pytest.mark.drill


def test_d43_with_three_one_two_and_four_ranks_an_epoch_has_every_image_once_and_the_same_losses(
    new_job, calm, measured
):
    job, stops = new_job("ranks"), (6, 13, 19, 26)
    for ranks, step in zip((3, 1, 2, 4), stops):
        job.env["NPROC"] = str(ranks)
        assert job.inject(f"stop rank=0 step={step}").run() == 75, job.said()
    assert job.index_hashes() == {k: v for k, v in calm.index_hashes().items() if k <= 26}
    ours, theirs = ([row["train/loss"] for row in j.rows("train/loss")[:26]] for j in (job, calm))
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    measured["largest difference of a loss, relative"] = float(f"{worst:.1e}")
    assert worst < 1e-5
    assert "world size 3 -> 1" in job.said()


def test_d44_with_other_threads_of_the_loader_three_stops_in_an_epoch_and_one_at_its_end_leave_every_bit_equal(
    new_job, calm, measured
):
    """The threads that decode. Those that torch computes with follow from the cores and the ranks, and stay the same:
    other ones may add in another order.
    """
    job = new_job("threads")
    for threads, step in ((3, 7), (1, 12), (4, 20), (2, 26)):
        assert job.inject(f"stop rank=1 step={step}").run(f"data.num_threads={threads}") == 75, (
            job.said()
        )
        assert job.status()["step"] == step
    assert job.inject("").run("data.num_threads=5") == 0, job.said()
    assert_same_run(job, calm)
    measured["resumptions"] = 4
