"""data.on_bad_image=skip: a step without a readable image is skipped and counted, on every number of ranks."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_ddp import cli, register_metric
from alexnet_ddp.checkpoint import format as ckpt
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.runtime.errors import RunError
from alexnet_ddp.training.trainer import train
from tests.network import QUICK
from tests.ranks import run_ranks

BATCH, STEPS_PER_EPOCH = 6, 4  # 22 images: the last batch of an epoch has 4
SMALL = [
    "device=cpu",
    *QUICK,
    "data=folder",
    "data.image_size=64",
    "data.on_bad_image=skip",
]
SMALL += [
    f"trainer.global_batch_size={BATCH}",
    "trainer.epochs=2",
    "trainer.log_every_steps=1",
    "run.name=r",
]
SMALL += [
    "logger.tensorboard=false",
    "logger.progress=false",
    "trainer.hang_timeout_s=null",
    "scheduler.warmup_epochs=0",
]


def make_images(root: Path) -> Path:
    for split, count in (("train", 22), ("val", 4)):
        for i in range(count):
            rng, path = (
                np.random.default_rng([i, count]),
                root / split / f"class{i % 2}" / f"{i:03d}.jpg",
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 90, (72, 72, 3), dtype=np.uint8)
            pixels[20:50, 20:50, i % 2] += np.uint8(120)
            Image.fromarray(pixels).save(path)
    return root


def spoil(root: Path, *steps: int) -> None:
    """Make every image of these steps (0-based) unreadable."""
    index = open_data(cli.compose([*SMALL, f"data.root={root}"]).data).train
    for step in steps:
        for i in GlobalBatchSampler(22, BATCH, seed=0).batch(step).tolist():
            Path(root, index.name(i)).write_bytes(b"broken")


def run_here(root: Path, runs: Path, *more: str) -> tuple[int, str]:
    """A whole training in this process, as one rank of its world; (exit code, message)."""
    torch.set_num_threads(1)
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    }
    overrides = [*SMALL, f"data.root={root}", f"run.root={runs}", *more]
    try:
        train(cli.compose(overrides), overrides)
        return 0, ""
    except RunError as error:
        return error.exit_code, str(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rows(runs: Path, key: str = "data/index_hash") -> list[dict]:
    lines = (runs / "r/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row and "train/lr" in row]


def weights(runs: Path) -> dict[str, torch.Tensor]:
    return ckpt.read_tensors(max((runs / "r/checkpoints").glob("step-*")), "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [[], ["trainer.micro_batch_size=2", "augment.mixup_alpha=0.4", "augment.cutmix_alpha=1.0"]],
    ids=str,
)
def test_a_batch_of_bad_images_is_skipped_and_counted_alike_on_one_two_and_three_ranks(
    tmp_path, more
):
    root = make_images(tmp_path / "images")
    spoil(root, 1)
    found = {}
    for num_ranks in (1, 2, 3):
        runs = tmp_path / f"runs{num_ranks}"
        assert run_ranks(run_here, num_ranks, root, runs, *more) == [(0, "")] * num_ranks
        by_step = {row["step"]: row for row in rows(runs)}
        assert sorted(by_step) == list(range(1, 9))
        assert [by_step[step].get("train/num_skipped_steps") for step in (1, 2, 8)] == [None, 1, 1]
        assert "train/loss" not in by_step[2]
        assert "train/grad_norm" not in by_step[2]
        assert by_step[2]["data/num_bad_images"] == BATCH
        found[num_ranks] = ([row.get("train/loss") for row in by_step.values()], weights(runs))
    for losses, tensors in (found[2], found[3]):
        assert losses[0::4] == pytest.approx(found[1][0][0::4], rel=1e-4)
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, found[1][1][name], rtol=1e-3, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["parallel.hook=post_local_sgd", "parallel.local_sgd_start_step=0"], ["parallel=hybrid"]],
)
def test_local_sgd_and_a_hybrid_skip_a_step_too(tmp_path, more):
    root = make_images(tmp_path / "images")
    spoil(root, 1)
    hybrid = ["parallel.group_size=2"] if "parallel=hybrid" in more else []
    assert run_ranks(run_here, 2, root, tmp_path / "runs", *more, *hybrid) == [(0, "")] * 2
    assert rows(tmp_path / "runs")[-1]["train/num_skipped_steps"] == 1


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_and_its_count_survives_a_resume(tmp_path):
    root, runs = make_images(tmp_path / "images"), tmp_path / "runs"
    spoil(root, 1)
    assert run_here(root, runs, "trainer.max_steps=1") == (0, "")
    first = weights(runs)
    assert run_here(root, runs, "trainer.max_steps=2") == (0, "")
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(runs).items())
    assert run_here(root, runs, "trainer.max_steps=3") == (0, "")
    assert not all(torch.equal(tensor, first[name]) for name, tensor in weights(runs).items())
    assert rows(runs)[-1]["train/num_skipped_steps"] == 1

    whole = tmp_path / "whole"
    assert run_here(root, whole, "trainer.max_steps=3") == (0, "")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(runs).items())


@pytest.mark.parametrize(("more", "limit"), [([], 4), (["trainer.max_steps=2"], 2)])
def test_an_epoch_without_a_readable_image_ends_the_run(tmp_path, more, limit):
    root, runs = make_images(tmp_path / "images"), tmp_path / "runs"
    spoil(root, *range(STEPS_PER_EPOCH))
    code, message = run_here(root, runs, *more)
    remedy = f"fix or replace the files that {runs}/r/quarantine.jsonl lists, and start the same command again"
    assert (code, message) == (65, f"no image of the last {limit} step(s) could be read; {remedy}")
    assert json.loads((runs / "r/status.json").read_text())["exit_code"] == 65


def test_too_many_bad_images_end_the_run_also_if_they_are_a_whole_batch(tmp_path):
    root = make_images(tmp_path / "images")
    spoil(root, 1)
    code, message = run_here(root, tmp_path / "runs", "data.max_bad_images=5")
    assert code == 65
    assert message.startswith("6 training images are bad, more than data.max_bad_images (5); ")


@pytest.mark.slow
def test_the_training_is_saved_before_an_unreadable_validation_set_ends_the_run(tmp_path):
    root, runs = make_images(tmp_path / "images"), tmp_path / "runs"
    good = {path: path.read_bytes() for path in root.glob("val/*/*.jpg")}
    for path in good:
        os.truncate(path, 20)
    code, message = run_here(root, runs)
    assert (code, message[:49]) == (65, "none of the validation images could be read, such")
    assert [path.name for path in (runs / "r/checkpoints").glob("step-*")] == ["step-00000004"]
    assert run_here(root, runs)[0] == 65
    assert len(rows(runs)) == 4  # nothing was trained again


@pytest.mark.slow
def test_all_ranks_save_before_one_unreadable_validation_image_ends_the_run(tmp_path):
    root, runs = make_images(tmp_path / "images"), tmp_path / "runs"
    next(root.glob("val/*/*.jpg")).write_bytes(b"broken")
    ends = run_ranks(run_here, 2, root, runs, "data.on_bad_image=raise")
    assert [code for code, _ in ends] == [65, 65]
    assert [path.name for path in (runs / "r/checkpoints").glob("step-*")] == ["step-00000004"]


def _run_with_a_metric(root: Path, runs: Path, failing_rank: int) -> tuple[int, str]:
    """A training whose metric returns a wrong result on one rank only."""
    rank = int(os.environ["RANK"])

    @register_metric("fragile")
    def fragile(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return labels[:0] if rank == failing_rank else labels.float()

    return run_here(root, runs, "trainer.metrics=[fragile]", "trainer.eval_batch_size=2")


@pytest.mark.slow
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_all_ranks_save_before_a_metric_that_fails_on_one_rank_ends_the_run(tmp_path, failing_rank):
    root, runs = make_images(tmp_path / "images"), tmp_path / "runs"
    ends = run_ranks(_run_with_a_metric, 2, root, runs, failing_rank)
    assert [code for code, _ in ends] == [64, 64]
    assert all("trainer.metrics (fragile) must return one number per image" in m for _, m in ends)
    assert [path.name for path in (runs / "r/checkpoints").glob("step-*")] == ["step-00000004"]
