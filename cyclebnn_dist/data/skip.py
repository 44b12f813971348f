"""The skip list: a text file that names the images that training and evaluation leave out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.folder import ImageList
from cyclebnn_dist.data.shards import ShardList

log = logging.getLogger(__name__)

Skipping = TypeVar("Skipping", ImageList, ShardList)

_KEY = "data.skip_list"
_BREAKS = re.compile(r"[\r\n]")


def read_skip_list(path: str | Path) -> list[str]:
    """Names that a skip list holds, one a line: ``train/<class>/<file>``, or ``train/<shard>/<key>``.

    Empty lines and lines that begin with ``#`` do not count. A line in quotation marks is a JSON string: a name may
    hold line breaks.

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
        if name.startswith('"'):
            with contextlib.suppress(ValueError):  # what is no JSON is refused below
                name = json.loads(name)
        split, _, rest = name.partition("/")
        shard, _, key = rest.partition("/")
        known = rest.count("/") == 1 or shard.endswith(".tar")
        if split not in ("train", "val") or not (key and known):
            raise RecipeError(
                _KEY,
                f"{path}, line {number}: '{name}'",
                "expected <split>/<class>/<file>, or <split>/<shard>/<key>, of split train or val",
            )
        names.append(name)
    return names


def write_skip_list(path: Path, problems: Mapping[str, str], *, heading: Iterable[str] = ()) -> None:
    """Write a skip list of ``{name relative to the data set: why}``, with the reasons as comments.

    Raises:
        RecipeError: it cannot be written.
    """
    lines = [f"# {line}" for line in heading]
    for name, why in problems.items():
        lines += [f"# {' '.join(why.split())}", json.dumps(name) if _BREAKS.search(name) else name]
    try:
        path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    except OSError as error:
        raise RecipeError("--out", f"cannot write {path}: {error.strerror}") from None


def without(images: Skipping, names: Iterable[str], *, split: str) -> Skipping:
    """``images`` without those that ``names`` lists, and with new ids.

    Names that no image has are warned of: someone may have repaired or removed them since.

    Raises:
        RecipeError: no line of the list names an image of the data set, or a class has no image left.
    """
    named = set(names)
    mine = {name.partition("/")[2] for name in named if name.startswith(f"{split}/")}
    own = images.listed()
    keep = np.array([name not in mine for name in own], dtype=bool)
    rest = images.only(keep, broken=tuple(name for name in images.broken if name not in mine))
    unknown = sorted(mine.difference(own, images.broken))
    if unknown:
        folder = os.path.dirname(images.root)
        if not any(_exists(folder, name) for name in named):
            raise RecipeError(
                _KEY,
                f"none of its {len(named)} lines names a file in {folder}",
                "is it the list of another data set? Names are relative to data.path",
            )
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        log.warning(
            "%s names images that %s does not hold: %s%s", _KEY, images.root, ", ".join(unknown[:3]), more
        )
    before, left = (np.bincount(each.labels, minlength=len(images.classes)) for each in (images, rest))
    empty = [name for name, had, has in zip(images.classes, before, left, strict=True) if had and not has]
    if empty:
        raise RecipeError(
            _KEY,
            f"leaves no image of class {', '.join(empty[:5])} in {images.root}",
            "repair one of its images",
        )
    log.info("%s: %d images left out by %s", images.root, int((~keep).sum()), _KEY)
    return rest


def _exists(folder: str, name: str) -> bool:
    """Whether the data set has this file, or this shard."""
    shard, behind, _ = name.partition(".tar/")
    return os.path.lexists(os.path.join(folder, f"{shard}.tar" if behind else name))
