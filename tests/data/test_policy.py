"""RandAugment and TrivialAugment: torchvision's operations to the pixel, drawn by (seed, epoch, index) alone."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from alexnet_ddp import rng
from alexnet_ddp.config import BasicAugmentConfig, FolderConfig, Policy
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import Loader, build_loader
from alexnet_ddp.data.policy import NUM_BINS, OPERATIONS, draw_operations, magnitude, operate
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.sets import open_data

THEIRS = {Policy.randaugment: v2.RandAugment, Policy.trivialaugment: v2.TrivialAugmentWide}
SIGNED = OPERATIONS[1:10]


def pixels(size=40, seed=0) -> np.ndarray:
    """Waves, an edge and noise: nowhere symmetric, all channels different. uint8 [size, size, 3]."""
    draw = np.random.default_rng(seed)
    x = np.linspace(0, 7, size)
    image = 100 + 60 * np.sin(x[:, None, None] * [1, 0.7, 1.9] + x[None, :, None] * [0.4, 2.1, 1.0])
    image[size // 3 :, size // 2 :] -= 30
    return (image + draw.normal(0, 12, image.shape)).clip(0, 230).astype(np.uint8)


def torchvisions(policy, name, bin_, sign, image) -> np.ndarray:
    """What the transform of that name does when it happens to draw these."""
    transform = THEIRS[policy](interpolation=v2.InterpolationMode.BILINEAR)
    magnitudes_of, signed = transform._AUGMENTATION_SPACE[name]
    size = image.shape[0]
    magnitudes = magnitudes_of(NUM_BINS, size, size)
    amount = 0.0 if magnitudes is None else float(magnitudes[bin_]) * (sign if signed else 1)
    tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    fill = transform._fill
    changed = transform._apply_image_or_video_transform(
        tensor, name, amount, transform.interpolation, fill
    )
    return changed.permute(1, 2, 0).numpy()


@pytest.mark.sampled
@pytest.mark.parametrize(("policy", "name"), [*product(THEIRS, OPERATIONS)])
def test_every_operation_at_every_magnitude_gives_torchvisions_pixels(policy, name):
    for bin_, sign in product(range(NUM_BINS), (-1, 1)):
        size = 40 + bin_ % 2
        slot = pixels(size)
        expected = torchvisions(policy, name, bin_, sign, slot.copy())
        operate(slot, [(name, magnitude(policy, name, bin_, sign, size))])
        assert np.array_equal(slot, expected), (bin_, sign)


def test_the_operations_are_torchvisions_and_all_but_identity_change_something():
    for policy, theirs in THEIRS.items():
        assert set(OPERATIONS) == set(theirs._AUGMENTATION_SPACE)
        assert {name for name in OPERATIONS if theirs._AUGMENTATION_SPACE[name][1]} == set(SIGNED)
        for name in OPERATIONS[1:]:
            slot = pixels()
            operate(slot, [(name, magnitude(policy, name, 25, -1, 40))])
            assert not np.array_equal(slot, pixels()), name


def test_operations_are_applied_one_after_the_other_in_place():
    steps = [("Rotate", 30.0), ("Solarize", 0.5), ("TranslateX", 7.0)]
    once, stepwise = pixels(), pixels()
    operate(once, steps)
    for step in steps:
        operate(stepwise, [step])
    assert np.array_equal(once, stepwise)
    assert (once[:, :7] == 0).all()  # what comes in from outside is black


def drawn(n=20_000, seed=0, epoch=0, first=0, **knobs):
    cfg = BasicAugmentConfig(**knobs)
    return draw_operations(cfg, rng.fold(seed, rng.POLICY, epoch), np.arange(first, first + n), 64)


def test_randaugment_draws_operations_evenly_and_independently_at_one_magnitude():
    found = drawn(policy=Policy.randaugment)
    assert {len(steps) for steps in found} == {2}
    pairs = Counter((a, b) for (a, _), (b, _) in found)
    assert stats.chisquare([pairs[pair] for pair in product(OPERATIONS, repeat=2)]).pvalue > 1e-3
    amounts = {
        name: {amount for steps in found for n, amount in steps if n == name} for name in OPERATIONS
    }
    for name in OPERATIONS:
        expected = {magnitude(Policy.randaugment, name, 9, sign, 64) for sign in (-1, 1)}
        assert amounts[name] == expected
        assert len(expected) == (2 if name in SIGNED else 1)
    rotations = [amount for steps in found for name, amount in steps if name == "Rotate"]
    assert np.mean(np.sign(rotations)) == pytest.approx(0, abs=4 / np.sqrt(len(rotations)))


def test_trivialaugment_draws_one_operation_and_its_magnitude_evenly():
    found = drawn(policy=Policy.trivialaugment)
    assert {len(steps) for steps in found} == {1}
    names = Counter(name for ((name, _),) in found)
    assert stats.chisquare([names[name] for name in OPERATIONS]).pvalue > 1e-3
    bins = Counter(round(abs(amount) / 135 * 30) for ((name, amount),) in found if name == "Rotate")
    assert stats.chisquare([bins[k] for k in range(NUM_BINS)]).pvalue > 1e-3


def test_the_options_of_randaugment_take_effect():
    assert {len(steps) for steps in drawn(10, policy=Policy.randaugment, num_ops=5)} == {5}
    found = drawn(2_000, policy=Policy.randaugment, magnitude=30)
    assert {abs(amount) for steps in found for name, amount in steps if name == "Rotate"} == {30.0}
    assert drawn(3) == [[], [], []]


@pytest.mark.parametrize("policy", THEIRS)
def test_operations_depend_on_seed_epoch_and_index_only_and_not_on_the_batch(policy):
    whole = drawn(300, policy=policy)
    assert drawn(1, first=17, policy=policy) == whole[17:18]
    assert drawn(100, first=200, policy=policy) == whole[200:]
    for other in (
        drawn(300, seed=1, policy=policy),
        drawn(300, epoch=1, policy=policy),
        drawn(300, 1, policy=policy),
    ):
        assert np.mean([a == b for a, b in zip(whole, other)]) < 0.3


@pytest.mark.parametrize("policy", THEIRS)
def test_pixels_of_a_policy_do_not_depend_on_threads_ranks_or_micro_batches(image_folder, policy):
    data = FolderConfig(root=str(image_folder), image_size=64)
    index, shown = open_data(data).train, []
    for num_threads, batch, world_size, micro in ((1, 103, 1, None), (3, 17, 1, 5), (2, 40, 3, 7)):
        sampler, found = GlobalBatchSampler(103, batch, seed=0), {}
        for rank in range(world_size):
            augment = build_augment(BasicAugmentConfig(policy=policy), 0, 64, 73)
            loader = build_loader(data, index, augment, num_threads, torch.device("cpu"))
            for seen in loader.batches(
                sampler.micro_batches(range(sampler.steps_per_epoch), rank, world_size, micro)
            ):
                found |= {
                    int(i): image.numpy().tobytes() for i, image in zip(seen.indices, seen.images)
                }
            loader.close()
        shown.append(found)
    assert len(shown[0]) == 103
    assert shown[0] == shown[1] == shown[2]
    plain = build_loader(
        data, index, build_augment(BasicAugmentConfig(), 0, 64, 73), 1, torch.device("cpu")
    )
    (whole,) = plain.batches(
        GlobalBatchSampler(103, 103, seed=0).micro_batches(range(1), 0, 1, None)
    )
    plain.close()
    changed = [
        shown[0][int(i)] != image.numpy().tobytes() for i, image in zip(whole.indices, whole.images)
    ]
    assert np.mean(changed) > 0.8


def test_the_kernels_of_a_policy_run_on_one_thread_and_leave_the_others_theirs():
    before = torch.get_num_threads()
    seen = set()

    def fill(slots, indices, epoch):
        seen.add(torch.get_num_threads())
        return []

    loader = Loader(fill, np.zeros(103, np.int32), None, lambda epoch: 4, 2, torch.device("cpu"))
    assert (
        len(
            list(
                loader.batches(
                    GlobalBatchSampler(103, 50, seed=0).micro_batches(range(3), 0, 1, None)
                )
            )
        )
        == 3
    )
    loader.close()
    assert seen == {1}
    assert torch.get_num_threads() == before
