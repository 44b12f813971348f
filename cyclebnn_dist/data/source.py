"""The source: the images of one split as loaders see them, wherever they lie, and how its format is found."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data.cifar import CIFAR_SETS, CifarFormat, find_cifar, scan_cifar
from cyclebnn_dist.data.folder import is_folder, refuse_broken, scan_folder
from cyclebnn_dist.data.shards import scan_shards, shard_names
from cyclebnn_dist.data.skip import read_skip_list, without

log = logging.getLogger(__name__)

FORMATS = ("folder", "webdataset", *CIFAR_SETS)


class Source(Protocol):
    """Images of one split, in an order that is the same on every machine. An image's id is its index here."""

    @property
    def root(self) -> str:
        """Folder or file they lie in, for messages."""

    @property
    def labels(self) -> np.ndarray:
        """Class index of each image, int32 [len(self)]."""

    @property
    def classes(self) -> list[str]:
        """Class names; the class index is the position here."""

    @property
    def digest(self) -> int:
        """63-bit number of what the images are: the same set elsewhere has the same digest."""

    @property
    def kind(self) -> Literal["paths", "encoded", "pixels"]:
        """What ``inputs`` gives: names of image files, their bytes, or decoded images."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Images of each file that holds many, in the order of their ids; empty where every image has its own."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where image ``index`` is, for messages: its file, or its shard and key."""

    def encoded(self, index: int) -> bytes:
        """The image file ``index``; not for ``pixels``.

        Raises:
            OSError: it cannot be read.
        """

    def inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """Inputs of the pipeline for images ``ids``, by the name ``kind``: one array each, or all in one.

        Raises:
            RecipeError: one of them cannot be read; the message names it.
        """


def open_source(config: DataConfig, split: str, *, num_classes: int) -> Source:
    """The images of ``split``, in the format of ``config.format``, or in the one that is found for ``auto``.

    Args:
        split: ``train`` or ``val``.
        num_classes: ``model.num_classes``, which the data must match.

    Raises:
        RecipeError: nothing is found, or something incomplete or contradictory; the message names it.
    """
    name: str = config.format
    if name == "auto":
        name = find_format(config.path)
        log.info("data.format: %s holds %s", config.path, name)
    if config.shuffle_shards and name != "webdataset":
        raise RecipeError(
            "data.shuffle_shards",
            f"{config.shuffle_shards}, but {config.path} is read as {name}, which has no shards",
            "leave it at 0: all images are shuffled together",
        )
    if config.skip_list and name in CIFAR_SETS:
        raise RecipeError(
            "data.skip_list",
            f"{config.skip_list} names images, but {config.path} is read as {name}, whose images have no names",
            "leave it out",
        )
    if name in CIFAR_SETS:
        if config.image_size != CIFAR_SETS[name].side:
            raise RecipeError(
                "data.image_size",
                f"{config.image_size}, but images of {name} are not resized",
                f"set data.image_size={CIFAR_SETS[name].side}",
            )
        _warn_of_others_statistics(config, name)
        return scan_cifar(config.path, split, name=name, num_classes=num_classes)
    if name == "webdataset":
        shards = scan_shards(config.path, split, num_classes=num_classes)
        if config.skip_list:
            shards = without(shards, read_skip_list(config.skip_list), split=split)
        return shards
    images = scan_folder(config.path, split, num_classes=num_classes)
    if config.skip_list:
        images = without(images, read_skip_list(config.skip_list), split=split)
    refuse_broken(images)
    return images


def _warn_of_others_statistics(config: DataConfig, name: str) -> None:
    """Warn where mean and standard deviation are those in common use for another set than ``name``."""
    sets: dict[str, DataConfig | CifarFormat] = {"ImageNet": DataConfig(), **CIFAR_SETS}
    for other, its in sets.items():
        if other != name and (tuple(config.mean), tuple(config.std)) == (its.mean, its.std):
            own = CIFAR_SETS[name]
            log.warning(
                "data.mean and data.std are those of %s; those of %s are data.mean=%s data.std=%s",
                other,
                name,
                list(own.mean),
                list(own.std),
            )


def find_format(path: str | Path) -> str:
    """Which of ``FORMATS`` the data set in ``path`` has; ``folder``, whose errors are the plainest, if none.

    Raises:
        RecipeError: it holds more than one.
    """
    found: dict[str, str] = {}
    for split in ("train", "val"):
        root = Path(path) / split
        if shard_names(root):
            found.setdefault("webdataset", f"{root}/*.tar")
        if _has_folders(root):
            found.setdefault("folder", f"class folders in {root}")
    for name in CIFAR_SETS:
        place = find_cifar(path, name)
        if place is not None:
            found.setdefault(name, str(place))
    if len(found) > 1:
        raise RecipeError(
            "data.path",
            f"{path} holds more than one data set: {', '.join(found.values())}",
            f"move all but one away, or set data.format to one of {', '.join(found)}",
        )
    return next(iter(found), "folder")


def _has_folders(root: Path) -> bool:
    try:
        with os.scandir(root) as entries:
            return any(is_folder(entry) and not entry.name.startswith(".") for entry in entries)
    except OSError:
        return False
