"""The counter-based hash: uniform, independent between neighbours, the same everywhere and in every version."""

import numpy as np
import pytest
import torch
from scipy import stats

from alexnet_ddp import rng

WORD = 0xFFFF_FFFF
MANY = np.arange(1 << 16, dtype=np.int32)
USES = (
    *(rng.ORDER, rng.CROP, rng.FLIP, rng.COLOUR, rng.DROPOUT, rng.SUBSET, rng.SYNTHETIC),
    *(rng.POLICY, rng.JITTER, rng.ERASE, rng.MIX, rng.SHARDS),
)

# What version 0.1 gave. A change here changes the data order and the masks of every run that is resumed: do not.
PINNED_MIX = [0, 1753845952, 3507691905, 2368339896, 3427483940, 3861431939, 1734902346]
PINNED_FOLD = [0, -12707885, -1378399106, -1621972388]
PINNED_HASH = [-1536347244, 787587137, 1789280540, 1718765512, -644642137]
PINNED_ORDER = [2, 3, 1, 8, 10, 11, 0, 5, 4, 9, 6, 7]
PINNED_UNIFORMS = [[578692802, 3016642719, 3334986027], [1903625486, 2080369416, 2588677290]]
PINNED_NORMALS = [-1.0179683972849982, 0.6578498595367475]


