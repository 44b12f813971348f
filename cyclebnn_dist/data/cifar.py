"""CIFAR-10 and CIFAR-100 as published: binary files of labels and 32x32 images, read in place."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from cyclebnn_dist.config import RecipeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CifarFormat:
    """How one of the two sets is published.

    Attributes:
        folder: of the unpacked archive.
        files: file names of each split.
        class_names: text file of class names, one a line.
        label_bytes: bytes in front of an image; the last of them is the (fine) class.
        records: images of every file as published, by split.
        mean, std: per channel, of the training images in [0, 1], to the digits in common use.
    """

    folder: str
    files: dict[str, tuple[str, ...]]
    class_names: str
    label_bytes: int
    num_classes: int
    records: dict[str, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    side: ClassVar[int] = 32

    @property
    def record_bytes(self) -> int:
        return self.label_bytes + 3 * self.side * self.side


CIFAR_SETS = {
    "cifar10": CifarFormat(
        folder="cifar-10-batches-bin",
        files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "val": ("test_batch.bin",)},
        class_names="batches.meta.txt",
        label_bytes=1,
        num_classes=10,
        records={"train": 10000, "val": 10000},
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": CifarFormat(
        folder="cifar-100-binary",
        files={"train": ("train.bin",), "val": ("test.bin",)},
        class_names="fine_label_names.txt",
        label_bytes=2,
        num_classes=100,
        records={"train": 50000, "val": 10000},
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


@dataclass(frozen=True, eq=False)
class CifarImages:
    """Images of one split.

    Attributes:
        root: folder of the files.
        files: names of the files, in the order of ids.
        counts: images of each file.
        label_bytes: bytes in front of each image.
        labels: class index of each image, int32.
        classes: class names as published, else numbers.
        digest: 63-bit number of the files' contents.
    """

    root: str
    files: tuple[str, ...]
    counts: tuple[int, ...]
    label_bytes: int
    labels: np.ndarray
    classes: list[str]
    digest: int
    kind: ClassVar[Literal["pixels"]] = "pixels"
    shard_sizes: ClassVar[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """File and record of image ``index``."""
        file = int(np.searchsorted(np.cumsum(self.counts), index, side="right"))
        return f"{os.path.join(self.root, self.files[file])}, image {index - sum(self.counts[:file])}"

    def encoded(self, index: int) -> bytes:
        """There is no image file: images are stored as they are."""
        raise OSError(f"{self.name(index)} is not encoded")

    def inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """``pixels``: uint8 [len(ids), 32, 32, 3]."""
        return {"pixels": self.pixels(ids)}

    def pixels(self, ids: np.ndarray) -> np.ndarray:
        """Images ``ids``, uint8 [len(ids), 32, 32, 3]."""
        ends = np.cumsum(self.counts)
        files = np.searchsorted(ends, ids, side="right")
        planes = np.empty((len(ids), 3, CifarFormat.side, CifarFormat.side), np.uint8)
        for file in np.unique(files):
            chosen = files == file
            rows = ids[chosen] - (ends[file] - self.counts[file])
            records = self._maps[file][rows, self.label_bytes :]
            planes[chosen] = records.reshape(len(rows), *planes.shape[1:])
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        """The files, mapped into memory, so that all ranks of a node share one copy."""
        return [
            np.memmap(os.path.join(self.root, file), np.uint8, mode="r").reshape(count, -1)
            for file, count in zip(self.files, self.counts, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}


def find_cifar(path: str | Path, name: str) -> Path | None:
    """The folder in or at ``path`` that holds any file of the set, if there is one."""
    known = CIFAR_SETS[name]
    files = [file for files in known.files.values() for file in files]
    for folder in (Path(path) / known.folder, Path(path)):
        if any(os.path.isfile(folder / file) for file in files):
            return folder
    return None


def scan_cifar(path: str | Path, split: str, *, name: str, num_classes: int) -> CifarImages:
    """Read the labels of the published binary files in ``path/<folder>``, or in ``path`` itself.

    Args:
        split: ``train`` or ``val``, which is what the papers call the test set.
        name: a key of ``CIFAR_SETS``.
        num_classes: ``model.num_classes``, which must be that of the set.

    Raises:
        RecipeError: a file is missing, unreadable, of a wrong size or holds a wrong label; the message names it.
    """
    known = CIFAR_SETS[name]
    if num_classes != known.num_classes:
        raise RecipeError(
            "model.num_classes",
            f"{num_classes}, but {name} has {known.num_classes} classes",
            f"set model.num_classes={known.num_classes}",
        )
    folder = find_cifar(path, name) or Path(path) / known.folder
    state = hashlib.sha256(name.encode())
    labels, counts = [], []
    for file in known.files[split]:
        records = _read_records(folder / file, name)
        state.update(records.tobytes())
        labels.append(records[:, known.label_bytes - 1].astype(np.int32))
        counts.append(len(records))
        if len(records) != known.records[split]:
            log.warning(
                "%s holds %d images, %d as published", folder / file, len(records), known.records[split]
            )
    log.info("%s: %d %s images of %s", folder, sum(counts), split, name)
    return CifarImages(
        root=str(folder),
        files=known.files[split],
        counts=tuple(counts),
        label_bytes=known.label_bytes,
        labels=np.concatenate(labels),
        classes=_class_names(folder, known),
        digest=int.from_bytes(state.digest()[:8], "big") >> 1,
    )


def _read_records(file: Path, name: str) -> np.ndarray:
    known = CIFAR_SETS[name]
    try:
        content = np.fromfile(file, np.uint8)
    except FileNotFoundError:
        files = ", ".join(each for files in known.files.values() for each in files)
        raise RecipeError(
            "data.path",
            f"{file} does not exist",
            f"unpack the binary version of {name} so that {file.parent} holds {files}",
        ) from None
    except OSError as error:
        raise RecipeError("data.path", f"cannot read {file}: {error.strerror}") from None
    if not len(content) or len(content) % known.record_bytes:
        raise RecipeError(
            "data.path",
            f"{file} has {len(content)} bytes, which is no multiple of {known.record_bytes}, an image of {name}",
            "it is cut short or of another format: unpack the binary version again",
        )
    records = content.reshape(-1, known.record_bytes)
    wrong = np.flatnonzero(records[:, known.label_bytes - 1] >= known.num_classes)
    if len(wrong):
        raise RecipeError(
            "data.path",
            f"{file}, image {wrong[0]} has class {records[wrong[0], known.label_bytes - 1]}",
            f"it is no file of {name}: unpack the binary version again",
        )
    return records


def _class_names(folder: Path, known: CifarFormat) -> list[str]:
    try:
        names = (folder / known.class_names).read_text().split()
    except (OSError, UnicodeDecodeError):
        names = []
    return names if len(names) == known.num_classes else [str(index) for index in range(known.num_classes)]
