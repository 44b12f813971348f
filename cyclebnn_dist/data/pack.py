"""Packing: class folders into WebDataset tar shards with their indices, images byte for byte."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import shutil
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.folder import ImageList, is_folder, refuse_broken, scan_folder
from cyclebnn_dist.data.order import epoch_permutation
from cyclebnn_dist.data.shard_index import list_members, read_shard, split_member, write_index
from cyclebnn_dist.data.shards import CLASS_NAMES

log = logging.getLogger(__name__)

MARKER = "pack.json"
SPLITS = ("train", "val")
_VERSION = 1
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class ShardSize:
    """How large a shard may become: in images, or in bytes of images."""

    images: int = 0
    num_bytes: int = 0


def parse_shard_size(text: str) -> ShardSize:
    """``1000`` is a number of images; ``256MB`` or ``1GiB`` are bytes.

    Raises:
        RecipeError: it is neither, or nothing fits in it.
    """
    match = re.fullmatch(r"(\d+)\s*(?:([kmg]i?)?(b))?", text.strip().lower())
    if not match or not int(match[1]):
        raise RecipeError(
            "--shard-size", f"'{text}' is no size", "give a number of images, or bytes as 256MB or 1GiB"
        )
    number = int(match[1])
    return ShardSize(num_bytes=number * _UNITS[match[2] or ""]) if match[3] else ShardSize(images=number)


def pack_folder(
    source: str | Path,
    target: str | Path,
    *,
    shard_size: ShardSize | None = None,
    splits: Sequence[str] = (),
    seed: int = 0,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write ``target/<split>/<split>-000000.tar``, ``.idx`` beside each, and ``target/classes.json``.

    Images are shuffled by ``seed`` before they are packed, so that a few shards hold all classes. A sample is the file
    as it is and its class's number as ``.cls``; its key is ``<class>/<file name up to its extension>``, both quoted as
    in URLs, dots included. Every shard is read back and compared. All is written into a hidden folder beside
    ``target``, which gets its name at the end; what an interrupted packing left there is removed by the next one.

    Args:
        shard_size: default: 1000 images.
        splits: default: those of train and val that ``source`` has.
        workers: shards packed at a time.
        progress: called with images done and in all.

    Returns:
        True if shards were written, False if these very shards were found.

    Raises:
        RecipeError: the folder is none that could be trained on, or ``target`` holds something else.
    """
    source, target = Path(source), Path(target)
    shard_size = shard_size or ShardSize(images=1000)
    splits = splits or [split for split in SPLITS if (source / split).is_dir()] or SPLITS[:1]
    lists = {split: _scan(source, split) for split in splits}
    description = {
        "kind": "cyclebnn shards",
        "version": _VERSION,
        "shard_images": shard_size.images,
        "shard_bytes": shard_size.num_bytes,
        "seed": seed,
        "digests": {split: images.digest for split, images in lists.items()},
    }
    if _finished(target, description):
        log.info("%s holds these shards already", target)
        return False
    total = sum(map(len, lists.values()))
    done, lock = Counter[str](), threading.Lock()

    def advance() -> None:
        with lock:
            done["images"] += 1
            if progress:
                progress(done["images"], total)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _partial_folder(target) as partial:
            for split, images in lists.items():
                (partial / split).mkdir()
                plan = plan_shards(images, shard_size, seed=seed)
                log.info("%s: %d images into %d shards", images.root, len(images), len(plan))
                keys = sample_keys(images.files)
                with ThreadPoolExecutor(workers) as pool:
                    try:
                        list(
                            pool.map(
                                lambda numbered, split=split, images=images, keys=keys: write_shard(
                                    partial / split / f"{split}-{numbered[0]:06d}.tar",
                                    images,
                                    numbered[1],
                                    keys=keys,
                                    advance=advance,
                                ),
                                enumerate(plan),
                            )
                        )
                    except BaseException:
                        pool.shutdown(wait=True, cancel_futures=True)
                        raise
            (partial / CLASS_NAMES).write_text(json.dumps(next(iter(lists.values())).classes) + "\n")
            (partial / MARKER).write_text(json.dumps(description, indent=2) + "\n")
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
    except OSError as error:
        raise RecipeError(
            "DST", f"cannot write {target}: {error.strerror or error}", "make room, or name another folder"
        ) from None
    log.info("wrote %d images to %s", total, target)
    return True


