"""The order: which image is read at which place of which epoch, and the random numbers that augment it.

Both are pure functions of (seed, epoch, place), drawn from a counter-based generator (Philox; Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"). So a position is one integer, any position is reached
without reading what came before, and neither the number of ranks nor prefetching has a say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PERMUTATION, AUGMENTATION, ERASING, MIXING = range(4)


def epoch_permutation(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64 [count], another one every epoch."""
    keys = _philox(seed, epoch, _PERMUTATION).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


def windowed_permutation(sizes: Sequence[int], *, window: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(sum(sizes))`` that reads few shards at a time, int64, another one every epoch.

    The shards are shuffled and cut into groups of ``window``; the images of a group are shuffled together and are
    all read before those of the next group. So while a place is read, only ``window`` shards are in use, whichever
    rank reads it, and an image meets in its batch images of ``window - 1`` other shards, others every epoch. With as
    many shards as there are, or more, it is ``epoch_permutation``.

    Args:
        sizes: images of each shard; those of shard i are numbered on from those of shard i - 1.
        window: shards of a group, at least 1; the last group may have fewer.
    """
    assert window > 0
    count = sum(sizes)
    generator = _philox(seed, epoch, _PERMUTATION)
    keys = generator.random_raw(count)
    turn = np.empty(len(sizes), np.int64)
    turn[np.argsort(generator.random_raw(len(sizes)), kind="stable")] = np.arange(len(sizes))
    group = np.repeat(turn // window, sizes)
    return np.lexsort((keys, group)).astype(np.int64)


def uniforms(
    places: range, columns: int, *, seed: int, epoch: int, purpose: int = AUGMENTATION
) -> np.ndarray:
    """Random numbers in [0, 1), float64 [len(places), columns]; a row depends on its place alone.

    Args:
        places: consecutive places of the epoch's permutation.
        columns: a multiple of 4, the words Philox makes per counter value.
        purpose: numbers for another purpose are independent ones.
    """
    assert columns % 4 == 0
    assert places.step == 1
    generator = _philox(seed, epoch, purpose)
    generator.advance(places.start * (columns // 4))
    words = generator.random_raw(len(places) * columns)
    return (words >> np.uint64(11)).astype(np.float64).reshape(len(places), columns) * 2.0**-53


def _philox(seed: int, epoch: int, purpose: int) -> np.random.Philox:
    assert 0 <= seed < 2**32
    return np.random.Philox(
        key=np.array([seed | purpose >> 1 << 32, epoch * 2 + purpose % 2], dtype=np.uint64)
    )
