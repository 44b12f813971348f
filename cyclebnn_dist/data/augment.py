"""The augmentation policies: RandAugment, TrivialAugment and AutoAugment, by DALI's operations and fed random numbers."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia import dali
from nvidia.dali.auto_aug import augmentations, auto_augment, rand_augment, trivial_augment
from nvidia.dali.auto_aug.augmentations import identity
from nvidia.dali.auto_aug.core import select, signed_bin

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.operations import faster_on_cpu

fn: Any = dali.fn
types: Any = dali.types

MAGNITUDE_BINS = 31
"""Of RandAugment and TrivialAugment."""
TRANSLATION = 150 / 331
"""AutoAugment's largest shift as a fraction of the side: the paper's 150 of 331 pixels (DALI's default is the whole side)."""
_FILL = 128
TIMMS = "randaugment_timm"
RANDAUGMENTS = ("randaugment", TIMMS)
TIMMS_TRANSLATION = 0.45
"""Of timm's RandAugment: largest shift as a fraction of the side."""


class _Policy(NamedTuple):
    """AutoAugment's policy as tables: row is the sub-policy, column the stage; unused stages have probability 0."""

    probability: np.ndarray
    magnitude: np.ndarray
    operation: np.ndarray
    suites: list[list[Any]]
    magnitude_bins: int


def num_augmentations(config: DataConfig) -> int:
    """Augmenting operations one training image goes through."""
    if config.augment in RANDAUGMENTS:
        return config.randaugment_num_ops
    return {"none": 0, "trivialaugment": 1, "autoaugment": 2}[config.augment]


def num_columns(config: DataConfig) -> int:
    """Random numbers an image takes."""
    return 3 * num_augmentations(config)


def feeds(config: DataConfig, random: np.ndarray) -> dict[str, np.ndarray]:
    """Turn uniform numbers [B, num_columns] into the inputs of ``augmented``, int32 [B, num_augmentations] each.

    An operation is an index into the suite of its stage. RandAugment draws operations, whether each is done, and magnitudes
    about a fixed one; TrivialAugment draws operation and magnitude; AutoAugment draws a sub-policy, and whether each of
    its two operations is done.
    """
    count = num_augmentations(config)
    if not count:
        return {}
    choice, sign, strength = (random[:, k * count : (k + 1) * count] for k in range(3))
    if config.augment == "autoaugment":
        policy = _auto_augment()
        row = np.floor(choice[:, 0] * len(policy.operation)).astype(np.int64)
        idle = [len(suite) - 1 for suite in policy.suites]
        operation = np.where(strength < policy.probability[row], policy.operation[row], idle)
        magnitude = policy.magnitude[row]
    elif config.augment in RANDAUGMENTS:
        suite = _suites(config)[0]
        last = len(suite) - 1
        chosen = np.floor(
            choice / config.randaugment_prob * (last if config.augment == TIMMS else len(suite))
        )
        operation = np.where(choice < config.randaugment_prob, chosen, last)
        magnitude = np.full_like(strength, config.randaugment_magnitude)
        if config.randaugment_std:
            drawn = np.rint(magnitude + config.randaugment_std * _normal(strength))
            magnitude = np.clip(drawn, 0, MAGNITUDE_BINS - 1)
    else:
        operation = np.floor(choice * len(_suites(config)[0]))
        magnitude = np.floor(strength * MAGNITUDE_BINS)
    return {
        "operation": operation.astype(np.int32),
        "sign": (sign < 0.5).astype(np.int32),
        "magnitude": magnitude.astype(np.int32),
    }


def augmented(images: Any, config: DataConfig) -> Any:
    """Apply the policy to a DALI node of uint8 images [S, S, 3]; adds the inputs of ``feeds`` to the pipeline."""
    if config.augment == "none":
        return images
    operation = fn.external_source(name="operation", ndim=1, dtype=types.INT32)
    sign = fn.external_source(name="sign", ndim=1, dtype=types.INT32)
    magnitude = fn.external_source(name="magnitude", ndim=1, dtype=types.INT32)
    bins = _auto_augment().magnitude_bins if config.augment == "autoaugment" else MAGNITUDE_BINS
    for stage, suite in enumerate(_suites(config)):
        images = select(
            suite if images.device == "gpu" else faster_on_cpu(suite),
            operation[stage],
            data=images,
            magnitude_bin=signed_bin(magnitude[stage], random_sign=sign[stage]),
            num_magnitude_bins=bins,
            shape=(config.image_size, config.image_size),
            fill_value=_FILL,
        )
    return images


def timms_suite() -> list[Any]:
    """timm's operations for RandAugment at magnitudes that increase their strength, by DALI's; the last does nothing.

    At full strength they do what timm's do at level 10. Beside the border's colour (grey here, the mean there) they
    differ where timm cuts numbers to integers, and in that at least one bit stays (timm would give black).
    """
    enhanced = [
        getattr(augmentations, name).augmentation((0, 0.9), True, augmentations.shift_enhance_range)
        for name in ("color", "contrast", "brightness")
    ]
    return [
        augmentations.auto_contrast,
        augmentations.equalize,
        augmentations.invert,
        augmentations.rotate.augmentation((0, 30), True),
        augmentations.posterize.augmentation((4, 0), False, _bits_left),
        augmentations.solarize.augmentation((256, 0)),
        augmentations.solarize_add.augmentation((0, 110)),
        *enhanced,
        augmentations.sharpness.augmentation((0, 0.9), True, augmentations.sharpness_kernel),
        augmentations.shear_x.augmentation((0, 0.3), True),
        augmentations.shear_y.augmentation((0, 0.3), True),
        augmentations.translate_x.augmentation((0, TIMMS_TRANSLATION), True),
        augmentations.translate_y.augmentation((0, TIMMS_TRANSLATION), True),
        identity,
    ]


def _bits_left(magnitude: float) -> np.ndarray:
    """Mask of posterization to ``magnitude`` bits; timm rounds the bits that go down."""
    return augmentations.poster_mask_uint8(np.ceil(round(magnitude, 6)))


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Normal numbers from uniform ones."""
    return torch.special.ndtri(torch.from_numpy(np.ascontiguousarray(uniform, dtype=np.float64))).numpy()


def _suites(config: DataConfig) -> list[list[Any]]:
    """The operations that each stage chooses from."""
    if config.augment == "autoaugment":
        return _auto_augment().suites
    if config.augment == TIMMS:
        suite = timms_suite()
    elif config.augment == "randaugment":
        suite = rand_augment.get_rand_augment_suite(use_shape=True)
    else:
        suite = trivial_augment.get_trivial_augment_wide_suite(use_shape=True)
    return [suite] * num_augmentations(config)


@cache
def _auto_augment() -> _Policy:
    policy = auto_augment.get_image_net_policy(use_shape=True, max_translate_rel=TRANSLATION)
    shape = (len(policy.sub_policies), 2)
    probability, magnitude, operation = np.zeros(shape), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    suites: list[list[Any]] = [[], []]
    for row, steps in enumerate(policy.sub_policies):
        for stage, (augmentation, chance, strength) in enumerate(steps):
            if augmentation not in suites[stage]:
                suites[stage].append(augmentation)
            probability[row, stage] = chance
            magnitude[row, stage] = strength or 0
            operation[row, stage] = suites[stage].index(augmentation)
    for suite in suites:
        suite.append(identity)
    return _Policy(probability, magnitude, operation, suites, policy.num_magnitude_bins)
