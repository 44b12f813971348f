"""DALI's part in images that are stored decoded: the crop of the CIFAR papers, from fed places.

Every paper that this project reproduces on CIFAR pads images by 4 black pixels on each side, cuts 32x32 out at
random and flips; evaluation takes the image as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia import dali

fn: Any = dali.fn
types: Any = dali.types

PADDING = 4


def padded_crop_feeds(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds of a training batch, with the start of a padded crop instead of the resized crop.

    ``crop_start`` is int32 [B, 2], (y, x) from -PADDING to PADDING, each equally likely, made of the place (in
    [0, 1)) of the resized crop.
    """
    count = 2 * PADDING + 1
    start = np.minimum(np.floor(feeds["crop_place"] * count), count - 1).astype(np.int32) - PADDING
    others = {
        name: value
        for name, value in feeds.items()
        if name not in ("crop_width", "crop_height", "crop_place")
    }
    return {**others, "crop_start": start}


def stored_images(decode: str) -> tuple[Any, Any]:
    """Fed images, uint8 [S, S, 3] each, on the device that decodes elsewhere; and ids."""
    pixels = fn.external_source(name="pixels", ndim=3, dtype=types.UINT8, layout="HWC")
    ids = fn.external_source(name="ids", ndim=0, dtype=types.INT64)
    return (pixels.gpu() if decode == "mixed" else pixels), ids


def padded_crop(images: Any, side: int) -> Any:
    """Cut side x side pixels out, from the fed ``crop_start`` on; what lies outside the image is black."""
    start = fn.external_source(name="crop_start", ndim=1, dtype=types.INT32)
    return fn.slice(
        images, start, [side, side], axis_names="HW", out_of_bounds_policy="pad", fill_values=[0, 0, 0]
    )
