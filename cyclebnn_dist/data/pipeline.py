"""The DALI pipelines: from file names and random numbers to normalised batches, on CPU or GPU.

A pipeline draws no random numbers of its own: they come in with the file names, so that a batch is a pure
function of what is fed. One description serves both devices; only the decoder's backend differs. Orientations
noted in EXIF are not applied, as timm and torchvision do not.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import math, pipeline_def

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import augment, jitter
from cyclebnn_dist.data.cifar_pipeline import padded_crop, stored_images
from cyclebnn_dist.data.decoding import once_known
from cyclebnn_dist.data.generated_code import remove_generated_code
from cyclebnn_dist.data.resizing import resized

log = logging.getLogger(__name__)

# DALI makes the names in these modules when it is imported; type checkers cannot see them.
fn: Any = dali.fn
types: Any = dali.types

CROP_ATTEMPTS = 10
_CROP_COLUMNS = 2 * CROP_ATTEMPTS + 3


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

    Images are float32 (float16 for ``data.dtype=fp16``) on ``device``, [B, 3, S, S] for the layout ``CHW``,
    [B, S, S, 3] for ``HWC``; ids are int64 [B] on the CPU.
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
    remove_generated_code()
    for warning in caught:
        # DALI's augmentations use its own deprecated names, and it overrides the filters.
        if not issubclass(warning.category, DeprecationWarning):
            log.warning("DALI: %s", warning.message)
    return pipeline


def num_columns(config: DataConfig) -> int:
    """Random numbers a training image takes for crop, flip, augmentation and colour; a multiple of 4."""
    needed = _CROP_COLUMNS + augment.num_columns(config) + jitter.num_columns(config)
    return -(-needed // 4) * 4


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
    augmenting = _CROP_COLUMNS + augment.num_columns(config)
    return {
        "crop_width": np.sqrt(area * ratio).astype(np.float32),
        "crop_height": np.sqrt(area / ratio).astype(np.float32),
        "crop_place": random[:, column : column + 2].astype(np.float32),
        "mirror": (random[:, column + 2] < config.flip).astype(np.int32),
        **augment.feeds(config, random[:, _CROP_COLUMNS:augmenting]),
        **jitter.feeds(config, random[:, augmenting:]),
    }


def _normalise(images: Any, config: DataConfig, layout: str, **kwargs: Any) -> Any:
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT16 if config.dtype == "fp16" else types.FLOAT,
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
    size = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)[:2]
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


def _evaluation_window(encoded: Any, config: DataConfig) -> tuple[Any, Any]:
    """Size of the resized image (y, x; int32 [2]) and place of the crop in it (y, x; float32 [2], 0 to 1).

    Rounded as torchvision's Resize and CenterCrop round, on which timm builds: the shorter side becomes
    floor(S / crop_pct), the longer one is cut to an integer, and half a pixel goes to the even side.
    """
    size = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)[:2]
    shorter = math.min(size[0], size[1])
    resized_size = size * int(config.image_size / config.crop_pct) // shorter
    free = resized_size - config.image_size
    half = free // 2
    start = half + (free - 2 * half) * (half - 2 * (half // 2))
    return resized_size, start / math.max(free, 1)


@pipeline_def(enable_conditionals=True)
def _training_pipeline(config: DataConfig, layout: str, decode: str, kind: str) -> tuple[Any, Any]:
    side = config.image_size
    if kind == "pixels":
        images, ids = stored_images(decode)
        images = padded_crop(images, side)
    else:
        encoded, ids = _encoded(kind)
        start, shape = _crop_window(encoded, config)
        images = fn.decoders.image_slice(
            encoded, device=decode, start=start, shape=shape, axis_names="HW", adjust_orientation=False
        )
        images = resized(images, (side, side), config, decode=decode)
    images = jitter.jittered(augment.augmented(images, config), config)
    mirror = fn.external_source(name="mirror", ndim=0, dtype=types.INT32)
    return _normalise(images, config, layout, mirror=mirror), ids


@pipeline_def
def _evaluation_pipeline(config: DataConfig, layout: str, decode: str, kind: str) -> tuple[Any, Any]:
    if kind == "pixels":
        images, ids = stored_images(decode)
        return _normalise(images, config, layout), ids
    encoded, ids = _encoded(kind)
    size, place = _evaluation_window(encoded, config)
    images = fn.decoders.image(once_known(size, encoded), device=decode, adjust_orientation=False)
    images = resized(images, size, config, decode=decode)
    side = config.image_size
    return _normalise(
        images, config, layout, crop=(side, side), crop_pos_y=place[0], crop_pos_x=place[1]
    ), ids
