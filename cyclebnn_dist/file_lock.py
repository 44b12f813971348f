"""The file lock: held by one process, and taken by the operating system from one that dies. Needs no torch.

On a file system that has no locks (Lustre without ``flock``) there is none. A file that merely exists would not do in its
place: it outlives a job that was killed, and would keep the next one out.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

LockState = Literal["ours", "held", "impossible"]


@contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[LockState]:
    """Try to hold a lock within: whether it is ours, held by another process, or not possible here.

    Args:
        path: a file, made if need be, that means nothing else.
        wait: until it is not held any more.

    Raises:
        OSError: the file cannot be made or opened.
    """
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                yield "held" if error.errno in (errno.EAGAIN, errno.EACCES) else "impossible"
                return
            if os.fstat(file.fileno()).st_nlink:
                yield "ours"
                return
        # Who held it has removed the file: others see another one.
