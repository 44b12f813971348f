"""Mixup and CutMix: pairs of a batch blended, with labels to match, a pure function of (seed, step, rank).

Source: Zhang et al., mixup (1710.09412); Yun et al., CutMix (1905.04899); the mixing itself is timm's Mixup, in its
mode ``batch``: image i with image B - 1 - i, one strength for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.order import MIXING
from cyclebnn_dist.timm_import import timm


class Mixing:
    """What a recipe says about mixing, applied to the training batches of one rank."""

    def __init__(
        self, config: DataConfig, *, num_classes: int, batch_size: int, seed: int, rank: int
    ) -> None:
        """
        Args:
            batch_size: images per micro-batch and rank.
            seed: the same on every rank.

        Raises:
            RecipeError: images of an odd batch cannot be paired.
        """
        key = "data.mixup" if config.mixup else "data.cutmix"
        if (config.mixup or config.cutmix) and batch_size % 2:
            raise RecipeError(
                key,
                f"pairs images, but each rank's batch has {batch_size}",
                "choose train.global_batch_size, train.accumulation and ranks so that it is even",
            )
        self._seed = seed
        self._rank = rank
        self._mixup = None
        if config.mixup or config.cutmix:
            self._mixup = timm.data.Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                label_smoothing=0.0,
                num_classes=num_classes,
            )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, *, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch, in place, and return it with what the cross-entropy takes as its target.

        Label smoothing is left to the loss, which smooths mixed labels to the same values as timm's Mixup does.

        Args:
            images: [B, 3, S, S].
            labels: int64 [B].
            step: number of the micro-batch since the beginning of training.

        Returns:
            Images, and class probabilities, float32 [B, num_classes]; the labels themselves where mixing is off.
        """
        if self._mixup is None:
            return images, labels
        with _numpy_seeded(self._seed, MIXING, step, self._rank):
            return self._mixup(images, labels)


@contextmanager
def _numpy_seeded(*words: int) -> Iterator[None]:
    """Seed numpy's global generator, which timm draws from, and leave it afterwards as it was."""
    state = np.random.get_state()
    np.random.seed([word % 2**32 for word in words])
    try:
        yield
    finally:
        np.random.set_state(state)
