"""Which image comes when, and to whom: every image once an epoch, the same global batches for every world."""

import time
from itertools import product

import numpy as np
import pytest

from alexnet_ddp import rng
from alexnet_ddp.config import ConfigError
from alexnet_ddp.data.sampler import (
    GlobalBatchSampler,
    Windows,
    evaluation_batches,
    index_hash,
    micro_batch_sizes,
    rank_slice,
)

N = 1_003
BATCHES = (7, 64)
WORLDS = (1, 2, 3, 4, 5)


def plan_of(sampler, steps, rank=0, world_size=1, micro_batch_size=None):
    """The Works as comparable tuples."""
    found = sampler.micro_batches(steps, rank, world_size, micro_batch_size)
    return [
        (micro_batch.step, micro_batch.epoch, micro_batch.indices.tolist(), micro_batch.is_last)
        for micro_batch in found
    ]


@pytest.mark.parametrize(("batch", "world_size", "micro"), [*product(BATCHES, WORLDS, (None, 3))])
def test_every_image_comes_exactly_once_an_epoch(batch, world_size, micro):
    sampler = GlobalBatchSampler(N, batch, seed=5)
    for epoch in (0, 1):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        parts = [
            w
            for rank in range(world_size)
            for w in sampler.micro_batches(steps, rank, world_size, micro)
        ]
        assert np.array_equal(np.sort(np.concatenate([w.indices for w in parts])), np.arange(N))
        assert {w.epoch for w in parts} == {epoch}
        assert max(len(w.indices) for w in parts) <= (micro or batch)
        assert all(w.indices.dtype == np.int64 for w in parts)


