"""Random erasing: rectangles of normalised images overwritten, a pure function of (seed, epoch, place).

Source: Zhong et al., Random Erasing Data Augmentation (1708.04896), with the ranges and the ten tries of timm's
RandomErasing.
"""

from __future__ import annotations

import numpy as np
import torch

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.order import ERASING, uniforms

AREA = (0.02, 1 / 3)
RATIO = (0.3, 1 / 0.3)
TRIES = 10
_COLUMNS = 2 * TRIES + 4


def erase_(images: torch.Tensor, config: DataConfig, *, places: range, seed: int, epoch: int) -> torch.Tensor:
    """Erase rectangles of some images in place, and return them.

    Args:
        images: normalised, [B, 3, S, S], in any memory layout; 0 is the mean colour.
        places: of these images in the epoch's permutation.
    """
    if not config.erasing:
        return images
    assert len(images) == len(places)
    random = uniforms(places, _COLUMNS, seed=seed, epoch=epoch, purpose=ERASING)
    boxes = erased_boxes(config.erasing, random, size=images.shape[-1])
    for index in np.flatnonzero(boxes[:, 2]):
        top, left, height, width = boxes[index].tolist()
        box = images[index, :, top : top + height, left : left + width]
        if config.erasing_mode == "const":
            box.zero_()
            continue
        generator = torch.Generator(images.device).manual_seed(int(random[index, -1] * 2**53))
        box.copy_(torch.randn(box.shape, generator=generator, device=images.device))
    return images


def erased_boxes(probability: float, random: np.ndarray, *, size: int) -> np.ndarray:
    """Top, left, height and width of every image's rectangle, int64 [B, 4]; height 0 where none is erased.

    The area is uniform in AREA of the image's, the logarithm of the aspect ratio in that of RATIO; the first of
    ten tries that is smaller than the image in both directions counts, and none if none is.

    Args:
        random: uniform numbers [B, _COLUMNS].
    """
    area = (AREA[0] + (AREA[1] - AREA[0]) * random[:, :TRIES]) * size * size
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * random[:, TRIES : 2 * TRIES])
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (height < size) & (width < size)
    rows, first = np.arange(len(random)), fits.argmax(axis=1)
    chosen, top, left = random[:, 2 * TRIES : 2 * TRIES + 3].T
    erased = (chosen < probability) & fits[rows, first]
    height, width = height[rows, first] * erased, width[rows, first] * erased
    starts = np.floor(top * (size - height + 1)), np.floor(left * (size - width + 1))
    return np.stack([*starts, height, width], axis=1).astype(np.int64)
