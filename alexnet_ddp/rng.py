"""Counter-based random numbers: hash32(key, index), identical for numpy arrays and torch tensors.

A run never draws from a generator. The order of an epoch, a crop or a dropout mask is a function of
its coordinates (seed, epoch, step, image index, unit), so threads, ranks, restarts and
micro-batches cannot change it.

The hash function is the 32-bit finaliser "lowbias32" (C. Wellons, hash-prospector, 2018). It uses
signed arithmetic that wraps around, because torch has no unsigned multiplication.
"""

from typing import Any

import numpy as np

# One number per purpose, so that two purposes with equal coordinates are independent.
ORDER, CROP, FLIP, COLOUR, DROPOUT, SUBSET, SYNTHETIC = range(1, 8)
POLICY, JITTER, ERASE, MIX, SHARDS, PLUGIN, SAMPLING, SWEEP, BOOTSTRAP = range(8, 17)

_GOLDEN = 0x9E3779B9
_AT_ONCE = 1 << 15  # words per block, which fits in the cache of a core


def _signed(x: int) -> int:
    """`x` modulo 2**32 as a signed 32-bit number."""
    return (x + 0x8000_0000) % 0x1_0000_0000 - 0x8000_0000


def mix(x: Any) -> Any:
    """A bijection of 32-bit words; each input bit flips about half of the output bits.

    x: int32 array or tensor of any shape; returns the same type and shape.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def fold(key: int, *coordinates: int) -> int:
    """A new key (signed 32-bit) from a key and plain integers."""
    for c in coordinates:
        state = np.array([_signed(key ^ _signed(c * _GOLDEN + 0x7F4A7C15))], dtype=np.int32)
        key = int(mix(state)[0])
    return _signed(key)


def hash32(key: int, index: Any) -> Any:
    """Uniform signed 32-bit words for an int32 array or tensor `index`; same type and shape.

    Different keys give independent sequences.
    """
    return mix(mix(index * _signed(_GOLDEN) ^ _signed(key)) + _signed(key * 0x2545F491 + 1))


def uniforms(key: int, index: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, count] in [0, 1): `count` independent numbers for each index (int [n])."""
    rows = hash32(key, index.astype(np.int32))[:, None]
    words = mix(rows + mix(np.arange(1, count + 1, dtype=np.int32)))
    return words.view(np.uint32) * 2.0**-32


def normals(key: int, index: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, count], standard normal, by Box and Muller (1958)."""
    u = uniforms(key, index, 2 * count)
    return np.sqrt(-2 * np.log1p(-u[:, :count])) * np.cos(2 * np.pi * u[:, count:])


def permutation(key: int, n: int) -> np.ndarray:
    """A permutation of range(n), int64 [n]: the indices sorted by their 64-bit hashes.

    1.28 million take about 50 ms.
    """
    return in_order(key, np.arange(n), high_words(key, n))


def high_words(key: int, n: int) -> np.ndarray:
    """uint32 [n]: the high halves of the hashes by which permutation(key, n) orders range(n)."""
    words = np.empty(n, np.uint32)
    for start in range(0, n, _AT_ONCE):
        block = words[start : start + _AT_ONCE]
        block[...] = hash32(
            fold(key, 0), np.arange(start, start + len(block), dtype=np.int32)
        ).view(np.uint32)
    return words


def in_order(key: int, members: np.ndarray, high: np.ndarray) -> np.ndarray:
    """`members` (int64 [m], a subset of range(n)) in their order in permutation(key, n).

    high: uint32 [m], their high words.
    """
    # A radix sort: the lower 16 bits, then the upper 16 bits.
    order = np.argsort(high.astype(np.uint16), kind="stable")
    order = order[np.argsort((high >> np.uint32(16)).astype(np.uint16)[order], kind="stable")]
    members, high = members[order], high[order]
    ties = np.flatnonzero(high[1:] == high[:-1])
    if len(ties):  # rare: the low words decide
        at = np.union1d(ties, ties + 1)
        tied = members[at]
        low = hash32(fold(key, 1), tied.astype(np.int32)).view(np.uint32)
        members[at] = tied[np.lexsort((low, high[at]))]
    return members
