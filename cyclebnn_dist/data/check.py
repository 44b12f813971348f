"""The check of class folders: every file that training would stumble over, and every mismatch between the splits."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.decoding import MOST, Decoding, problem_of_image
from cyclebnn_dist.data.folder import EXTENSIONS, is_file, is_folder

SPLITS = ("train", "val")
UNREADABLE = "unreadable image"
BROKEN_LINK = "broken link"
NO_FILE = "neither file nor folder"
_CHUNK = MOST
_LINES = 20


@dataclass(frozen=True)
class Problem:
    """One thing to mend.

    Attributes:
        kind: what sort, the same words for all of that sort.
        path: relative to the data set's folder.
        cause: in words; may be empty where the kind says all.
    """

    kind: str
    path: str
    cause: str = ""


@dataclass
class Report:
    """What a check found.

    Attributes:
        path: the data set's folder.
        images: files with an image's name, by split; all of them have been decoded.
        classes: class folders, by split.
    """

    path: str
    images: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def skippable(self) -> dict[str, str]:
        """Images that cannot be read, each with the cause: what a skip list should name."""
        return {
            problem.path: problem.cause or problem.kind
            for problem in self.problems
            if problem.kind == UNREADABLE
            or (
                problem.kind in (BROKEN_LINK, NO_FILE)
                and problem.path.count("/") == 2
                and problem.path.lower().endswith(EXTENSIONS)
            )
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def check_folder(
    path: str | Path, *, threads: int = 0, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Look through ``path/train`` and ``path/val``, and decode every image in full with DALI.

    Args:
        threads: files decoded at the same time; 0 means one per core this process may use.
        progress: called with (images decoded, images in all) now and then.

    Raises:
        RecipeError: there is no such folder, or nothing like a data set in it.
    """
    root = Path(path)
    if not (root / "train").is_dir():
        missing = root / "train" if root.is_dir() else root
        raise RecipeError("DIR", f"folder {missing} does not exist", f"expected {root}/train/<class>/*.JPEG")
    report = Report(path=str(root))
    files, classes = [], {}
    for split in SPLITS:
        found = _Split(root, split)
        classes[split] = set(found.files)
        files += list(itertools.chain.from_iterable(found.files.values()))
        report.images[split] = sum(map(len, found.files.values()))
        report.classes[split] = len(found.files)
        report.problems += found.problems
    report.problems += _mismatches(classes)
    report.problems += decode_all(
        files, lambda file: np.fromfile(root / file, np.uint8), threads=threads, progress=progress
    )
    return report


def render(report: Report) -> str:
    """The report as text, at most some lines of each kind."""
    lines = [
        f"{report.path}: "
        + ", ".join(
            f"{report.images[split]} images in {report.classes[split]} classes of {split}" for split in SPLITS
        )
    ]
    if not report.problems:
        return lines[0] + "\nno problems found"
    for kind, count in Counter(problem.kind for problem in report.problems).items():
        lines += ["", f"{kind}: {count}"]
        shown = [problem for problem in report.problems if problem.kind == kind][:_LINES]
        lines += [f"  {each.path}{f'  ({each.cause})' if each.cause else ''}" for each in shown]
        if count > _LINES:
            lines.append(f"  and {count - _LINES} more (--json has them all)")
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    """With escapes for line breaks, other control characters and what is no UTF-8."""
    line = line.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c == " " or c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class _Split:
    """The files of one split, by class and relative to the data set's folder, and what is wrong with their places."""

    def __init__(self, root: Path, split: str) -> None:
        self.files: dict[str, list[str]] = {}
        self.problems: list[Problem] = []
        self._root = root
        for entry in self._entries(split):
            path = f"{split}/{entry.name}"
            if not is_folder(entry):
                kind = BROKEN_LINK if _is_broken(entry) else "file outside class folders"
                self.problems.append(Problem(kind, path))
                continue
            self.files[entry.name] = list(self._images(path))
            if not self.files[entry.name]:
                self.problems.append(Problem("class without images", path))

    def _images(self, folder: str) -> Iterator[str]:
        for entry in self._entries(folder):
            path = f"{folder}/{entry.name}"
            if _is_broken(entry):
                self.problems.append(Problem(BROKEN_LINK, path, f"to {os.readlink(self._root / path)}"))
            elif is_folder(entry):
                self.problems.append(Problem("folder within a class", path, "its files are not read"))
            elif not is_file(entry):
                self.problems.append(Problem(NO_FILE, path))
            elif not entry.name.lower().endswith(EXTENSIONS):
                self.problems.append(Problem("unknown extension", path, "the file is not read"))
            else:
                yield path

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Sorted entries, hidden ones aside."""
        try:
            with os.scandir(self._root / folder) as entries:
                return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            self.problems.append(
                Problem("folder that cannot be listed", folder, error.strerror or str(error))
            )
            return []


def _is_broken(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _mismatches(classes: dict[str, set[str]]) -> Iterator[Problem]:
    train, val = (classes[split] for split in SPLITS)
    if val:
        for split, other, names in (("train", "val", train - val), ("val", "train", val - train)):
            for name in sorted(names):
                yield Problem("class in one split only", f"{split}/{name}", f"no folder {other}/{name}")
    alike: dict[str, set[str]] = {}
    for name in train | val:
        alike.setdefault(name.casefold(), set()).add(name)
    for names in alike.values():
        if len(names) > 1:
            where = next(split for split in SPLITS if min(names) in classes[split])
            yield Problem(
                "class names that differ by case only", f"{where}/{min(names)}", ", ".join(sorted(names))
            )


def decode_all(
    names: Sequence[str],
    read: Callable[[str], np.ndarray],
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """The images that DALI does not decode.

    Args:
        read: gives the content of an image, uint8 [bytes], by its name; may raise OSError.
        threads, progress: as for ``check_folder``.
    """
    own = threading.local()

    def decode(chunk: Sequence[str]) -> list[Problem]:
        if not hasattr(own, "many"):
            own.many, own.one = Decoding(batch_size=_CHUNK), Decoding()
        try:
            if own.many.all_decode([read(name) for name in chunk]):
                return []
        except OSError:
            pass
        problems = zip(chunk, (problem(name) for name in chunk), strict=True)
        return [Problem(UNREADABLE, name, cause) for name, cause in problems if cause]

    def problem(name: str) -> str | None:
        try:
            return problem_of_image(read(name), own.one)
        except OSError as error:
            return error.strerror or str(error)

    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    found: list[Problem] = []
    pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))
    try:
        for number, problems in enumerate(pool.map(decode, chunks), start=1):
            found += problems
            if progress:
                progress(min(number * _CHUNK, len(names)), len(names))
    finally:
        pool.shutdown(cancel_futures=True)
    return found
