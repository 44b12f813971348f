"""The order: which image is read at which place of which epoch, and the random numbers that augment it.

Both are pure functions of (seed, epoch, place), drawn from a counter-based generator (Philox; Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"). So a position is one integer, any position is reached
without reading what came before, and neither the number of ranks nor prefetching has a say.
"""

from __future__ import annotations

import numpy as np

_PERMUTATION, AUGMENTATION, ERASING, MIXING = range(4)


def epoch_permutation(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64 [count], another one every epoch."""
    keys = _philox(seed, epoch, _PERMUTATION).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


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
