"""The split of the training images: those a search trains with, and those it scores candidates on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import SearchConfig
from cyclebnn_dist.data import Source


class Part:
    """Some images of a source, as a source: image ``i`` is its image ``ids[i]``."""

    def __init__(self, whole: Source, ids: np.ndarray) -> None:
        """
        Args:
            ids: int64, ascending.
        """
        self._whole, self._ids = whole, ids
        self.labels = whole.labels[ids]
        ends = np.cumsum(np.asarray(whole.shard_sizes, np.int64))
        self.shard_sizes: Sequence[int] = np.diff(np.searchsorted(ids, ends), prepend=0).tolist()

    @property
    def root(self) -> str:
        return self._whole.root

    @property
    def classes(self) -> list[str]:
        return self._whole.classes

    @property
    def kind(self) -> Literal["paths", "encoded", "pixels"]:
        return self._whole.kind

    @property
    def digest(self) -> int:
        text = f"{self._whole.digest} {self._ids.tolist()}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def __len__(self) -> int:
        return len(self._ids)

    def name(self, index: int) -> str:
        return self._whole.name(int(self._ids[index]))

    def encoded(self, index: int) -> bytes:
        return self._whole.encoded(int(self._ids[index]))

    def inputs(self, ids: np.ndarray) -> dict[str, Any]:
        return self._whole.inputs(self._ids[ids])


def hold_out(images: Source, config: SearchConfig) -> tuple[Part, Part]:
    """The images to train with and those to score with, ``eval_images`` of them: of each class its share, evenly spread.

    Raises:
        RecipeError: there are too few images for both.
    """
    count, held = len(images), config.eval_images
    if held > count // 2:
        raise RecipeError(
            "search.eval_images",
            f"{held} of {count} training images would be held out",
            f"hold out {count // 2} or fewer",
        )
    if config.batch_size > count - held:
        raise RecipeError(
            "search.batch_size",
            f"{config.batch_size} of {count - held} images left to train with",
            "make it smaller",
        )
    chosen = np.zeros(count, dtype=bool)
    by_class = np.argsort(images.labels, kind="stable")  # shards may hold classes in turn
    chosen[by_class[(np.arange(held) * count + count // 2) // held]] = True
    return Part(images, np.flatnonzero(~chosen)), Part(images, np.flatnonzero(chosen))
