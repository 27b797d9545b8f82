"""data.sampling: exact class counts in every epoch, as a function of (seed, epoch), for every world size."""

import itertools

import numpy as np
import pytest
import torch

from alexnet_ddp.config import BasicAugmentConfig, ConfigError, FolderConfig, NoAugmentConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler, Windows
from alexnet_ddp.data.sampling import build_sampling, describe
from alexnet_ddp.data.sources.sets import open_data
from tests.test_train import SMALL, rows, run, sha_of_newest, start_and_hit

SIZES = [100, 7, 20, 1]
N = sum(SIZES)
LABELS = np.repeat(np.arange(4, dtype=np.int32), SIZES)
CLASSES = ["cat", "dog", "eel", "fox"]


def classes_of(draws):
    return np.bincount(LABELS[draws % N], minlength=4).tolist()


@pytest.mark.parametrize(
    ("chosen", "counts"),
    [
        ("balanced", [32, 32, 32, 32]),
        ("sqrt", [71, 19, 31, 7]),  # 10, 2.65, 4.47 and 1 of 18.12
        ([3.0, 1.0, 0.0, 0.0], [96, 32, 0, 0]),
        ([1.0, 1.0, 1.0, 0.1], [41, 41, 42, 4]),
    ],
)
def test_every_epoch_has_the_stated_number_of_images_of_each_class(chosen, counts):
    sampling = build_sampling(chosen, LABELS, CLASSES)
    assert sum(counts) == N
    assert sorted(sampling.counts) == sorted(
        counts
    )  # which of equal fractions is rounded up is free
    for epoch in range(4):
        draws = sampling.draws(5, epoch)
        assert draws.dtype == np.int64
        assert classes_of(draws) == sampling.counts.tolist()
        assert len(np.unique(draws)) == N  # a repeat is another draw


def test_the_images_of_a_class_take_turns_also_across_epochs():
    sampling, seen = build_sampling("balanced", LABELS, CLASSES), np.zeros(N, np.int64)
    for epoch in range(9):
        seen += np.bincount(sampling.draws(5, epoch) % N, minlength=N)
        for c in range(4):
            of_class = seen[c == LABELS]
            assert of_class.max() - of_class.min() <= 1
            assert of_class.sum() == 32 * (epoch + 1)


def test_an_epoch_depends_on_the_seed_and_the_epoch_only():
    sampling = build_sampling("balanced", LABELS, CLASSES)
    first = sampling.draws(5, 3)
    assert np.array_equal(first, build_sampling("balanced", LABELS, CLASSES).draws(5, 3))
    assert not np.array_equal(first, sampling.draws(5, 4))
    assert not np.array_equal(first, sampling.draws(6, 3))


@pytest.mark.parametrize("windows", [None, Windows(np.arange(N, dtype=np.uint32) % 16, 4)])
def test_the_batches_of_an_epoch_are_its_draws_for_every_world_size(windows):
    sampling = build_sampling("balanced", LABELS, CLASSES)
    sampler = GlobalBatchSampler(N, 17, seed=5, windows=windows, sampling=sampling)
    steps = range(sampler.steps_per_epoch, 2 * sampler.steps_per_epoch)
    batches = np.concatenate([sampler.batch(step) for step in steps])
    assert sorted(batches) == sorted(sampling.draws(5, 1))
    assert not np.array_equal(batches, sampling.draws(5, 1))  # shuffled
    for world_size in (1, 2, 3):
        ranks = [sampler.micro_batches(steps, rank, world_size, 4) for rank in range(world_size)]
        found = [m.indices.tolist() for works in ranks for m in works]
        assert sorted(itertools.chain(*found)) == sorted(batches)


def test_refused_numbers_name_the_option_the_rule_and_the_remedy():
    with pytest.raises(ConfigError, match=r"has 2 numbers, the data has 4 classes; give one for"):
        build_sampling([1.0, 2.0], LABELS, CLASSES)
    with pytest.raises(ConfigError, match=r"class gnu, which has no training images; give it"):
        build_sampling([1.0] * 5, LABELS, [*CLASSES, "gnu"])
    many = np.concatenate([np.zeros(100_000, np.int32), np.ones(1, np.int32)])
    with pytest.raises(ConfigError, match=r"each image of class 1 .* 50,000 times an epoch; give"):
        build_sampling("balanced", many, ["a", "b"])


def test_one_line_states_the_counts_and_the_largest_repeat():
    found = describe(build_sampling("balanced", LABELS, CLASSES), CLASSES)
    assert found == (
        "an epoch has 32 images of a class; an image of fox is drawn 32.0 times, the most often"
    )


def test_the_repeats_of_an_image_have_its_label_and_their_own_crops(image_folder):
    cfg = FolderConfig(root=str(image_folder), image_size=48)
    images = open_data(cfg).train
    sampling = build_sampling([0, 0, 1, 0, 0], images.labels, images.classes)
    sampler = GlobalBatchSampler(len(images), len(images), seed=0, sampling=sampling)

    def loaded(how):
        augment = build_augment(how, 0, 48, 55)
        loader = build_loader(cfg, images, augment, 1, torch.device("cpu"))
        (batch,) = loader.batches(sampler.micro_batches(range(1), 0, 1, None))
        assert batch.labels.tolist() == [2] * len(images)
        by_image = {}
        for draw, pixels in zip(batch.indices.tolist(), batch.images.numpy()):
            by_image.setdefault(draw % len(images), []).append(pixels.tobytes())
        loader.close()
        return by_image.values()

    assert all(len(set(copies)) == 1 for copies in loaded(NoAugmentConfig()))
    for copies in loaded(BasicAugmentConfig()):
        assert len(copies) >= 4
        assert len(set(copies)) == len(copies)


BALANCED = [
    "data.sampling=[1,1,1,1,3]",
    "trainer.class_weights=[1,2,1,1,3]",
    "trainer.max_steps=12",
]


@pytest.mark.slow
def test_with_weighted_sampling_the_world_size_and_kills_change_nothing(image_folder, tmp_path):
    same = [*SMALL, f"data.root={image_folder}", *BALANCED, f"run.root={tmp_path}"]
    found = {}
    for ranks in (1, 2, 3):
        done = run("train", *same, f"run.name=r{ranks}", ranks=ranks, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        found[ranks] = rows(tmp_path / f"r{ranks}", "train/loss")
    assert "data.sampling=" in done.stdout
    for ranks in (2, 3):
        assert [r["data/index_hash"] for r in found[ranks]] == [
            r["data/index_hash"] for r in found[1]
        ]
        assert [r["train/loss"] for r in found[ranks]] == pytest.approx(
            [r["train/loss"] for r in found[1]], rel=1e-5
        )
    killed = [*same, "run.name=killed", "checkpoint.save_every_steps=3"]
    for more_rows in (4, 3):
        assert start_and_hit(9, killed, tmp_path / "killed", more_rows, ranks=2)
    assert run("train", *killed, ranks=2, cwd=tmp_path).returncode == 0
    assert sha_of_newest(tmp_path / "killed") == sha_of_newest(tmp_path / "r2")
