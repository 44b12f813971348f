"""The check of data sets whose images have no files of their own: tar shards, and CIFAR's binary files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.check import SPLITS, Problem, Report, check_folder, decode_all
from cyclebnn_dist.data.cifar import CIFAR_SETS, scan_cifar
from cyclebnn_dist.data.shard_index import Sample, read_shard
from cyclebnn_dist.data.shards import shard_names
from cyclebnn_dist.data.source import find_format


def check_data(
    path: str | Path, *, threads: int = 0, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Check the data set in ``path``, of whichever format is found there; arguments as for ``check_folder``.

    Raises:
        RecipeError: there is no such folder, or nothing like a data set in it, or more than one.
    """
    try:
        name = find_format(path)
    except RecipeError as error:
        raise RecipeError("DIR", error.problem, "move all but one away") from None
    if name == "webdataset":
        return check_shards(path, threads=threads, progress=progress)
    if name in CIFAR_SETS:
        return check_cifar(path, name)
    return check_folder(path, threads=threads, progress=progress)


def check_shards(
    path: str | Path, *, threads: int = 0, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Look through ``path/train/*.tar`` and ``path/val/*.tar``, and decode every image in full with DALI."""
    root, report = Path(path), Report(path=str(path))
    samples: dict[str, tuple[Path, Sample]] = {}
    labels: dict[str, set[int]] = {}
    for split in SPLITS:
        found: list[tuple[str, Path, Sample]] = []
        names = shard_names(root / split)
        if not names:
            report.problems.append(Problem("split without shards", split))
        for name in names:
            shard = root / split / name
            try:
                found += [(f"{split}/{name}/{sample.key}", shard, sample) for sample in read_shard(shard)]
            except RecipeError as error:
                report.problems.append(Problem("damaged shard", f"{split}/{name}", error.problem))
        samples |= {name: (shard, sample) for name, shard, sample in found}
        labels[split] = {sample.label for _, _, sample in found}
        report.images[split], report.classes[split] = len(found), len(labels[split])
    report.problems += _mismatches(labels)

    def read(name: str) -> np.ndarray:
        shard, sample = samples[name]
        return np.fromfile(shard, np.uint8, count=sample.image.size, offset=sample.image.offset)

    report.problems += decode_all(list(samples), read, threads=threads, progress=progress)
    return report


def check_cifar(path: str | Path, name: str) -> Report:
    """Look at the files of the CIFAR set ``name`` in ``path``."""
    report = Report(path=str(path))
    for split in SPLITS:
        report.images[split] = report.classes[split] = 0
        try:
            images = scan_cifar(path, split, name=name, num_classes=CIFAR_SETS[name].num_classes)
        except RecipeError as error:
            report.problems.append(Problem("damaged file", split, error.problem))
            continue
        report.images[split], report.classes[split] = len(images), len(np.unique(images.labels))
    return report


def _mismatches(labels: dict[str, set[int]]) -> Iterator[Problem]:
    train, val = (labels[split] for split in SPLITS)
    if train and val:
        for split, numbers in (("train", train - val), ("val", val - train)):
            for number in sorted(numbers):
                yield Problem("class in one split only", split, f"class {number}")
