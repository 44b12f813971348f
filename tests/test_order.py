"""The order of shards: every image once, few shards at a time, another order every epoch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cyclebnn_dist.data.order import epoch_permutation, windowed_permutation

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(sizes=SIZES, window=st.integers(1, 14), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 500))
def test_a_window_holds_few_shards_and_an_epoch_every_image(sizes, window, seed, epoch):
    """Images would be missed or repeated, or reads go to all shards at once."""
    order = windowed_permutation(sizes, window=window, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    shard = np.searchsorted(np.cumsum(sizes), order, side="right")
    first = {each: int(np.flatnonzero(shard == each)[0]) for each in range(len(sizes))}
    last = {each: int(np.flatnonzero(shard == each)[-1]) for each in range(len(sizes))}
    for place in range(len(order)):
        assert sum(first[each] <= place <= last[each] for each in first) <= window
    again = windowed_permutation(sizes, window=window, seed=seed, epoch=epoch)
    assert np.array_equal(order, again)


@given(sizes=SIZES, seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 500))
def test_a_window_of_all_shards_is_the_global_shuffle(sizes, seed, epoch):
    """data.shuffle_shards at the number of shards would be another order than 0."""
    order = windowed_permutation(sizes, window=len(sizes), seed=seed, epoch=epoch)
    assert np.array_equal(order, epoch_permutation(sum(sizes), seed=seed, epoch=epoch))


def test_shards_are_grouped_and_shuffled_anew_every_epoch():
    """The same images would share batches in every epoch, in the order of the files."""
    sizes = [20] * 6
    orders = [windowed_permutation(sizes, window=2, seed=3, epoch=epoch) for epoch in range(20)]
    groups = [frozenset((order[:40] // 20).tolist()) for order in orders]
    assert all(len(group) == 2 for group in groups)
    assert len(set(groups)) >= 8
    for order in orders:
        mixed = (order[:40] // 20 == order[0] // 20).astype(int)
        assert 4 <= mixed[:20].sum() <= 16
        assert np.abs(np.diff(order)).min() < 20 < np.abs(np.diff(order)).max()
