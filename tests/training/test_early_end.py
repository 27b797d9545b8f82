"""trainer.patience, trainer.max_hours and trainer.eval_every_steps, through the command."""

import re

import pytest

from tests.test_train import SMALL, rows, run, sha_of_newest, status

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("early end")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_folder):
    """(overrides, run directory) of a run to its last step, evaluated every four steps."""
    root = tmp_path_factory.mktemp("early")
    same = [*SMALL, f"data.root={image_folder}", f"run.root={root}", "trainer.eval_every_steps=4"]
    same += ["trainer.max_steps=18", "trainer.epochs=9"]
    assert run("train", *same, "run.name=whole", cwd=root).returncode == 0
    return same, root / "whole"


def steps_of(run_dir):
    return [row["step"] for row in rows(run_dir, "val/top1")]


def test_a_run_is_evaluated_every_so_many_steps_and_at_its_end(whole):
    assert steps_of(whole[1]) == [4, 8, 12, 16, 18]


def test_without_a_better_result_a_run_ends_early_and_more_patience_continues_it(whole, tmp_path):
    same, complete = whole
    run_dir = complete.parent / "patient"
    stuck = [*same, f"run.name={run_dir.name}", "optimizer.lr=1e-12"]  # val/top1 stays the same
    done = run("train", *stuck, "trainer.patience=2", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert steps_of(run_dir) == [4, 8, 12]
    assert "the run ends after step 12 of 18, after " in done.stdout
    assert done.stdout.count("best evaluation: step 4  val/top1 ") == 1  # of two ranks
    assert status(run_dir)["state"] == "complete"
    again = run("train", *stuck, "trainer.patience=2", ranks=2, cwd=tmp_path)
    assert again.returncode == 0
    assert "is complete after 12 steps" in again.stdout
    more = run("train", *stuck, "trainer.patience=3", ranks=2, cwd=tmp_path)
    assert more.returncode == 0
    assert steps_of(run_dir) == [4, 8, 12, 16]  # 1 best and 3 others
    assert [row["step"] for row in rows(run_dir, "train/loss")][-1] == 16


def test_a_run_ends_after_its_hours_and_without_the_limit_ends_with_the_same_bits(whole, tmp_path):
    same, complete = whole
    run_dir = complete.parent / "late"
    limited = [*same, f"run.name={run_dir.name}"]
    done = run("train", *limited, "trainer.max_hours=1e-9", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert steps_of(run_dir) == [1]
    assert re.search(r"the run ends after step 1 of 18, after \S+ hours of training", done.stdout)
    again = run("train", *limited, "trainer.max_hours=1e-9", cwd=tmp_path)
    assert "is complete after 1 steps" in again.stdout
    assert run("train", *limited, cwd=tmp_path).returncode == 0
    assert steps_of(run_dir) == [1, 4, 8, 12, 16, 18]
    assert sha_of_newest(run_dir) == sha_of_newest(complete)
