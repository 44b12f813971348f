"""The run lock: one job at a time works in a run folder. The operating system takes a dead job's lock away. Needs no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cyclebnn_dist.config import RecipeError

log = logging.getLogger(__name__)

LOCK = ".lock"
OWNER = ".lock.owner"

WAIT_SECONDS = 10.0
"""For a job that is just ending."""

REQUEUED_SECONDS = 180.0
"""For an earlier life of the same job: a file server may need a minute or two to notice that a node is gone."""


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, made if need be. A folder that holds nothing else at the end is removed again.

    Raises:
        RecipeError: another job works there; the message names it.
    """
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK)
    try:
        held = _acquire(lock, run_dir)
        try:
            if held:
                (run_dir / OWNER).write_text(_myself())
            yield
        finally:
            if held:
                with contextlib.suppress(OSError):  # a disk that may only be read by now keeps its files
                    (run_dir / OWNER).unlink(missing_ok=True)
                    _clear(run_dir)
                lock.release()
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _acquire(lock: FileLock, run_dir: Path) -> bool:
    """Whether the lock could be had; a file system without locks is warned of."""
    try:
        lock.acquire(timeout=0)
        return True
    except Timeout:
        pass
    except (NotImplementedError, OSError) as error:
        log.warning("%s cannot be locked (%s): take care that only one job works there", run_dir, error)
        return False
    owner = _read_owner(run_dir)
    mine = os.environ.get("SLURM_JOB_ID")
    seconds = REQUEUED_SECONDS if mine and f"job {mine} " in owner else WAIT_SECONDS
    log.info("%s is in use by %s; waiting for up to %.0f s", run_dir, owner, seconds)
    while True:
        try:
            lock.acquire(timeout=seconds, poll_interval=0.5)
            return True
        except FileNotFoundError:  # the other job was refused, and has removed the folder it had made
            run_dir.mkdir(parents=True, exist_ok=True)
        except Timeout:
            raise RecipeError(
                "run.dir",
                f"{run_dir} is in use by {_read_owner(run_dir)}",
                "wait for it or cancel it, or name another folder",
            ) from None


def _clear(run_dir: Path) -> None:
    """Leave no lock behind in a folder that was refused before it became a run's."""
    if {path.name for path in run_dir.iterdir()} == {LOCK}:
        (run_dir / LOCK).unlink(missing_ok=True)


def _myself() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    of_job = f"job {job} " if job else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"{of_job}process {os.getpid()} on {socket.gethostname()}, since {since}"


def _read_owner(run_dir: Path) -> str:
    try:
        return (run_dir / OWNER).read_text()
    except OSError:
        return "another process"
