"""The judgement on one encoded image: whether DALI decodes it, and if not, why."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import pipeline_def
from PIL import Image

fn: Any = dali.fn
types: Any = dali.types

MOST = 8
"""Images decoded together. The headers of 32 or more DALI 2.4 parses by several threads at once, one of which does not
wait for the others when its image has none: the process may then die of a segmentation fault (see in_flight.py)."""


class Decoding:
    """Decodes as the training pipeline does, nothing else; survives images that cannot be decoded."""

    def __init__(self, *, batch_size: int = 1, device: torch.device | None = None) -> None:
        assert batch_size <= MOST
        self._settings = {
            "batch_size": batch_size,
            "num_threads": 1,
            "device_id": (device.index or 0) if device is not None and device.type == "cuda" else None,
            "prefetch_queue_depth": 1,
        }
        self._decode = "cpu" if self._settings["device_id"] is None else "mixed"
        self._pipeline: Any = None

    def all_decode(self, encoded: list[np.ndarray]) -> bool:
        """Whether DALI decodes all of these, at most ``batch_size`` files' contents, uint8 [bytes] each."""
        if not all(len(content) for content in encoded):
            return False
        if self._pipeline is None:
            self._pipeline = _decoding_pipeline(self._decode, **self._settings)
            self._pipeline.build()
        try:
            self._pipeline.run(encoded=encoded)
        except RuntimeError:
            self._pipeline = None  # DALI declares a pipeline that has failed invalid
            return False
        return True


def problem_of_file(path: str | Path, decoding: Decoding) -> str | None:
    """Why DALI cannot use the image file, in words; None if it can."""
    try:
        encoded = np.fromfile(path, np.uint8)
    except OSError as error:
        return error.strerror or str(error)
    return problem_of_image(encoded, decoding)


def problem_of_image(encoded: np.ndarray, decoding: Decoding) -> str | None:
    """Why DALI cannot decode an image, uint8 [bytes], in words; None if it can."""
    if decoding.all_decode([encoded]):
        return None
    if not len(encoded):
        return "empty file"
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            image.load()
            kind = f"{image.format}, {image.width}x{image.height}, {image.mode}"
    except Exception as reason:
        return re.sub(r"cannot identify image file.*", "not an image", str(reason)) or repr(reason)
    return f"DALI does not decode it, though Pillow does ({kind})"


@pipeline_def
def _decoding_pipeline(decode: str) -> tuple[Any, Any]:
    encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
    size = fn.peek_image_shape(encoded, adjust_orientation=False)
    images = fn.decoders.image(once_known(size, encoded), device=decode, adjust_orientation=False)
    return size, images.shape()


def once_known(size: Any, encoded: Any) -> Any:
    """The same bytes, to be decoded only after ``peek_image_shape`` has found the ``size`` of every image of the batch.

    Where it finds none it raises an error; the decoder of DALI 2.4, if it comes first, may end the process instead.
    """
    return fn.reshape(encoded, shape=encoded.shape() + 0 * fn.cast(size, dtype=types.INT64)[:1])