@pytest.mark.parametrize(("batch", "world_size", "micro"), [*product(BATCHES, WORLDS, (None, 3))])
def test_the_slices_of_the_ranks_are_contiguous_and_together_the_global_batch(
    batch, world_size, micro
):
    sampler = GlobalBatchSampler(N, batch, seed=5)
    for step in (0, 1, sampler.steps_per_epoch - 1, sampler.steps_per_epoch):
        slices = [
            [
                i
                for _, _, indices, _ in plan_of(
                    sampler, range(step, step + 1), rank, world_size, micro
                )
                for i in indices
            ]
            for rank in range(world_size)
        ]
        assert [i for s in slices for i in s] == sampler.batch(step).tolist()
        sizes = [len(s) for s in slices]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == -(-len(sampler.batch(step)) // world_size)


@pytest.mark.parametrize("n", [1, 2, 17, 3_000])
def test_an_epoch_is_the_permutation_of_its_key_from_any_start(n):
    for batch, epoch in product((1, 7, 1_000, 4_000), (0, 3)):
        whole = rng.permutation(rng.fold(5, rng.ORDER, epoch), n)
        for k in range(0, -(-n // batch), max(1, n // batch // 5)):
            sampler = GlobalBatchSampler(n, batch, seed=5)
            found = sampler.batch(epoch * sampler.steps_per_epoch + k)
            assert found.dtype == np.int64
            assert np.array_equal(found, whole[k * batch : (k + 1) * batch])


def test_rank_slices_cover_any_number_of_items():
    for n, world_size in product(range(20), range(1, 9)):
        slices = [rank_slice(n, rank, world_size) for rank in range(world_size)]
        assert [i for s in slices for i in range(n)[s]] == list(range(n))
        sizes = [s.stop - s.start for s in slices]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        assert sizes[0] == -(-n // world_size)


@pytest.mark.parametrize(
    ("batch", "drop_last", "steps", "last"),
    [
        (7, False, 144, 2),
        (7, True, 143, 7),
        (64, False, 16, 43),
        (64, True, 15, 64),
        (59, False, 17, 59),
        (N, True, 1, N),
        (2_000, False, 1, N),
    ],
)
def test_the_last_batch_of_an_epoch_is_smaller_or_dropped(batch, drop_last, steps, last):
    sampler = GlobalBatchSampler(N, batch, seed=0, drop_last=drop_last)
    assert sampler.steps_per_epoch == steps
    assert [len(sampler.batch(step)) for step in range(steps)] == [min(batch, N)] * (steps - 1) + [
        last
    ]
    epoch = np.concatenate([sampler.batch(step) for step in range(steps, 2 * steps)])
    assert len(np.unique(epoch)) == len(epoch) == (steps - 1) * batch + last
    rest = GlobalBatchSampler(N, batch, seed=0)
    whole = np.concatenate([rest.batch(step) for step in range(rest.steps_per_epoch)])
    assert np.array_equal(
        whole[: len(epoch)], np.concatenate([sampler.batch(step) for step in range(steps)])
    )


def test_a_batch_that_drop_last_would_leave_without_an_epoch_is_refused():
    with pytest.raises(ConfigError) as error:
        GlobalBatchSampler(N, N + 1, seed=0, drop_last=True)
    assert str(error.value) == (
        "trainer.global_batch_size (1004) exceeds the 1003 training images and trainer.drop_last drops the incomplete "
        "batch; use at most 1003"
    )


@pytest.mark.parametrize(
    ("batch", "world_size", "micro"), [*product((1, 2, *BATCHES), WORLDS, (None, 3))]
)
def test_previous_is_the_image_before_in_the_global_batch_however_it_is_cut(
    batch, world_size, micro
):
    sampler = GlobalBatchSampler(N, batch, seed=5)
    for step in (0, sampler.steps_per_epoch - 1):
        whole = sampler.batch(step).tolist()
        before = dict(zip(whole, [whole[-1], *whole[:-1]]))
        for rank in range(world_size):
            for micro_batch in sampler.micro_batches(
                range(step, step + 1), rank, world_size, micro
            ):
                assert micro_batch.previous == (
                    before[micro_batch.indices[0]] if len(micro_batch.indices) else None
                )


@pytest.mark.parametrize(("batch", "micro"), [*product(BATCHES, (None, 3))])
def test_starting_at_any_step_gives_the_same_works_as_skipping_to_it(batch, micro):
    per_epoch = GlobalBatchSampler(N, batch, seed=3).steps_per_epoch
    end = 2 * per_epoch + 5
    whole = plan_of(GlobalBatchSampler(N, batch, seed=3), range(end), 1, 3, micro)
    for start in (1, per_epoch - 1, per_epoch, per_epoch + 7, end - 1, end):
        resumed = plan_of(GlobalBatchSampler(N, batch, seed=3), range(start, end), 1, 3, micro)
        assert resumed == [micro_batch for micro_batch in whole if micro_batch[0] >= start]


def test_the_global_batches_depend_on_seed_and_epoch_and_on_nothing_else():
    sampler = GlobalBatchSampler(N, 64, seed=0)
    assert np.array_equal(sampler.batch(3), GlobalBatchSampler(N, 64, seed=0).batch(3))
    others = [
        sampler.batch(3 + sampler.steps_per_epoch),
        GlobalBatchSampler(N, 64, seed=1).batch(3),
        sampler.batch(4),
    ]
    for other in others:
        assert len(np.intersect1d(sampler.batch(3), other)) < 20
    small = np.concatenate([GlobalBatchSampler(N, 7, seed=0).batch(step) for step in range(144)])
    assert np.array_equal(
        small[:64], sampler.batch(0)
    )  # the order of an epoch does not depend on the batch size


def test_a_rank_without_images_has_exactly_one_empty_work_a_step():
    sampler = GlobalBatchSampler(N, 7, seed=0)  # the last batch has 2 images
    for rank in (2, 3, 4):
        assert plan_of(sampler, range(143, 144), rank, 5, 3) == [(143, 0, [], True)]
        assert plan_of(sampler, range(143, 144), rank, 5) == [(143, 0, [], True)]
    one = GlobalBatchSampler(N, 1, seed=0)
    assert plan_of(one, range(3), 1, 2) == [(step, 0, [], True) for step in range(3)]


@pytest.mark.parametrize("micro", [None, 1, 2, 3, 64])
def test_only_the_last_work_of_a_step_is_last(micro):
    sampler = GlobalBatchSampler(N, 64, seed=0)
    found = plan_of(sampler, range(20), 1, 3, micro)
    for micro_batch, following in zip(found, [*found[1:], (20,)]):
        assert micro_batch[3] == (following[0] != micro_batch[0])
    assert [micro_batch[0] for micro_batch in found if micro_batch[3]] == list(range(20))
    sizes = [len(indices) for step, _, indices, _ in found if step == 0]
    # Rank 0 has 22 images: where that is one pass more, this one takes part in it without images.
    assert (
        sizes
        == {None: [21], 1: [1] * 21 + [0], 2: [2] * 10 + [1], 3: [3] * 7 + [0], 64: [21]}[micro]
    )


@pytest.mark.parametrize(
    ("n", "world_size", "micro"), [*product((1, 2, 7, 64, 65), (1, 2, 3, 5, 40), (None, 1, 3, 64))]
)
def test_all_ranks_make_the_same_passes_and_none_is_larger_than_its_slots(n, world_size, micro):
    slots = micro_batch_sizes(n, world_size, micro)
    for rank in range(world_size):
        found = plan_of(GlobalBatchSampler(n, n, seed=0), range(1), rank, world_size, micro)
        assert len(found) == len(slots)
        assert all(len(indices) <= size for (_, _, indices, _), size in zip(found, slots))
    assert sum(slots) == max(1, -(-n // world_size))


@pytest.mark.parametrize(("batch", "world_size"), [*product((*BATCHES, 2_000), (*WORLDS, 40))])
def test_evaluation_deals_whole_batches_of_a_fixed_grid_and_every_image_once(batch, world_size):
    ranks = [list(evaluation_batches(N, batch, rank, world_size)) for rank in range(world_size)]
    assert len({len(found) for found in ranks}) == 1
    for found in ranks:
        assert [micro_batch.step for micro_batch in found] == list(range(len(found)))
        assert [micro_batch.is_last for micro_batch in found] == [False] * (len(found) - 1) + [True]
    in_turn = [micro_batch.indices for round_ in zip(*ranks) for micro_batch in round_]
    full = [chunk for chunk in in_turn if len(chunk)]
    assert np.array_equal(np.concatenate(in_turn), np.arange(N))
    assert [(chunk[0], len(chunk)) for chunk in full] == [
        (k, min(batch, N - k)) for k in range(0, N, batch)
    ]
    assert len(in_turn) - len(full) < world_size  # no round is empty for all
    assert all(chunk.dtype == np.int64 for chunk in in_turn)


def test_the_hash_of_a_batch_names_its_images_in_order():
    batch = GlobalBatchSampler(N, 64, seed=0).batch(0)
    name = index_hash(batch)
    assert len(name) == 16
    assert int(name, 16) >= 0
    assert (
        name
        == index_hash(batch.copy())
        == index_hash(batch.astype(np.int32))
        == index_hash(np.repeat(batch, 2)[::2])
    )
    swapped = batch.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    others = [
        batch[::-1],
        swapped,
        batch[:-1],
        np.sort(batch),
        GlobalBatchSampler(N, 64, seed=0).batch(1),
    ]
    assert len({name, *map(index_hash, others)}) == 6


def test_the_first_batches_of_seed_zero_are_pinned():
    assert GlobalBatchSampler(N, 5, seed=0).batch(0).tolist() == [984, 293, 114, 745, 757]
    assert index_hash(GlobalBatchSampler(1_281_167, 256, seed=0).batch(0)) == "b8ea870c9bf16b79"


# --- windows of shards ------------------------------------------------------------------------------------------


def packed(n: int, num_shards: int) -> np.ndarray:
    """The shard of each image, as a preparation deals them: at random, balanced to within one."""
    shards = np.empty(n, np.uint32)
    for k, part in enumerate(np.array_split(rng.permutation(99, n), num_shards)):
        shards[part] = k
    return shards


def windowed(
    batch: int = 64, num_shards: int = 20, size: int = 3, seed: int = 5
) -> GlobalBatchSampler:
    return GlobalBatchSampler(N, batch, seed, windows=Windows(packed(N, num_shards), size))


def epoch_of(sampler: GlobalBatchSampler, epoch: int) -> np.ndarray:
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return np.concatenate([sampler.batch(step) for step in steps])


def test_by_windows_every_image_comes_once_and_few_shards_are_read_at_a_time():
    sampler, shards = windowed(), packed(N, 20)
    orders = [epoch_of(sampler, epoch) for epoch in (0, 1)]
    seen = []
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(N))
        runs = np.split(
            shards[order],
            np.cumsum([len(shards[np.isin(shards, w)]) for w in windows_of(shards[order])]),
        )
        assert [len(np.unique(run)) for run in runs if len(run)] == [3] * 6 + [2]
        seen.append(windows_of(shards[order]))
    assert seen[0] != seen[1]  # other shards together in another epoch
    assert not np.array_equal(*orders)


def windows_of(shards: np.ndarray) -> list[tuple[int, ...]]:
    """The shards of each window of three, in the order of an epoch."""
    found: list[tuple[int, ...]] = []
    rest = shards
    while len(rest):
        first = list(dict.fromkeys(rest.tolist()))[:3]
        found.append(tuple(sorted(first)))
        rest = rest[np.isin(rest, first).sum() :]
    return found


def test_windows_are_a_function_of_seed_epoch_and_shards_alone():
    assert np.array_equal(epoch_of(windowed(), 1), epoch_of(windowed(batch=7), 1))
    for other in (windowed(seed=6), windowed(num_shards=19), windowed(size=4)):
        assert not np.array_equal(epoch_of(windowed(), 0), epoch_of(other, 0))
    whole = windowed(size=20)
    assert np.array_equal(
        epoch_of(whole, 0), epoch_of(GlobalBatchSampler(N, 64, 5), 0)
    )  # one window: the full shuffle


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_windows_are_exact_from_any_step_and_on_any_number_of_ranks(world_size):
    whole, end = windowed(), 2 * windowed().steps_per_epoch
    for start in (0, 5, whole.steps_per_epoch - 1):
        found = [
            plan_of(windowed(), range(start, end), rank, world_size) for rank in range(world_size)
        ]
        for step, parts in zip(range(start, end), zip(*found)):
            assert [i for _, _, indices, _ in parts for i in indices] == whole.batch(step).tolist()


def test_windows_have_equal_sizes_even_if_a_subset_lacks_some_shards():
    shards = packed(N, 17)
    order = epoch_of(windowed(num_shards=17, size=16), 0)
    assert [len(np.unique(shards[order[part]])) for part in (slice(0, 450), slice(-450, None))] == [
        9,
        8,
    ]
    kept = np.flatnonzero(~np.isin(packed(N, 100), [0, 3, 50, 99]))
    some = packed(N, 100)[kept]
    order = epoch_of(GlobalBatchSampler(len(kept), 10, 5, windows=Windows(some, 12)), 2)
    assert np.array_equal(np.sort(order), np.arange(len(kept)))
    assert (
        len(np.unique(some[order[:105]])) == 12
    )  # of the 96 shards that are left, in eight windows of about 120 images


@pytest.fixture(scope="module")
def imagenet() -> tuple[np.ndarray, np.ndarray]:
    """Labels and shards of something like ImageNet: 1,281,167 images of 1,000 classes in 1,024 shards."""
    labels = np.sort(np.arange(1_281_167, dtype=np.int32) % 1_000)
    return labels, packed(len(labels), 1_024)


def classes_a_batch(labels: np.ndarray, order: np.ndarray, batch: int) -> float:
    """Distinct ones, on average over the whole batches."""
    rows = np.sort(labels[order[: len(order) // batch * batch]].reshape(-1, batch), axis=1)
    return float((np.diff(rows, axis=1) != 0).sum(axis=1).mean() + 1)


def pairs_that_meet_again(sampler: GlobalBatchSampler) -> int:
    """Pairs of images that are in one batch in epoch 0 and in one batch in epoch 1."""
    batch = np.arange(sampler.num_images) // sampler.global_batch_size
    both = np.zeros(sampler.num_images, np.int64)
    for epoch in (0, 1):
        both[epoch_of(sampler, epoch)] += batch << 20 * epoch
    counts = np.unique(both, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [256, 1_024])
def test_batches_of_windows_are_as_mixed_as_those_of_the_full_shuffle(imagenet, batch):
    """And images of one batch meet again S/k^2 + (1 - 1/k)^2 = 4.88 times as often: what a window of 16 costs."""
    labels, shards = imagenet
    full = GlobalBatchSampler(len(labels), batch, 0)
    few = GlobalBatchSampler(len(labels), batch, 0, windows=Windows(shards, 16))
    began = time.process_time()
    few.batch(0)
    assert time.process_time() - began < 1
    mixed = classes_a_batch(labels, epoch_of(full, 0), batch)
    assert classes_a_batch(labels, epoch_of(few, 0), batch) == pytest.approx(mixed, rel=0.01)
    assert pairs_that_meet_again(few) / pairs_that_meet_again(full) == pytest.approx(4.88, rel=0.06)


def test_the_fingerprint_of_windows_depends_on_shards_and_window_size():
    one = Windows(packed(N, 20), 3).fingerprint()
    assert one == Windows(packed(N, 20).astype(np.int64), 3).fingerprint()
    assert one not in (
        Windows(packed(N, 20), 4).fingerprint(),
        Windows(packed(N, 19), 3).fingerprint(),
    )
