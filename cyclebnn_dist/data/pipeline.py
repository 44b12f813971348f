"""The DALI pipelines: from file names and random numbers to normalised batches, on CPU or GPU.

A pipeline draws no random numbers of its own: they come in with the file names, so that a batch is a pure
function of what is fed. One description serves both devices; only the decoder's backend differs.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import math, pipeline_def
from nvidia.dali.auto_aug import rand_augment, trivial_augment
from nvidia.dali.auto_aug.core import select, signed_bin

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.cifar_pipeline import padded_crop, stored_images

log = logging.getLogger(__name__)

# DALI makes the names in these modules when it is imported; type checkers cannot see them.
fn: Any = dali.fn
types: Any = dali.types

CROP_ATTEMPTS = 10
MAGNITUDE_BINS = 31
_FILL = 128


def build_pipeline(
    config: DataConfig,
    *,
    training: bool,
    batch_size: int,
    device: torch.device,
    layout: str,
    kind: str = "paths",
) -> Any:
    """Build a pipeline with the inputs of a source of ``kind`` and of the feeds, and the outputs (images, ids).

    Images are float32 on ``device``, [B, 3, S, S] for the layout ``CHW``, [B, S, S, 3] for ``HWC``; ids are
    int64 [B] on the CPU.
    """
    build = _training_pipeline if training else _evaluation_pipeline
    with warnings.catch_warnings(record=True) as caught:
        pipeline = build(
            config,
            layout=layout,
            decode="mixed" if device.type == "cuda" else "cpu",
            kind=kind,
            batch_size=batch_size,
            num_threads=config.threads,
            device_id=(device.index or 0) if device.type == "cuda" else None,
            prefetch_queue_depth=config.prefetch,
        )
        pipeline.build()
    for warning in caught:
        # DALI's augmentations use its own deprecated names, and it overrides the filters.
        if not issubclass(warning.category, DeprecationWarning):
            log.warning("DALI: %s", warning.message)
    return pipeline


def num_columns(config: DataConfig) -> int:
    """Random numbers a training image takes: crop, flip, and three per augmentation; a multiple of 4."""
    needed = 2 * CROP_ATTEMPTS + 3 + 3 * num_augmentations(config)
    return -(-needed // 4) * 4


def num_augmentations(config: DataConfig) -> int:
    """Augmenting operations one training image goes through."""
    return {"none": 0, "randaugment": config.randaugment_num_ops, "trivialaugment": 1}[config.augment]


def training_feeds(config: DataConfig, random: np.ndarray) -> dict[str, np.ndarray]:
    """Turn uniform numbers [B, num_columns] into the random inputs of the training pipeline.

    Crops are torchvision's and timm's RandomResizedCrop: the area uniform in ``config.scale``, the logarithm
    of the aspect ratio uniform in that of ``config.ratio``, the first of ten tries that fits, else the largest
    centred crop of an allowed ratio. Which try fits depends on the image's shape, so the pipeline chooses.
    """
    tries = CROP_ATTEMPTS
    low, high = config.scale
    area = low + (high - low) * random[:, :tries]
    log_low, log_high = np.log(config.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * random[:, tries : 2 * tries])
    column = 2 * tries
    feeds = {
        "crop_width": np.sqrt(area * ratio).astype(np.float32),
        "crop_height": np.sqrt(area / ratio).astype(np.float32),
        "crop_place": random[:, column : column + 2].astype(np.float32),
        "mirror": (random[:, column + 2] < config.flip).astype(np.int32),
    }
    count = num_augmentations(config)
    if count:
        choice, sign, strength = (random[:, column + 3 + k * count :][:, :count] for k in range(3))
        bins = np.floor(strength * MAGNITUDE_BINS)
        if config.augment == "randaugment":
            bins = np.full_like(bins, config.randaugment_magnitude)
        feeds["operation"] = np.floor(choice * len(_suite(config))).astype(np.int32)
        feeds["sign"] = (sign < 0.5).astype(np.int32)
        feeds["magnitude"] = bins.astype(np.int32)
    return feeds


def _suite(config: DataConfig) -> list[Any]:
    if config.augment == "randaugment":
        return rand_augment.get_rand_augment_suite(use_shape=True)
    return trivial_augment.get_trivial_augment_wide_suite(use_shape=True)


def _interpolation(config: DataConfig) -> Any:
    return {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[config.interpolation]


def _normalise(images: Any, config: DataConfig, layout: str, **kwargs: Any) -> Any:
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout=layout,
        mean=[255 * value for value in config.mean],
        std=[255 * value for value in config.std],
        **kwargs,
    )


def _encoded(kind: str = "paths") -> tuple[Any, Any]:
    if kind == "encoded":
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        return encoded, fn.external_source(name="ids", ndim=0, dtype=types.INT64)
    paths = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
    ids = fn.external_source(name="ids", ndim=0, dtype=types.INT64)
    return fn.io.file.read(paths, dont_use_mmap=True), ids


def _crop_window(encoded: Any, config: DataConfig) -> tuple[Any, Any]:
    """Start and size (y, x; int32 [2]) of the random resized crop, from the fed tries and the image's shape."""
    tried_width = fn.external_source(name="crop_width", ndim=1, dtype=types.FLOAT)
    tried_height = fn.external_source(name="crop_height", ndim=1, dtype=types.FLOAT)
    place = fn.external_source(name="crop_place", ndim=1, dtype=types.FLOAT)
    size = fn.peek_image_shape(encoded, dtype=types.FLOAT)[:2]
    aspect = size[1] / size[0]
    widths, heights = tried_width / math.sqrt(aspect), tried_height * math.sqrt(aspect)

    misses = (widths > 1.0) | (heights > 1.0)
    tries = np.arange(CROP_ATTEMPTS, dtype=np.float32)
    turn = types.Constant(tries) + CROP_ATTEMPTS * misses
    first = fn.reductions.min(turn, axes=0)
    chosen = fn.cast(turn == first, dtype=types.FLOAT)
    fits = fn.cast(first < CROP_ATTEMPTS, dtype=types.FLOAT)
    low, high = config.ratio
    width = fits * fn.reductions.sum(chosen * widths, axes=0) + (1.0 - fits) * math.min(1.0, high / aspect)
    height = fits * fn.reductions.sum(chosen * heights, axes=0) + (1.0 - fits) * math.min(1.0, aspect / low)

    shape = math.clamp(math.floor(fn.stack(height, width) * size + 0.5), 1.0, size)
    free = size - shape
    drawn = math.min(math.floor(place * (free + 1.0)), free)
    start = fits * drawn + (1.0 - fits) * math.floor(0.5 * free)
    return fn.cast(start, dtype=types.INT32), fn.cast(shape, dtype=types.INT32)


