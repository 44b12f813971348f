"""Small real disks for tests, to fill and to make read-only. They need root."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """A file system of its own at ``folder``, in memory."""
    folder.mkdir()
    with _mounted("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)):
        yield folder


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Within it nothing at ``folder`` can be opened for writing; it begins when nothing is."""
    with _mounted("--bind", str(folder), str(folder)):
        remount = ["mount", "-o", "remount,bind,ro", str(folder)]
        for _ in range(1000):
            if not subprocess.run(remount, capture_output=True).returncode:
                break
            time.sleep(0.01)  # busy: a file there is being written
        else:
            subprocess.run(remount, check=True)
        yield


def fill(folder: Path) -> Path:
    """Use up what is left of a disk, with one file."""
    path = folder / "filling"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return path


@contextmanager
def _mounted(*arguments: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk to fill or to make read-only")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)
