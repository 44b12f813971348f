"""The loaders that ``cyclebnn bench data`` compares: this project's and timm's, on the same files."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import pipeline_def

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.folder import ImageList
from cyclebnn_dist.data.loader import TrainLoader
from cyclebnn_dist.timm_import import timm

fn: Any = dali.fn
types: Any = dali.types

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What both loaders are asked for: ``config`` counts augmentation and size, ``config.threads`` the workers."""

    images: ImageList
    config: DataConfig
    batch: int


class Stream(ABC):
    """Endless batches, prepared in the background."""

    ahead: int
    """Batches that are ready when nobody has asked for a while."""

    @abstractmethod
    def next(self) -> Any:
        """Wait for the next batch."""

    @abstractmethod
    def close(self) -> None:
        """Stop what prepares batches."""


class Dali(Stream):
    """This project's loader, as training uses it."""

    def __init__(self, settings: Settings) -> None:
        self.ahead = settings.config.prefetch
        self._loader = TrainLoader(
            settings.images,
            settings.config,
            batch_size=settings.batch,
            rank=0,
            world_size=1,
            seed=0,
            device=CPU,
        )

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._loader.next()
        return batch.images, batch.labels

    def close(self) -> None:
        self._loader.close()


class DaliDecode(Stream):
    """DALI reading and decoding whole images, nothing else."""

    def __init__(self, settings: Settings) -> None:
        self.ahead = settings.config.prefetch
        self._images, self._batch, self._place = settings.images, settings.batch, 0
        self._pipeline: Any = _decoding(
            batch_size=settings.batch,
            num_threads=settings.config.threads,
            device_id=None,
            prefetch_queue_depth=self.ahead,
        )
        self._pipeline.build()
        for _ in range(self.ahead):
            self._feed()
        self._pipeline.schedule_run()

    def next(self) -> Any:
        sizes = self._pipeline.share_outputs()
        self._pipeline.release_outputs()
        self._feed()
        self._pipeline.schedule_run()
        return sizes

    def close(self) -> None:
        self._pipeline = None

    def _feed(self) -> None:
        ids = np.arange(self._place, self._place + self._batch) % len(self._images)
        self._place += self._batch
        self._pipeline.feed_input("paths", self._images.inputs(ids)["paths"])


class Workers(Stream):
    """A loader of torch's with worker processes, which are kept over epochs: that costs it nothing at their ends."""

    def __init__(self, loader: Any, *, ahead: int) -> None:
        self.ahead = ahead
        self._batches: Iterator[Any] | None = _endless(loader)
        next(self._batches)

    def next(self) -> Any:
        assert self._batches is not None
        return next(self._batches)

    def close(self) -> None:
        # Workers end with the last reference to what they work for.
        self._batches = None
        gc.collect()


def timm_loader(settings: Settings, *, probability: float = 0.5) -> Stream:
    """timm's loader as its own training script has it: Pillow in workers, normalization where batches arrive.

    Args:
        probability: of each of RandAugment's operations; timm's default does half of them.
    """
    config = settings.config
    policy = None
    if config.augment == "randaugment":
        policy = (
            f"rand-m{config.randaugment_magnitude}-n{config.randaugment_num_ops}-mstd0.5-p{probability:g}"
        )
    loader = timm.data.create_loader(
        _timm_dataset(settings.images),
        config.image_size,
        settings.batch,
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.flip,
        color_jitter=0.0,
        auto_augment=policy,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        num_workers=config.threads,
        device=CPU,
        use_multi_epochs_loader=True,
    )
    return Workers(loader, ahead=2 * config.threads + 1)


def timm_decoder(settings: Settings) -> Stream:
    """timm's workers reading and decoding whole images with Pillow; no pixels leave them."""
    threads = settings.config.threads
    dataset = _timm_dataset(settings.images)
    dataset.transform = _width
    loader = timm.data.loader.MultiEpochsDataLoader(
        dataset,
        batch_size=settings.batch,
        shuffle=True,
        drop_last=True,
        num_workers=threads,
        persistent_workers=True,
    )
    return Workers(loader, ahead=2 * threads)


def _all_operations(settings: Settings) -> Stream:
    return timm_loader(settings, probability=1.0)


STREAMS: dict[str, tuple[str, Callable[[Settings], Stream]]] = {
    "timm decode": ("none", timm_decoder),
    "timm plain": ("none", timm_loader),
    "timm randaugment": ("randaugment", timm_loader),
    "timm randaugment, every operation": ("randaugment", _all_operations),
    "dali decode": ("none", DaliDecode),
    "dali plain": ("none", Dali),
    "dali randaugment": ("randaugment", Dali),
}
"""``data.augment`` of each and what makes it; first those that fork workers, best done before DALI has its threads."""


def _timm_dataset(images: ImageList) -> Any:
    """timm's own data set of the same folder."""
    return timm.data.create_dataset("", root=images.root, search_split=False, is_training=True)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _width(image: Any) -> int:
    return int(image.size[0])


@pipeline_def
def _decoding() -> Any:
    paths = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
    encoded = fn.io.file.read(paths, dont_use_mmap=True)
    return fn.decoders.image(encoded, adjust_orientation=False).shape()
