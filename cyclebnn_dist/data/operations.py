"""The operations of DALI's automatic augmentation, the slow ones by operators that are several times faster on CPUs.

What an operation does, its magnitudes and its name stay DALI's. Its affine warps compute a pixel in about 40 ns on
a CPU; OpenCV's, behind ``warp_perspective``, need a sixth of that and differ by one level of 255 in few pixels. Its
contrasts and solarization make several passes, where one operator does it in one; its saturation rounds every value by
a call of a function, and is torch's here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia import dali
from nvidia.dali.auto_aug.core import augmentation

fn: Any = dali.fn
types: Any = dali.types

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness."""


def faster_on_cpu(suite: Sequence[Any]) -> list[Any]:
    """The same augmentations in the same order, for uint8 images [H, W, 3] on the CPU."""
    return [_faster(each) for each in suite]


def grey_level(images: Any) -> Any:
    """Mean brightness of each image of a DALI node [H, W, 3], as a scalar node on the same device."""
    colour = fn.reductions.mean(images, axes=(0, 1))
    return colour[0] * LUMA[0] + colour[1] * LUMA[1] + colour[2] * LUMA[2]


def _faster(slow: Any) -> Any:
    if slow.name not in _FASTER:
        return slow
    return augmentation(
        _FASTER[slow.name],
        mag_range=slow.mag_range,
        randomly_negate=slow.randomly_negate,
        mag_to_param=slow.mag_to_param,
        param_device=slow.param_device,
        name=slow.name,
    )


def _warped(images: Any, matrix: Any, fill_value: float) -> Any:
    """Move pixels by ``matrix`` [2, 3] from where they are to where they go."""
    homogeneous = fn.cat(matrix, types.Constant(np.array([[0, 0, 1]], np.float32)), axis=0)
    return fn.experimental.warp_perspective(
        images, matrix=homogeneous, inverse_map=False, border_mode="constant", fill_value=[fill_value] * 3
    )


def _shear(data: Any, shear: Any, fill_value: float = 128) -> Any:
    return _warped(data, fn.transforms.shear(shear=shear), fill_value)


def _translate_x(data: Any, offset: Any, shape: Sequence[int], fill_value: float = 128) -> Any:
    return _warped(data, fn.transforms.translation(offset=offset * shape[1]), fill_value)


def _translate_y(data: Any, offset: Any, shape: Sequence[int], fill_value: float = 128) -> Any:
    return _warped(data, fn.transforms.translation(offset=offset * shape[0]), fill_value)


def _rotate(data: Any, angle: Any, shape: Sequence[int], fill_value: float = 128) -> Any:
    centre = [0.5 * shape[1], 0.5 * shape[0]]
    return _warped(data, fn.transforms.rotation(angle=-angle, center=centre), fill_value)


def _contrast(data: Any, parameter: Any) -> Any:
    return fn.contrast(data, contrast=parameter, contrast_center=grey_level(data))


def _auto_contrast(data: Any, _: Any) -> Any:
    lowest, highest = (
        fn.cast(extreme(data, axes=(0, 1)), dtype=types.FLOAT)
        for extreme in (fn.reductions.min, fn.reductions.max)
    )
    varies = highest > lowest
    return fn.crop_mirror_normalize(
        data,
        mean=lowest * varies,
        std=(highest - lowest) / 255.0 * varies + (varies ^ True),
        dtype=types.UINT8,
        output_layout="HWC",
    )


def _solarize(data: Any, threshold: Any) -> Any:
    return data ^ ((data >= threshold) * types.Constant(255, dtype=types.UINT8))


def _colour(data: Any, parameter: Any) -> Any:
    return fn.python_function(
        data, parameter, function=_saturated, batch_processing=True, output_layouts="HWC"
    )


def _saturated(images: Sequence[np.ndarray], factors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images with colours ``factor`` times as far from their grey."""
    found = []
    for image, factor in zip(images, factors, strict=True):
        pixels = torch.from_numpy(image).float()
        red, green, blue = pixels.unbind(-1)
        grey = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[..., None]
        found.append(torch.lerp(grey, pixels, float(factor)).round_().clamp_(0, 255).to(torch.uint8).numpy())
    return found


_FASTER: dict[str, Callable[..., Any]] = {
    "shear_x": _shear,
    "shear_y": _shear,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "contrast": _contrast,
    "auto_contrast": _auto_contrast,
    "solarize": _solarize,
    "color": _colour,
}
