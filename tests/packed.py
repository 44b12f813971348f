"""Small data sets on disk that tests of several formats share."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_folder(root: Path, *, count: int = 26, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """``count`` images of each split in two classes, of differing shapes; image i is of brightness about 9 i."""
    random = np.random.default_rng(0)
    for split in splits:
        for index in range(count):
            folder = root / split / ("cat" if index < count // 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            shape = (20 + index % 7, 18 + index % 5, 3)
            pixels = np.clip(9 * index + random.integers(-20, 20, size=shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:03d}.JPEG", quality=95)
    return root


def jpeg(brightness: int) -> bytes:
    """A grey JPEG image."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), brightness, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar file of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def plain_members(count: int, *, first: int = 0) -> list[tuple[str, bytes]]:
    """Samples 000000, 000001, ... with classes 0 and 1 in turn."""
    return [
        member
        for index in range(first, first + count)
        for member in ((f"{index:06d}.jpg", jpeg(8 * index)), (f"{index:06d}.cls", str(index % 2).encode()))
    ]
