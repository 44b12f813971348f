"""The skip list: a text file of images that training and evaluation leave out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.folder import ImageList

log = logging.getLogger(__name__)

_KEY = "data.skip_list"


def read_skip_list(path: str | Path) -> list[str]:
    """Paths that a skip list names, relative to the data set's folder: ``train/<class>/<file>``, one a line.

    Empty lines and lines that begin with ``#`` do not count.

    Raises:
        RecipeError: the file cannot be read, or a line has another form.
    """
    try:
        text = Path(path).read_text(errors="surrogateescape")
    except OSError as error:
        raise RecipeError(
            _KEY, f"cannot read {path}: {error.strerror}", "cyclebnn data check DIR --out FILE writes one"
        ) from None
    names = []
    for number, line in enumerate(text.split("\n"), start=1):
        name = line.rstrip("\r")
        if not name.strip() or name.startswith("#"):
            continue
        split, _, rest = name.partition("/")
        if split not in ("train", "val") or rest.count("/") != 1:
            raise RecipeError(
                _KEY,
                f"{path}, line {number}: '{name}'",
                "expected train/<class>/<file> or val/<class>/<file>",
            )
        names.append(name)
    return names


def write_skip_list(path: Path, problems: Mapping[str, str], *, heading: Iterable[str] = ()) -> None:
    """Write a skip list of ``{path relative to the data set: why}``, with the reasons as comments."""
    lines = [f"# {line}" for line in heading]
    for name, why in problems.items():
        lines += [f"# {' '.join(why.split())}", name]
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")


def without(images: ImageList, names: Iterable[str], *, split: str) -> ImageList:
    """``images`` without the files that ``names`` lists, and with new ids.

    Names that no file has are warned of: someone may have repaired or removed them since.

    Raises:
        RecipeError: no line of the list names a file of the data set, or a class has no image left.
    """
    named = set(names)
    mine = {name.partition("/")[2] for name in named if name.startswith(f"{split}/")}
    keep = np.array([file not in mine for file in images.files], dtype=bool)
    skipped = int((~keep).sum())
    unknown = sorted(mine.difference(images.files, images.broken))
    if unknown:
        folder = os.path.dirname(images.root)
        if not any(os.path.lexists(os.path.join(folder, name)) for name in named):
            raise RecipeError(
                _KEY,
                f"none of its {len(named)} lines names a file in {folder}",
                "is it the list of another data set? Paths are relative to data.path",
            )
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        log.warning(
            "%s names files that %s does not hold: %s%s", _KEY, images.root, ", ".join(unknown[:3]), more
        )
    left = np.bincount(images.labels[keep], minlength=len(images.classes))
    empty = [name for name, count in zip(images.classes, left, strict=True) if not count]
    if empty:
        raise RecipeError(
            _KEY,
            f"leaves no image of class {', '.join(empty[:5])} in {images.root}",
            "repair one of its files",
        )
    log.info("%s: %d images left out by %s", images.root, skipped, _KEY)
    files = [file for file, kept in zip(images.files, keep, strict=True) if kept]
    broken = tuple(name for name in images.broken if name not in mine)
    return replace(images, files=files, labels=images.labels[keep], broken=broken)