def lowbias32(x: int) -> int:
    """Wellons' C code, on Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def unsigned(words) -> np.ndarray:
    return np.asarray(words).view(np.uint32).astype(np.int64)


def assert_uniform(cells: np.ndarray, num_cells: int) -> None:
    p = stats.chisquare(np.bincount(cells, minlength=num_cells)).pvalue
    assert 1e-3 < p < 1 - 1e-6


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    """The pairs of two sequences of words fill a 16 x 16 grid evenly, by their upper and by their lower bits."""
    a, b = unsigned(a), unsigned(b)
    assert_uniform((a >> 28) * 16 + (b >> 28), 256)
    assert_uniform((a & 15) * 16 + (b & 15), 256)


def test_mix_is_lowbias32_and_known_words_are_pinned():
    x = [0, 1, 2, 0x7FFF_FFFF, 0x8000_0000, 0xDEAD_BEEF, 0xFFFF_FFFF]
    mixed = rng.mix(np.array(x, dtype=np.uint32).view(np.int32))
    assert mixed.dtype == np.int32
    assert unsigned(mixed).tolist() == [lowbias32(word) for word in x]
    assert unsigned(mixed).tolist() == PINNED_MIX


def test_mix_is_a_bijection_and_each_input_bit_flips_half_of_the_output_bits():
    words = rng.hash32(5, MANY[: 1 << 13])
    assert len(np.unique(rng.mix(MANY))) == len(MANY)
    for bit in range(32):
        flipped = unsigned(
            rng.mix(words) ^ rng.mix(words ^ np.int32(np.uint32(1 << bit).view(np.int32)))
        )
        share = np.array([(flipped >> out & 1).mean() for out in range(32)])
        assert abs(share - 0.5).max() < 0.04


def test_numpy_and_torch_give_the_same_words_on_the_whole_range_of_coordinates():
    edges = np.array([-(2**31), -1, 0, 1, 2**31 - 1], dtype=np.int32)
    index = np.concatenate([edges, MANY[:999], -MANY[:999]])
    for key in (0, 1, -1, 2**31 - 1, -(2**31), 2**40 + 3):
        from_torch = rng.hash32(key, torch.from_numpy(index))
        assert from_torch.dtype == torch.int32
        assert np.array_equal(rng.hash32(key, index), from_torch.numpy())


def test_known_answers_never_change_or_data_order_would_between_versions():
    assert [
        rng.fold(0),
        rng.fold(0, 0),
        rng.fold(1, rng.CROP, 7),
        rng.fold(-5, 3, 2**40),
    ] == PINNED_FOLD
    assert (
        rng.hash32(rng.fold(0, rng.ORDER), np.arange(-2, 3, dtype=np.int32)).tolist() == PINNED_HASH
    )
    assert rng.permutation(rng.fold(0, rng.ORDER, 0), 12).tolist() == PINNED_ORDER
    assert (rng.uniforms(42, np.array([0, 1_281_166]), 3) * 2**32).tolist() == PINNED_UNIFORMS
    assert rng.normals(42, np.array([3]), 2)[0] == pytest.approx(PINNED_NORMALS, rel=1e-12)


def test_the_numbers_of_the_uses_are_pinned_and_differ():
    assert tuple(range(1, 13)) == USES


def test_fold_takes_any_integer_and_depends_on_each_coordinate_and_their_order():
    keys = [
        rng.fold(*c)
        for c in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1), (0, 1, 2, 0), (-1, 1, 2), (0, 1, -2))
    ]
    assert len(set(keys)) == len(keys)
    assert all(-(2**31) <= key < 2**31 for key in keys)
    assert rng.fold(2**32 + 5, 1) == rng.fold(5, 1)  # seeds count modulo 2**32
    assert (
        len(
            {
                rng.fold(seed, use, epoch)
                for seed in range(20)
                for use in USES
                for epoch in range(100)
            }
        )
        == 24_000
    )


@pytest.mark.parametrize("key", [0, 1, rng.fold(1, rng.DROPOUT, 1), -(2**31)])
def test_words_are_uniform(key):
    words = unsigned(rng.hash32(key, MANY))
    for shift in (0, 8, 16, 24):
        assert_uniform(words >> shift & 0xFF, 256)
    assert len(np.unique(words)) == len(
        words
    )  # for one key it is a bijection: no two images share their numbers


@pytest.mark.parametrize("step", [1, 2, 64, 1000, 1 << 15])
def test_neighbouring_coordinates_are_independent(step):
    assert_independent(rng.hash32(7, MANY), rng.hash32(7, MANY + np.int32(step)))


@pytest.mark.parametrize(("key", "other"), [(0, 1), (1, 2), (1, -1), (8, 8 ^ 1 << 31), (3, 4099)])
def test_neighbouring_keys_are_independent_raw_and_folded(key, other):
    assert_independent(rng.hash32(key, MANY), rng.hash32(other, MANY))
    a, b = rng.fold(key, rng.CROP, 0), rng.fold(other, rng.CROP, 0)
    assert_independent(rng.hash32(a, MANY), rng.hash32(b, MANY))


def test_neighbouring_epochs_and_uses_are_independent():
    for a, b in (
        (rng.fold(0, rng.ORDER, 0), rng.fold(0, rng.ORDER, 1)),
        (rng.fold(0, 1, 3), rng.fold(0, 2, 3)),
    ):
        assert_independent(rng.hash32(a, MANY), rng.hash32(b, MANY))


@pytest.mark.slow
def test_the_columns_of_uniforms_are_uniform_and_independent():
    u = rng.uniforms(11, MANY, 23)
    assert u.shape == (len(MANY), 23)
    assert u.dtype == np.float64
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    words = (u * 2**32).astype(np.uint32)
    for a, b in ((0, 1), (0, 10), (20, 21), (21, 22), (0, 22)):
        assert_independent(words[:, a], words[:, b])
        assert_independent(words[:-1, a], words[1:, b])
    correlation = np.corrcoef(u.T) - np.eye(23)
    assert abs(correlation).max() < 0.02


def test_uniforms_of_a_coordinate_depend_neither_on_the_others_nor_on_how_many_are_taken():
    whole = rng.uniforms(3, np.arange(100), 8)
    some = np.array([70, 3, 3, 99])
    assert np.array_equal(rng.uniforms(3, some, 8), whole[some])
    assert np.array_equal(rng.uniforms(3, some, 5), whole[some, :5])


def test_normals_are_standard_normal_and_independent():
    z = rng.normals(2, MANY, 3)
    assert z.shape == (len(MANY), 3)
    assert np.isfinite(z).all()
    for column in z.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z.T) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("n", [0, 1, 2, 1_003, 70_000])
def test_a_permutation_holds_every_index_once(n):
    order = rng.permutation(9, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_a_permutation_depends_on_its_key_alone():
    assert np.array_equal(rng.permutation(9, 1_003), rng.permutation(9, 1_003))
    orders = {rng.permutation(key, 1_003).tobytes() for key in range(50)}
    assert len(orders) == 50
    fixed = [
        (rng.permutation(key, 1_003) == rng.permutation(key + 1, 1_003)).sum() for key in range(50)
    ]
    assert np.mean(fixed) == pytest.approx(1, abs=0.5)  # as of two random permutations


def test_every_permutation_is_equally_likely():
    ranks = np.array(
        [rng.permutation(rng.fold(0, rng.ORDER, epoch), 4) for epoch in range(2_400)]
    ) @ [64, 16, 4, 1]
    counts = np.unique(ranks, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_neighbours_in_a_permutation_are_not_neighbours_in_the_data():
    order = rng.permutation(rng.fold(0, rng.ORDER, 0), 60_000)
    assert abs(stats.spearmanr(order[:-1], order[1:]).statistic) < 0.02
    assert abs(stats.spearmanr(np.arange(60_000), order).statistic) < 0.02
    assert_uniform(order[:3_000] // 1_200, 50)  # the first images of an epoch come from everywhere
