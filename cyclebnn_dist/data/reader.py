"""The reader: a DALI pipeline at work, and the batches it has been asked for."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.decoding import Decoding, problem_of_file
from cyclebnn_dist.data.folder import ImageList
from cyclebnn_dist.data.pipeline import build_pipeline


@dataclass(frozen=True)
class Batch:
    """Images of one step of one rank.

    Attributes:
        images: [B, 3, S, S] of type ``data.dtype``, normalised, on the loader's device.
        labels: int64 [B], class indices, on the loader's device.
        ids: int64 [B], indices into the image list, on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


IMAGE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Reader:
    """First in, first out: ``submit`` starts work on a batch, ``collect`` waits for the oldest one."""

    def __init__(
        self,
        images: ImageList,
        config: DataConfig,
        *,
        batch_size: int,
        training: bool,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        self._images = images
        self._labels = torch.from_numpy(images.labels.astype(np.int64)).to(device)
        self._device = device
        self._channels_last = channels_last
        self._dtype = IMAGE_DTYPE[config.dtype]
        self._pipeline = build_pipeline(
            config,
            training=training,
            batch_size=batch_size,
            device=device,
            layout="HWC" if channels_last else "CHW",
        )
        self._in_flight: deque[np.ndarray] = deque()
        self._primed = False

    def __len__(self) -> int:
        """Batches submitted and not collected."""
        return len(self._in_flight)

    def submit(self, ids: np.ndarray, **feeds: np.ndarray) -> None:
        """Start reading images ``ids``; ``feeds`` are further inputs of the pipeline, [B, ...] each.

        Raises:
            RecipeError: an image of an earlier batch cannot be read; the message names the file.
        """
        if not self._primed:
            self._prime(ids[:1], {name: values[:1] for name, values in feeds.items()})
        self._feed(ids, feeds)
        self._schedule()

    def collect(self) -> Batch:
        """Wait for the oldest batch.

        Raises:
            RecipeError: an image cannot be read; the message names the file.
        """
        try:
            if self._device.type == "cuda":
                outputs = self._pipeline.share_outputs(torch.cuda.current_stream(self._device).cuda_stream)
            else:
                outputs = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise self._explain(error) from error
        # No copies: the tensors own their memory, which DALI takes back when the last of them is gone.
        images, ids = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        if self._channels_last:
            images = images.permute(0, 3, 1, 2)
        self._pipeline.release_outputs()
        expected = self._in_flight.popleft()
        assert np.array_equal(ids.numpy(), expected)
        images = images.to(self._dtype)  # DALI has no bfloat16
        return Batch(images=images, labels=self._labels[ids.to(self._device)], ids=ids)

    def _prime(self, ids: np.ndarray, feeds: dict[str, np.ndarray]) -> None:
        """A pipeline's first run takes as many batches as it prefetches; give it ones that nobody asked for."""
        for _ in range(self._pipeline.prefetch_queue_depth):
            self._feed(ids, feeds)
        self._schedule()
        while self._in_flight:
            self.collect()
        self._primed = True

    def _feed(self, ids: np.ndarray, feeds: dict[str, np.ndarray]) -> None:
        encoded = (self._images.path(int(index)).encode(errors="surrogateescape") for index in ids)
        paths = [np.frombuffer(path, np.uint8) for path in encoded]
        self._in_flight.append(ids)
        try:
            for name, values in {"paths": paths, "ids": ids, **feeds}.items():
                self._pipeline.feed_input(name, values)
        except RuntimeError as error:
            raise self._explain(error) from error

    def _schedule(self) -> None:
        try:
            self._pipeline.schedule_run()
        except RuntimeError as error:
            raise self._explain(error) from error

    def _explain(self, error: RuntimeError) -> Exception:
        """DALI's message does not name the file: decode those in flight one by one."""
        decoding = Decoding(device=self._device)
        files = [self._images.path(int(index)) for index in itertools.chain.from_iterable(self._in_flight)]
        for path in files:
            problem = problem_of_file(path, decoding)
            if problem:
                return RecipeError(
                    "data.path",
                    f"cannot read image {path}: {problem}",
                    "repair it, or leave it out by data.skip_list; cyclebnn data check finds all such files",
                )
        return RuntimeError(f"DALI failed on one of {', '.join(files)}: {error}")
