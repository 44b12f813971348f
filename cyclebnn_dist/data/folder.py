"""The image list: which files a split of the ImageNet folder layout holds, and the class of each."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from cyclebnn_dist.config import RecipeError

log = logging.getLogger(__name__)

EXTENSIONS = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True, eq=False)
class ImageList:
    """Files of one split, in an order that is the same on every machine. An image's id is its index here.

    Attributes:
        root: the split's folder.
        files: paths relative to ``root``, sorted by class, then by name.
        labels: class index of each file, int32 [len(files)].
        classes: class names, sorted; the class index is the position here.
        broken: further names of images that lead to no file: links to nothing or to themselves, pipes.
    """

    root: str
    files: list[str]
    labels: np.ndarray
    classes: list[str]
    broken: tuple[str, ...] = ()
    kind: ClassVar[Literal["paths"]] = "paths"
    shard_sizes: ClassVar[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Full path of image ``index``."""
        return os.path.join(self.root, self.files[index])

    def name(self, index: int) -> str:
        """Full path of image ``index``."""
        return self.path(index)

    def encoded(self, index: int) -> bytes:
        """The file of image ``index``.

        Raises:
            OSError: it cannot be read.
        """
        return Path(self.path(index)).read_bytes()

    def listed(self) -> list[str]:
        """What a skip list calls the images, behind ``<split>/``."""
        return self.files

    def only(self, keep: np.ndarray, *, broken: tuple[str, ...] = ()) -> ImageList:
        """The images where ``keep``, bool [len(self)], is true."""
        files = [file for file, kept in zip(self.files, keep, strict=True) if kept]
        return replace(self, files=files, labels=self.labels[keep], broken=broken)

    def inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """``paths``: names of the files, which DALI reads, uint8 each."""
        encoded = (self.path(int(index)).encode(errors="surrogateescape") for index in ids)
        return {"paths": [np.frombuffer(path, np.uint8) for path in encoded]}

    @cached_property
    def digest(self) -> int:
        """63-bit number of the relative paths and labels: the same set elsewhere has the same digest."""
        state = hashlib.sha256("\0".join(self.classes).encode())
        state.update("\0".join(self.files).encode(errors="surrogateescape"))
        state.update(self.labels.astype("<i4").tobytes())
        return int.from_bytes(state.digest()[:8], "big") >> 1


def scan_folder(path: str | Path, split: str, *, num_classes: int) -> ImageList:
    """List ``path/split/<class>/*``: every JPEG and PNG file (by extension, in any case), hidden ones aside.

    Args:
        path: the data set's folder, ``data.path``.
        split: ``train`` or ``val``. The classes of any other split than ``train`` must be those of ``train``,
            where that folder exists.
        num_classes: ``model.num_classes``, which the class folders must match.

    Raises:
        RecipeError: the folder is missing or unreadable, holds no classes, another number of them or other
            ones than the training split, or a class without images; the message names it.
    """
    root = Path(path) / split
    classes = _class_names(root)
    if not classes:
        raise RecipeError("data.path", f"no class folders in {root}", f"expected {root}/<class>/*.JPEG")
    train = Path(path) / "train"
    if split != "train" and train.is_dir():
        _check_same_classes(root, classes, train, _class_names(train))
    if len(classes) != num_classes:
        raise RecipeError(
            "model.num_classes",
            f"{num_classes}, but {root} holds {len(classes)} class folders",
            f"set model.num_classes={len(classes)}, or data.path to another data set",
        )

    with ThreadPoolExecutor(16) as pool:
        names = list(pool.map(lambda name: _image_names(root / name), classes))
    empty = [name for name, (found, _) in zip(classes, names, strict=True) if not found]
    if empty:
        listed = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise RecipeError(
            "data.path",
            f"no images in class {listed} of {root}",
            f"put {', '.join(EXTENSIONS)} files there, or remove the folder",
        )
    files, broken = (
        [f"{name}/{file}" for name, found in zip(classes, names, strict=True) for file in found[which]]
        for which in (0, 1)
    )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found) for found, _ in names])
    log.info("%s: %d images in %d classes", root, len(files), len(classes))
    return ImageList(root=str(root), files=files, labels=labels, classes=classes, broken=tuple(broken))


def refuse_broken(images: ImageList) -> None:
    """Raise a RecipeError that names the first of ``images.broken``, if there is any."""
    if images.broken:
        first = os.path.join(images.root, images.broken[0])
        others = f", and {len(images.broken) - 1} more" if len(images.broken) > 1 else ""
        what = "is a link that leads to no file" if os.path.islink(first) else "is no file"
        raise RecipeError(
            "data.path",
            f"{first} {what}{others}",
            "mend or remove it, or leave it out by data.skip_list; cyclebnn data check finds all such",
        )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; a link that leads back to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a regular file or leads to one."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _class_names(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries if is_folder(entry) and not entry.name.startswith(".")
            )
    except FileNotFoundError:
        missing = root if root.parent.is_dir() else root.parent
        raise RecipeError(
            "data.path",
            f"folder {missing} does not exist",
            f"expected {root}/<class>/*.JPEG; a sample set to try with: cyclebnn data sample {root.parent}",
        ) from None
    except OSError as error:
        raise RecipeError("data.path", f"cannot list {root}: {error.strerror}") from None


def _image_names(folder: Path) -> tuple[list[str], list[str]]:
    """Names of images in ``folder``, sorted: of files, and of what leads to no file."""
    files, broken = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                    if is_file(entry):
                        files.append(entry.name)
                    elif not is_folder(entry):
                        broken.append(entry.name)
        return sorted(files), sorted(broken)
    except OSError as error:
        raise RecipeError("data.path", f"cannot list {folder}: {error.strerror}") from None


def _check_same_classes(root: Path, classes: list[str], train: Path, train_classes: list[str]) -> None:
    only_here = sorted(set(classes) - set(train_classes))
    only_train = sorted(set(train_classes) - set(classes))
    if only_here or only_train:
        parts = [
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} only in {where}"
            for names, where in ((only_here, root), (only_train, train))
            if names
        ]
        raise RecipeError(
            "data.path",
            "training and validation classes differ: " + "; ".join(parts),
            "both folders need the same class folders",
        )
