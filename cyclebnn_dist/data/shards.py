"""The shards: the images of a split in WebDataset tar files, each at its place by offset and size."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.shard_index import index_path, read_shard

log = logging.getLogger(__name__)

CLASS_NAMES = "classes.json"
OPEN_FILES = 256


@dataclass(frozen=True, eq=False)
class ShardList:
    """Images of one split, in the order in which they lie in the shards, shards by name.

    Attributes:
        root: the split's folder.
        shards: file names, sorted.
        shard_sizes: images of each.
        keys: of each image, within its shard.
        offsets, sizes: bytes of each image in its shard, int64.
        labels: class index of each image, int32.
        classes: class names.
    """

    root: str
    shards: list[str]
    shard_sizes: Sequence[int]
    keys: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: list[str]
    kind: ClassVar[Literal["encoded"]] = "encoded"
    broken: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def digest(self) -> int:
        """63-bit number of shard names and sizes, keys, image sizes, labels and classes."""
        state = hashlib.sha256("\0".join(self.classes).encode())
        for texts in (self.shards, self.keys):
            state.update("\0".join(texts).encode(errors="surrogateescape"))
        state.update(np.asarray(self.shard_sizes, "<i8").tobytes())
        state.update(self.sizes.astype("<i8").tobytes())
        state.update(self.labels.astype("<i4").tobytes())
        return int.from_bytes(state.digest()[:8], "big") >> 1

    def name(self, index: int) -> str:
        """Shard and key of image ``index``."""
        return f"{self._shard(index)}: {self.keys[index]}"

    def listed(self) -> list[str]:
        """What a skip list calls the images, behind ``<split>/``: ``<shard>/<key>``."""
        keys = iter(self.keys)
        return [
            f"{shard}/{next(keys)}"
            for shard, size in zip(self.shards, self.shard_sizes, strict=True)
            for _ in range(size)
        ]

    def only(self, keep: np.ndarray, *, broken: tuple[str, ...] = ()) -> ShardList:
        """The images where ``keep``, bool [len(self)], is true."""
        assert not broken
        parts = np.split(keep, np.cumsum(self.shard_sizes)[:-1])
        return replace(
            self,
            shard_sizes=[int(part.sum()) for part in parts],
            keys=[key for key, kept in zip(self.keys, keep, strict=True) if kept],
            offsets=self.offsets[keep],
            sizes=self.sizes[keep],
            labels=self.labels[keep],
        )

    def encoded(self, index: int) -> bytes:
        """The bytes of image ``index``.

        Raises:
            OSError: they cannot be read.
        """
        opened = self._opened.get(self._shard(index))
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        parts: list[bytes] = []
        while size:
            part = os.pread(opened.descriptor, size, offset)
            if not part:
                raise OSError("the shard is cut short")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """``encoded``: the bytes of images ``ids``, uint8 each, read in the order in which they lie.

        Raises:
            RecipeError: an image cannot be read; the message names shard and key.
        """
        found: list[Any] = [None] * len(ids)
        for place in np.argsort(ids):
            index = int(ids[place])
            try:
                found[place] = np.frombuffer(self.encoded(index), np.uint8)
            except OSError as error:
                raise RecipeError(
                    "data.path", f"cannot read image {self.name(index)}: {error.strerror or error}"
                ) from None
        return {"encoded": found}

    def _shard(self, index: int) -> str:
        return os.path.join(self.root, self.shards[int(np.searchsorted(self._ends, index, side="right"))])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.shard_sizes)

    @cached_property
    def _opened(self) -> OpenFiles:
        return OpenFiles(OPEN_FILES)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


class OpenFiles:
    """The files used last, kept open, for several threads: one that falls out closes when no thread reads it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> _OpenFile:
        """The open file ``path``; hold on to it while using its descriptor."""
        with self._lock:
            opened = self._files.pop(path, None) or _OpenFile(path)
            self._files[path] = opened
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
            return opened


class _OpenFile:
    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def shard_names(root: Path) -> list[str]:
    """Names of the tar files in ``root``, sorted; none if there is no such folder."""
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.endswith(".tar") and not entry.name.startswith(".")
            )
    except OSError:
        return []


def scan_shards(path: str | Path, split: str, *, num_classes: int) -> ShardList:
    """Index ``path/split/*.tar``: images and ``.cls`` members, from ``.idx`` files where there are.

    Class names are those of ``path/classes.json``, a list, or else numbers.

    Args:
        split: ``train`` or ``val``.
        num_classes: ``model.num_classes``; classes are numbers below it.

    Raises:
        RecipeError: no shards, or one that is damaged or incomplete; the message names it.
    """
    root = Path(path) / split
    names = shard_names(root)
    if not names:
        raise RecipeError(
            "data.path",
            f"no shards in {root}",
            f"expected {root}/*.tar; `cyclebnn data pack` makes them of class folders",
        )
    classes = _class_names(Path(path) / CLASS_NAMES, num_classes)
    bare = sum(not os.path.exists(index_path(root / name)) for name in names)
    if bare:
        log.info(
            "%s: %d of %d shards have no .idx file, reading their headers instead; wds2idx writes them",
            root,
            bare,
            len(names),
        )
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: read_shard(root / name), names))
    samples = [sample for shard in found for sample in shard]
    labels = np.array([sample.label for sample in samples], np.int32)
    sizes = [len(shard) for shard in found]
    if labels.max() >= num_classes:
        worst = int(labels.argmax())
        shard = int(np.searchsorted(np.cumsum(sizes), worst, side="right"))
        raise RecipeError(
            "model.num_classes",
            f"{num_classes}, but sample {samples[worst].key} of {root / names[shard]} is of class {labels[worst]}",
            f"set model.num_classes to {labels[worst] + 1} or more, or data.path to another data set",
        )
    if split == "train" and len(np.unique(labels)) < num_classes:
        missing = sorted(set(range(num_classes)) - set(labels.tolist()))
        log.warning(
            "%s has no images of %d classes, the first is %s", root, len(missing), classes[missing[0]]
        )
    log.info("%s: %d images in %d shards", root, len(samples), len(names))
    return ShardList(
        root=str(root),
        shards=names,
        shard_sizes=sizes,
        keys=[sample.key for sample in samples],
        offsets=np.array([sample.image.offset for sample in samples], np.int64),
        sizes=np.array([sample.image.size for sample in samples], np.int64),
        labels=labels,
        classes=classes,
    )


def _class_names(file: Path, num_classes: int) -> list[str]:
    try:
        classes = json.loads(file.read_text())
    except FileNotFoundError:
        return [str(index) for index in range(num_classes)]
    except (OSError, ValueError) as error:
        raise RecipeError("data.path", f"cannot read {file}: {error}") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise RecipeError("data.path", f"{file} is no list of class names", 'expected ["cat", "dog", ...]')
    if len(classes) != num_classes:
        raise RecipeError(
            "model.num_classes",
            f"{num_classes}, but {file} lists {len(classes)} classes",
            f"set model.num_classes={len(classes)}, or data.path to another data set",
        )
    return classes
