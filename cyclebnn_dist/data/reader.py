"""The reader: a DALI pipeline at work, and the batches it has been asked for."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.in_flight import Record, refuse_unreadable
from cyclebnn_dist.data.pipeline import build_pipeline
from cyclebnn_dist.data.source import Source

READ_THREADS = 4
READ_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """Images of one step of one rank.

    Attributes:
        images: [B, 3, S, S] of type ``data.dtype``, normalised, on the loader's device.
        labels: int64 [B], class indices, on the loader's device.
        ids: int64 [B], indices into the source, on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


IMAGE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Reader:
    """First in, first out: ``submit`` starts work on a batch, ``collect`` waits for the oldest one.

    DALI holds ``config.prefetch`` batches. Where this process reads the files, ``READ_AHEAD`` further ones are read
    by threads meanwhile, and handed to DALI when it has room.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch_size: int,
        training: bool,
        device: torch.device,
        channels_last: bool,
        record: Record,
    ) -> None:
        self._source = source
        self._record = record
        self._labels = torch.from_numpy(source.labels.astype(np.int64)).to(device)
        self._device = device
        self._channels_last = channels_last
        self._dtype = IMAGE_DTYPE[config.dtype]
        self._pipeline = build_pipeline(
            config,
            training=training,
            batch_size=batch_size,
            device=device,
            layout="HWC" if channels_last else "CHW",
            kind=source.kind,
        )
        self._depth = config.prefetch
        self._pool = ThreadPoolExecutor(READ_THREADS) if source.kind == "encoded" else None
        self._waiting: deque[tuple[np.ndarray, dict[str, np.ndarray], Callable[[], dict[str, Any]]]] = deque()
        self._in_flight: deque[np.ndarray] = deque()
        self._primed = False

    def __len__(self) -> int:
        """Batches submitted and not collected."""
        return len(self._waiting) + len(self._in_flight)

    @property
    def room(self) -> int:
        """Batches that may be submitted at once, so that neither DALI nor what reads ahead of it is idle."""
        return self._depth + (READ_AHEAD if self._pool else 0) - len(self)

    def submit(self, ids: np.ndarray, **feeds: np.ndarray) -> None:
        """Start reading images ``ids``; ``feeds`` are further inputs of the pipeline, [B, ...] each.

        Raises:
            RecipeError: an image of an earlier batch cannot be read; the message names the file.
        """
        waiting = (item[0] for item in self._waiting)
        self._record.write(np.concatenate([*self._in_flight, *waiting, ids]).tolist())
        if not self._primed:
            self._prime(ids[:1], {name: values[:1] for name, values in feeds.items()})
        self._waiting.append((ids, feeds, self._read(ids)))
        self._advance()

    def collect(self) -> Batch:
        """Wait for the oldest batch.

        Raises:
            RecipeError: an image cannot be read; the message names the file.
        """
        self._advance()
        return self._collect()

    def _collect(self) -> Batch:
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
            self._feed(ids, feeds, self._source.inputs(ids))
        self._schedule()
        while self._in_flight:
            self._collect()
        self._primed = True

    def _read(self, ids: np.ndarray) -> Callable[[], dict[str, Any]]:
        """Begin to read images ``ids``; what is returned waits for them."""
        if self._pool is None:
            return partial(self._source.inputs, ids)
        parts = np.array_split(ids, min(READ_THREADS, len(ids)))
        futures = [self._pool.submit(self._source.inputs, part) for part in parts]
        kind = self._source.kind
        return lambda: {kind: [image for future in futures for image in future.result()[kind]]}

    def _advance(self) -> None:
        """Hand waiting batches to DALI while it has room."""
        while self._waiting and len(self._in_flight) < self._depth:
            ids, feeds, read = self._waiting.popleft()
            self._feed(ids, feeds, read())
            self._schedule()

    def _feed(self, ids: np.ndarray, feeds: dict[str, np.ndarray], inputs: dict[str, Any]) -> None:
        self._in_flight.append(ids)
        try:
            for name, values in {**inputs, "ids": ids, **feeds}.items():
                self._pipeline.feed_input(name, values)
        except RuntimeError as error:
            raise self._explain(error) from error

    def _schedule(self) -> None:
        try:
            self._pipeline.schedule_run()
        except RuntimeError as error:
            raise self._explain(error) from error

    def _explain(self, error: RuntimeError) -> Exception:
        """DALI's message does not name the image: decode those in flight again."""
        ids = [int(index) for index in itertools.chain.from_iterable(self._in_flight)]
        return refuse_unreadable(self._source, ids, device=self._device) or RuntimeError(
            f"DALI failed on one of {', '.join(map(self._source.name, ids))}: {error}"
        )
