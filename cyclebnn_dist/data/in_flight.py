"""The images in flight: on disk while a reader is at work, so that a start after a sudden end knows which to look at.

run_dir/in_flight/
  train_rank3.json  one line: the split, the digest of its images, the ids of those that rank 3 was reading

DALI's decoder may take the process with it (see decoding.py) instead of raising an error, and then nothing is said.
A record is there from a reader's first batch until it is closed; one that is found at a start is of a life that died.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.decoding import MOST, Decoding, problem_of_image
from cyclebnn_dist.data.source import Source
from cyclebnn_dist.world import World, on_main, share_refusal

log = logging.getLogger(__name__)

FOLDER = "in_flight"


class Record:
    """Which images of one split one rank is reading; a disk that takes no record is warned of once, and no more."""

    def __init__(self, folder: Path | None, *, split: str, rank: int, digest: int) -> None:
        """
        Args:
            folder: where it is kept; None: nowhere.
            digest: of the source.
        """
        self._path = folder / f"{split}_rank{rank}.json" if folder else None
        self._head = json.dumps({"split": split, "digest": digest})[:-1]
        self._descriptor: int | None = None

    def write(self, ids: Iterable[int]) -> None:
        """Put these in place of the ones before."""
        if self._path is None:
            return
        line = f'{self._head}, "ids": [{", ".join(map(str, ids))}]}}\n'.encode()
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.pwrite(self._descriptor, line, 0)
            os.ftruncate(self._descriptor, len(line))
        except OSError as error:
            log.warning("the images in flight are not recorded: %s", error)
            self.close()
            self._path = None

    def close(self) -> None:
        """The images have been read, or are not wanted: remove the file, and the folder with the last one."""
        if self._path is not None and self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):
                os.close(descriptor)
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
                self._path.parent.rmdir()


def check_left_behind(folder: Path, images: tuple[Source, Source], world: World) -> None:
    """Collective: every rank calls this. Decode what a life that died was reading, and remove its records.

    Args:
        images: training and validation images; records of other ones are removed unread.

    Raises:
        RecipeError: on every rank, naming an image that cannot be read; the records stay.
    """
    named = zip(("train", "val"), images, strict=True)
    by_split = {split: source for split, source in named if source.kind != "pixels"}
    suspects = on_main(world, lambda: left_behind(folder, by_split))
    if suspects:
        log.info(
            "the last start ended in the midst of reading; checking the %d images in flight", len(suspects)
        )
    refusal = None
    for split, source in by_split.items():
        mine = [index for name, index in suspects[world.rank :: world.size] if name == split]
        refusal = refusal or refuse_unreadable(source, mine, device=world.device)
    share_refusal(world, refusal)
    on_main(world, lambda: remove_records(folder))


def left_behind(folder: Path, images: dict[str, Source]) -> list[tuple[str, int]]:
    """Split and id, each once and sorted, of all images that records of these sources name."""
    found: set[tuple[str, int]] = set()
    for path in folder.glob("*.json"):
        try:
            # One that is shorter than the one before it may have died before what follows it was cut off.
            record, _ = json.JSONDecoder().raw_decode(path.read_text())
            split, digest, ids = record["split"], record["digest"], record["ids"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if split in images and digest == images[split].digest:
            found.update((split, int(index)) for index in ids)
    return sorted(found)


def remove_records(folder: Path) -> None:
    """Remove the folder and every record in it."""
    with suppress(OSError):
        for path in folder.glob("*.json"):
            path.unlink(missing_ok=True)
        folder.rmdir()


def refuse_unreadable(source: Source, ids: Sequence[int], *, device: torch.device) -> RecipeError | None:
    """What to raise for the first image among ``ids`` that cannot be read, naming it; None if all can."""
    if source.kind == "pixels":
        return None
    decoding = Decoding(batch_size=MOST, device=device)
    for start in range(0, len(ids), MOST):
        group = ids[start : start + MOST]
        contents = [_content(source, index) for index in group]
        read = [content for content in contents if not isinstance(content, str)]
        decoded = not read or decoding.all_decode(read)
        for index, content in zip(group, contents, strict=True):
            if isinstance(content, str):
                problem: str | None = content
            else:
                problem = None if decoded else problem_of_image(content, decoding)
            if problem:
                return RecipeError(
                    "data.path",
                    f"cannot read image {source.name(index)}: {problem}",
                    "repair it, or leave it out by data.skip_list; cyclebnn data check finds all such files"
                    if source.kind == "paths"
                    else "make the shard again, or leave it out by data.skip_list, as <split>/<shard>/<key>; "
                    "cyclebnn data check finds all such images",
                )
    return None


def _content(source: Source, index: int) -> np.ndarray | str:
    """The image file, uint8 [bytes], or why it cannot be read."""
    try:
        return np.frombuffer(source.encoded(index), np.uint8)
    except OSError as error:
        return error.strerror or str(error)
