"""How a global batch is cut into ranks and micro-batches, and an epoch into steps."""

from __future__ import annotations

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import TrainConfig


def per_rank_batch(config: TrainConfig, *, world_size: int) -> int:
    """Images one rank reads per forward pass: ranks x accumulation x this give the global batch exactly.

    Raises:
        RecipeError: if the global batch cannot be cut so, naming the nearest sizes that can.
    """
    parts = world_size * config.accumulation
    size, rest = divmod(config.global_batch_size, parts)
    if rest or size == 0:
        nearest = sorted({max(1, size) * parts, (size + 1) * parts})
        raise RecipeError(
            "train.global_batch_size",
            f"{config.global_batch_size} images cannot be cut into {world_size} ranks x "
            f"{config.accumulation} accumulated passes",
            f"use {' or '.join(map(str, nearest))}, or change train.accumulation or the number of ranks",
        )
    return size


def steps_per_epoch(config: TrainConfig, *, num_images: int) -> int:
    """Optimizer steps in one pass over the training set, whatever the number of ranks; the rest is dropped.

    Raises:
        RecipeError: if there are fewer images than one global batch.
    """
    steps = num_images // config.global_batch_size
    if steps == 0:
        raise RecipeError(
            "train.global_batch_size",
            f"{config.global_batch_size} is more than the {num_images} training images",
            f"use at most {num_images}",
        )
    return steps


def total_steps(config: TrainConfig, *, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run, at least 1."""
    return max(1, round(config.epochs * steps_per_epoch))
