"""The loaders: batches of one rank, in an order that is a function of the step, with exact resume."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
import torch

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.cifar_pipeline import padded_crop_feeds
from cyclebnn_dist.data.erasing import erase_
from cyclebnn_dist.data.in_flight import Record
from cyclebnn_dist.data.order import epoch_permutation, uniforms, windowed_permutation
from cyclebnn_dist.data.pipeline import num_columns, training_feeds
from cyclebnn_dist.data.reader import IMAGE_DTYPE, Batch, Reader
from cyclebnn_dist.data.source import Source

log = logging.getLogger(__name__)

_STATE_VERSION = 1
_NO_PART_OF_PIXELS = ("path", "format", "skip_list", "shuffle_shards", "threads", "prefetch")


class TrainLoader:
    """Endless training batches of one rank.

    Micro-batch ``m`` of an epoch takes places ``[m * B * W, (m + 1) * B * W)`` of the epoch's permutation,
    ``B`` images for each of the ``W`` ranks; after ``steps_per_epoch`` micro-batches the next permutation
    begins, and the places left over are not read. Where images lie in shards, ``config.shuffle_shards`` says how many
    of them the permutation mixes at a time. The augmentation of an image depends on its place, not on
    the rank that reads it: with the same images per optimizer step, another number of ranks, micro-batch or
    accumulation sees the same images, equally augmented.

    The state is one position, the batches handed out; it is the same on every rank.
    """

    def __init__(
        self,
        images: Source,
        config: DataConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        steps_per_epoch: int | None = None,
        channels_last: bool = False,
        in_flight: Path | None = None,
    ) -> None:
        """
        Args:
            batch_size: images per micro-batch and rank.
            rank, world_size: global ones, not those within a node.
            seed: the same on every rank.
            steps_per_epoch: micro-batches per epoch; default: as many full ones as there are.
            channels_last: memory layout of the images.
            in_flight: folder for the record of the images being read; default: none is kept.

        Raises:
            RecipeError: fewer images than one micro-batch of all ranks.
        """
        self._global = batch_size * world_size
        if len(images) < self._global:
            raise RecipeError(
                "train.global_batch_size",
                f"{world_size} ranks of {batch_size} images, but {images.root} holds only {len(images)}",
                f"set it to {len(images)} or less",
            )
        self.steps_per_epoch = steps_per_epoch or len(images) // self._global
        assert 0 < self.steps_per_epoch * self._global <= len(images)
        self._window = config.shuffle_shards if config.shuffle_shards < len(images.shard_sizes) else 0
        self._images = images
        self._config = config
        self._batch_size = batch_size
        self._rank = rank
        self._seed = seed
        self._device = device
        self._channels_last = channels_last
        self._record = Record(in_flight, split="train", rank=rank, digest=images.digest)
        self._reader: Reader | None = None
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._position = 0
        self._submitted = 0
        self._restarted = (-1, 0)

    @property
    def position(self) -> int:
        """Batches handed out since the beginning of training."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self._position // self.steps_per_epoch

    def next(self) -> Batch:
        """The next batch; DALI works on the ones after it meanwhile.

        Raises:
            RecipeError: an image cannot be read; the message names the file.
        """
        if self._reader is None:
            self._reader = Reader(
                self._images,
                self._config,
                batch_size=self._batch_size,
                training=True,
                device=self._device,
                channels_last=self._channels_last,
                record=self._record,
            )
        self._fill(self._reader)
        batch = self._reader.collect()
        epoch, places = self._places(self._position)
        erase_(batch.images, self._config, places=places, seed=self._seed, epoch=epoch)
        self._position += 1
        self._fill(self._reader)
        return batch

    def blank(self) -> Batch:
        """A batch of mean colour in class 0, of the shapes and types of ``next``; the position stays."""
        side = self._config.image_size
        shape = (self._batch_size, 3, side, side)
        images = torch.zeros(shape, dtype=IMAGE_DTYPE[self._config.dtype], device=self._device)
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(self._batch_size, dtype=torch.int64)
        return Batch(images=images, labels=labels.to(self._device), ids=labels)

    def seek(self, position: int) -> None:
        """Continue as if ``position`` batches had been handed out."""
        self.close()
        self._position = self._submitted = position
        self._restarted = (-1, 0)

    def state_dict(self) -> dict[str, int | str]:
        """The position and what it is a position in; numbers and strings only."""
        epoch, step = divmod(self._position, self.steps_per_epoch)
        return {
            "version": _STATE_VERSION,
            "epoch": epoch,
            "step": step,
            "steps_per_epoch": self.steps_per_epoch,
            "place": (step - self._skipped_in(epoch)) * self._global,
            "global_batch": self._global,
            "seed": self._seed,
            "dataset": self._images.digest,
            "window": self._window,
            "pipeline": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken: the next batches have the same ids and the same pixels.

        Exact for any number of ranks if the images per optimizer step are the same. With another data set,
        seed or global batch the rest of the epoch reads its permutation from the start; with other data
        settings or another version of DALI or torch the ids are the same and pixels may differ. Either is warned of
        once.
        """
        epoch, step, place = int(state["epoch"]), int(state["step"]), int(state["place"])
        saved_epoch_images = int(state["steps_per_epoch"]) * int(state["global_batch"])
        read_images = step * int(state["global_batch"])
        differing = [
            what
            for what, differs in (
                ("state version", state["version"] != _STATE_VERSION),
                ("data set", state["dataset"] != self._images.digest),
                ("seed", state["seed"] != self._seed),
                ("data.shuffle_shards", state.get("window", 0) != self._window),
                ("steps per epoch", saved_epoch_images != self.steps_per_epoch * self._global),
                ("global batch", bool(place % self._global or read_images % self._global)),
            )
            if differs
        ]
        if differing:
            step = min(read_images * self.steps_per_epoch // saved_epoch_images, self.steps_per_epoch - 1)
            self.seek(epoch * self.steps_per_epoch + step)
            self._restarted = (epoch, step)
            self._warn(
                f"the data position cannot be carried over exactly ({', '.join(differing)} changed): the remaining "
                f"{self.steps_per_epoch - step} batches of epoch {epoch} read its order from the start"
            )
            return
        step = read_images // self._global
        self.seek(epoch * self.steps_per_epoch + step)
        self._restarted = (epoch, step - place // self._global)
        if state["pipeline"] != self._fingerprint():
            self._warn(
                "data settings, or DALI's or torch's version, changed: the same images follow, but pixels may differ"
            )

    def close(self) -> None:
        """Stop DALI's threads and free its buffers; ``next`` would start them again."""
        self._reader = None
        self._record.close()
        self._submitted = self._position

    def _fill(self, reader: Reader) -> None:
        while reader.room:
            epoch, places = self._places(self._submitted)
            random = uniforms(places, num_columns(self._config), seed=self._seed, epoch=epoch)
            feeds = training_feeds(self._config, random)
            if self._images.kind == "pixels":
                feeds = padded_crop_feeds(feeds)
            reader.submit(self._order(epoch)[places.start : places.stop], **feeds)
            self._submitted += 1

    def _places(self, position: int) -> tuple[int, range]:
        """Epoch of the batch at ``position``, and the places of this rank's images in its permutation."""
        epoch, step = divmod(position, self.steps_per_epoch)
        first = (step - self._skipped_in(epoch)) * self._global + self._rank * self._batch_size
        return epoch, range(first, first + self._batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        if self._permutation[0] != epoch:
            self._permutation = (epoch, self._permute(epoch))
        return self._permutation[1]

    def _permute(self, epoch: int) -> np.ndarray:
        sizes = self._images.shard_sizes
        if self._window:
            return windowed_permutation(sizes, window=self._window, seed=self._seed, epoch=epoch)
        return epoch_permutation(len(self._images), seed=self._seed, epoch=epoch)

    def _skipped_in(self, epoch: int) -> int:
        """Batches of ``epoch`` whose places were not read, because a resume began its order anew."""
        return self._restarted[1] if epoch == self._restarted[0] else 0

    def _fingerprint(self) -> str:
        settings = [value for name, value in vars(self._config).items() if name not in _NO_PART_OF_PIXELS]
        versions = (nvidia.dali.__version__, torch.__version__)
        text = repr((settings, versions, self._device.type))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _warn(self, message: str) -> None:
        if self._rank == 0:
            log.warning(message)


class EvalLoader:
    """Validation batches of one rank; over all ranks every image comes exactly once per pass.

    Rank ``r`` of ``W`` reads images ``r, r + W, ...``: ranks may have one batch, or one image, more than
    others, or none at all, so a pass must not synchronise ranks batch by batch.
    """

    def __init__(
        self,
        images: Source,
        config: DataConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        channels_last: bool = False,
        in_flight: Path | None = None,
    ) -> None:
        self._images = images
        self._config = config
        self._batch_size = batch_size
        self._mine = np.arange(rank, len(images), world_size, dtype=np.int64)
        self._device = device
        self._channels_last = channels_last
        self._record = Record(in_flight, split="val", rank=rank, digest=images.digest)
        self._reader: Reader | None = None

    def __len__(self) -> int:
        """Batches of this rank in one pass."""
        return -(-len(self._mine) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One pass; the last batch may be smaller.

        Raises:
            RecipeError: an image cannot be read; the message names the file.
        """
        if self._reader is None or len(self._reader):
            self._reader = Reader(
                self._images,
                self._config,
                batch_size=self._batch_size,
                training=False,
                device=self._device,
                channels_last=self._channels_last,
                record=self._record,
            )
        reader = self._reader
        starts = iter(range(0, len(self._mine), self._batch_size))
        for start in itertools.islice(starts, reader.room):
            reader.submit(self._mine[start : start + self._batch_size])
        while len(reader):
            batch = reader.collect()
            for start in itertools.islice(starts, 1):
                reader.submit(self._mine[start : start + self._batch_size])
            yield batch

    def close(self) -> None:
        """Stop DALI's threads and free its buffers; another pass would start them again."""
        self._reader = None
        self._record.close()