@pipeline_def(enable_conditionals=True)
def _training_pipeline(config: DataConfig, layout: str, decode: str, kind: str) -> tuple[Any, Any]:
    side = config.image_size
    if kind == "pixels":
        images, ids = stored_images(decode)
        images = padded_crop(images, side)
    else:
        encoded, ids = _encoded(kind)
        start, shape = _crop_window(encoded, config)
        images = fn.decoders.image_slice(encoded, device=decode, start=start, shape=shape, axis_names="HW")
        images = fn.resize(images, size=[side, side], interp_type=_interpolation(config), antialias=True)
    if config.augment != "none":
        suite = _suite(config)
        operation = fn.external_source(name="operation", ndim=1, dtype=types.INT32)
        sign = fn.external_source(name="sign", ndim=1, dtype=types.INT32)
        magnitude = fn.external_source(name="magnitude", ndim=1, dtype=types.INT32)
        for level in range(num_augmentations(config)):
            images = select(
                suite,
                operation[level],
                data=images,
                magnitude_bin=signed_bin(magnitude[level], random_sign=sign[level]),
                num_magnitude_bins=MAGNITUDE_BINS,
                shape=(side, side),
                fill_value=_FILL,
            )
    mirror = fn.external_source(name="mirror", ndim=0, dtype=types.INT32)
    return _normalise(images, config, layout, mirror=mirror), ids


@pipeline_def
def _evaluation_pipeline(config: DataConfig, layout: str, decode: str, kind: str) -> tuple[Any, Any]:
    if kind == "pixels":
        images, ids = stored_images(decode)
        return _normalise(images, config, layout), ids
    encoded, ids = _encoded(kind)
    images = fn.decoders.image(encoded, device=decode)
    side = config.image_size
    images = fn.resize(
        images,
        resize_shorter=int(side / config.crop_pct),
        interp_type=_interpolation(config),
        antialias=True,
    )
    return _normalise(images, config, layout, crop=(side, side)), ids
