"""The data sets of ``bench convergence``: small images in memory, the same in every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cyclebnn_dist.config import RecipeError

CLAIMED_SET = "shapes"
SETS = (CLAIMED_SET, "digits")
CLASSES = 10
SIDE = 16
NUM_TRAIN, NUM_TEST = 32_768, 30_000
NUM_DIGITS_TEST = 500

CLUTTER, NOISE, TURN = 3, 0.3, np.pi / 6

_SEEDS = {"train": 1, "test": 2}
_CHUNK = 4096


@dataclass(frozen=True)
class ImageSet:
    """Images, float32 ``[n, 1, SIDE, SIDE]`` about 0 in mean and 1 in deviation, and their classes, int64 ``[n]``."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ImageSet:
        """The same on ``device``."""
        return ImageSet(self.images.to(device), self.labels.to(device))


def make_sets(
    name: str, *, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> tuple[ImageSet, ImageSet]:
    """Training and test images of the set of this name.

    ``shapes``, drawn here: a disc, ring, triangle, cross or bar of any place, size, contrast and slope, striped along
    or across, in clutter and noise. ``digits``: scikit-learn's 1797 written digits, 500 of them to test with; the sizes
    given do not matter there.

    Raises:
        RecipeError: scikit-learn is not installed.
    """
    if name == "digits":
        return _digits()
    assert name == "shapes", name
    return _shapes("train", num_train), _shapes("test", num_test)


def check_sets(names: tuple[str, ...]) -> None:
    """Raise a RecipeError for a set that does not exist, or is not to be had here."""
    for name in names:
        if name not in SETS:
            raise RecipeError("--sets", f"there is no set '{name}'", f"there are: {', '.join(SETS)}")
    if "digits" in names:
        _load_digits()


def _shapes(split: str, count: int) -> ImageSet:
    labels = np.arange(count) % CLASSES
    images = np.empty((count, SIDE, SIDE), dtype=np.float32)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(labels[part], np.random.Generator(np.random.PCG64([_SEEDS[split], start])))
    return ImageSet(torch.from_numpy(images)[:, None], torch.from_numpy(labels))


def _draw(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image a label, float32 ``[n, SIDE, SIDE]``: class c is shape c // 2, with stripes of direction c % 2."""
    count, pixel = len(labels), 2 / SIDE
    ticks = (np.arange(SIDE) + 0.5) * pixel - 1
    y, x = np.meshgrid(ticks, ticks, indexing="ij")

    def uniform(low: float, high: float) -> np.ndarray:
        return random.uniform(low, high, size=(count, 1, 1))

    def frame(angle: np.ndarray, scale: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        right, down = x - room * uniform(-1, 1), y - room * uniform(-1, 1)
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        return cos * right + sin * down, cos * down - sin * right

    image = uniform(-0.3, 0.3) + uniform(-0.3, 0.3) * x + uniform(-0.3, 0.3) * y
    for _ in range(CLUTTER):
        size = uniform(0.1, 0.3)
        u, v = frame(uniform(0, 2 * np.pi), size, np.ones((count, 1, 1)))
        cover = np.clip(0.5 - (np.hypot(u, 2 * v) - 1) * size / pixel, 0, 1)
        image += cover * (uniform(-1, 1) - image)
    scale = uniform(0.55, 0.85)
    u, v = frame(uniform(-TURN, TURN), scale, 1 - scale)
    distance = np.empty_like(u)
    for index, shape in enumerate(_DISTANCES):
        chosen = labels // 2 == index
        distance[chosen] = shape(u[chosen], v[chosen])
    along = np.where((labels % 2 == 0)[:, None, None], u, v)
    wave = np.sin(2 * np.pi * (along / uniform(0.6, 0.9) + uniform(0, 1)))
    cover = np.clip(0.5 - distance * scale / pixel, 0, 1)
    image += cover * (0.7 + 0.5 * wave - image)
    image *= uniform(0.6, 1.4)
    image += random.normal(0, NOISE, size=image.shape)
    return (image / 0.6).astype(np.float32)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.7) - 0.22


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.maximum(0.866 * u + 0.5 * v, 0.5 * v - 0.866 * u), -v) - 0.5


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.95, v - 0.32), np.maximum(u - 0.32, v - 0.95))


_DISTANCES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: np.hypot(u, v) - 0.85,
    _ring,
    _triangle,
    _cross,
    lambda u, v: np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.4),
)
"""Signed distances of the shapes in a frame of their own, about 1 in size."""


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RecipeError(
            "--sets",
            "digits needs scikit-learn, which is not installed",
            "pip install 'cyclebnn-dist[bench]', or leave it out",
        ) from None
    return load_digits(return_X_y=True)


def _digits() -> tuple[ImageSet, ImageSet]:
    values, labels = _load_digits()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    images = torch.from_numpy(values[order].reshape(-1, 1, 8, 8)).float()
    images = torch.nn.functional.interpolate(images, size=(SIDE, SIDE), mode="bilinear") / 16
    images = (images - images.mean()) / images.std()
    classes = torch.from_numpy(labels[order]).long()
    cut = len(classes) - NUM_DIGITS_TEST
    return ImageSet(images[:cut], classes[:cut]), ImageSet(images[cut:], classes[cut:])
