"""Without these a run on another number of ranks would silently train with another global batch."""

import pytest

from cyclebnn_dist.batching import per_rank_batch, steps_per_epoch
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import TrainConfig


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_the_cut_gives_the_global_batch_exactly(ranks, accumulation):
    config = TrainConfig(global_batch_size=64, accumulation=accumulation)
    assert per_rank_batch(config, world_size=ranks) * ranks * accumulation == 64


@pytest.mark.parametrize(("size", "ranks", "nearest"), [(64, 3, "63 or 66"), (2, 4, "use 4,")])
def test_a_batch_that_cannot_be_cut_is_refused_with_the_nearest_that_can(size, ranks, nearest):
    with pytest.raises(RecipeError, match=nearest) as caught:
        per_rank_batch(TrainConfig(global_batch_size=size), world_size=ranks)
    assert caught.value.key == "train.global_batch_size"


def test_steps_per_epoch_depend_on_the_global_batch_alone():
    assert steps_per_epoch(TrainConfig(global_batch_size=64, accumulation=4), num_images=1000) == 15
    with pytest.raises(RecipeError, match="more than the 10 training images"):
        steps_per_epoch(TrainConfig(global_batch_size=64), num_images=10)
