"""The disk: what an error of the file system means to a user, and what to do about it. Needs no torch."""

from __future__ import annotations

import errno

CURES = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space, or ask for a larger quota",
    errno.EROFS: "the file system may only be read now; its administrator knows why",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.ENOENT: "something has removed the folder; leave the run folder to the run",
    errno.ENOTDIR: "something else lies where the folder should be; leave the run folder to the run",
    errno.EIO: "the disk or its server is failing; its administrator knows why",
    errno.ESTALE: "the file server has forgotten the folder; its administrator knows why",
}


def cause(error: OSError) -> str:
    """What happened, in the system's words and without a path."""
    return error.strerror or str(error)


def cure(number: int | None) -> str:
    """What to do about the error of this number."""
    return CURES.get(number or 0, "see whether that disk can be written")


def is_about_disk(error: BaseException) -> bool:
    """Whether an error is one of those that a disk, a quota or a file server causes."""
    return isinstance(error, OSError) and error.errno in CURES
