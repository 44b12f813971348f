"""Colour jitter: brightness, contrast, saturation and hue of an image, changed by fed random factors.

Factors are torchvision's. It applies the four in random order; all but its hue are affine and leave each other's
result alone, so that order tells only where values are cut at 0 and 255 in between. Here it is fixed: saturation
and hue in one pass, then contrast and brightness in another. Hue is DALI's rotation of the chroma plane (YIQ)
rather than torchvision's of HSV.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia import dali

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.operations import grey_level

fn: Any = dali.fn
types: Any = dali.types

_NAMES = ("brightness", "contrast", "saturation", "hue")


def num_columns(config: DataConfig) -> int:
    """Random numbers an image takes."""
    return len(_NAMES) if any(config.color_jitter) else 0


def feeds(config: DataConfig, random: np.ndarray) -> dict[str, np.ndarray]:
    """Turn uniform numbers [B, num_columns] into the inputs of ``jittered``, float32 [B] each.

    Brightness, contrast and saturation ``x`` are factors uniform in [max(0, 1 - x), 1 + x], hue ``x`` a rotation
    uniform in [-360 x, 360 x] degrees.
    """
    if not num_columns(config):
        return {}
    result = {}
    for column, (name, extent) in enumerate(zip(_NAMES, config.color_jitter, strict=True)):
        if name == "hue":
            low, high = -360 * extent, 360 * extent
        else:
            low, high = max(0.0, 1 - extent), 1 + extent
        if _is_used(name, config):
            result[name] = (low + (high - low) * random[:, column]).astype(np.float32)
    return result


def jittered(images: Any, config: DataConfig) -> Any:
    """Apply the factors to a DALI node of uint8 images [S, S, 3]; adds the inputs of ``feeds`` to the pipeline."""
    if not num_columns(config):
        return images
    factor = {
        name: fn.external_source(name=name, ndim=0, dtype=types.FLOAT)
        for name in _NAMES
        if _is_used(name, config)
    }
    if "saturation" in factor:
        images = fn.hsv(images, saturation=factor["saturation"], hue=factor["hue"])
    if "contrast" in factor:
        images = fn.brightness_contrast(
            images,
            brightness=factor["brightness"],
            contrast=factor["contrast"],
            contrast_center=grey_level(images).cpu(),  # where it is not already: DALI takes parameters there
        )
    return images


def _is_used(name: str, config: DataConfig) -> bool:
    """Whether the pass that ``name`` is part of does anything."""
    brightness, contrast, saturation, hue = config.color_jitter
    return any((brightness, contrast) if name in ("brightness", "contrast") else (saturation, hue))