def plan_shards(images: ImageList, size: ShardSize, *, seed: int) -> list[np.ndarray]:
    """Ids of the images of each shard: a permutation by ``seed``, cut into shards of about equal size."""
    order = epoch_permutation(len(images), seed=seed, epoch=0)
    if size.images:
        return np.array_split(order, -(-len(order) // size.images))
    weights = np.array([os.path.getsize(images.path(int(index))) for index in order], np.int64)
    count = -(-int(weights.sum()) // size.num_bytes)
    middles = np.cumsum(weights) - weights / 2
    shard = np.minimum(middles * count // max(1, weights.sum()), count - 1)
    return [part for part in np.split(order, np.searchsorted(shard, np.arange(1, count))) if len(part)]


def sample_keys(files: Sequence[str]) -> list[str]:
    """Key of each file of ``<class>/<name>``: without extension, or with it where that alone tells two apart."""
    stems = [file.rpartition(".")[0] for file in files]
    taken = Counter(stems) + Counter(files)
    return [_quoted(file if taken[stem] > 1 else stem) for file, stem in zip(files, stems, strict=True)]


def write_shard(
    path: Path, images: ImageList, ids: np.ndarray, *, keys: Sequence[str], advance: Callable[[], None]
) -> None:
    """Write images ``ids`` as a tar file with its index, read it back and compare.

    Raises:
        RecipeError: an image cannot be read; the message names it.
        RuntimeError: what was read back differs.
    """
    checksums = []
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for index in map(int, ids):
            try:
                content = images.encoded(index)
            except OSError as error:
                raise RecipeError(
                    "SRC", f"cannot read {images.path(index)}: {error.strerror}", "mend or remove it"
                ) from None
            extension = images.files[index].rpartition(".")[2].lower()
            _add(archive, f"{keys[index]}.{extension}", content)
            _add(archive, f"{keys[index]}.cls", str(images.labels[index]).encode())
            checksums.append(zlib.crc32(content))
            advance()
    write_index(path, list_members(path))
    samples = read_shard(path)
    with open(path, "rb") as file:
        for index, checksum, sample in zip(ids, checksums, samples, strict=True):
            file.seek(sample.image.offset)
            same = zlib.crc32(file.read(sample.image.size)) == checksum
            if not same or sample.key != keys[index] or sample.label != images.labels[index]:
                raise RuntimeError(f"{path} does not hold what was written to it: {sample.key}")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    assert split_member(name)[1]
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = 0o644
    archive.addfile(entry, io.BytesIO(content))


def _quoted(path: str) -> str:
    return quote(os.fsencode(path), safe="/").replace(".", "%2E")


def _scan(source: Path, split: str) -> ImageList:
    try:
        classes = sum(
            is_folder(entry) and not entry.name.startswith(".") for entry in os.scandir(source / split)
        )
    except OSError:
        classes = 0  # the scan names what is wrong
    try:
        images = scan_folder(source, split, num_classes=classes)
        refuse_broken(images)
    except RecipeError as error:
        raise RecipeError(
            "SRC" if error.key == "data.path" else error.key, error.problem, error.cure
        ) from None
    return images


def _finished(target: Path, description: dict[str, object]) -> bool:
    """Whether ``target`` holds these very shards; RecipeError if it holds anything else."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise RecipeError("DST", f"{target} is a file", "name a folder that does not exist yet")
    if not any(target.iterdir()):
        return False
    try:
        found = json.loads((target / MARKER).read_text())
    except (OSError, ValueError):
        found = None
    if found != description:
        raise RecipeError(
            "DST",
            f"{target} holds {'shards of other images or sizes' if found else 'something else'}",
            "name an empty or a new folder, or delete this one first",
        )
    return True


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that no other packing uses; removed at the end unless it was renamed."""
    partial = target.with_name(f".{target.name}.partial")
    lock = target.with_name(f".{target.name}.lock")
    with open(lock, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError("DST", f"{target} is being packed by another process", "wait for it") from None
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
