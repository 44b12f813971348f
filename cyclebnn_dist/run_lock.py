"""The run lock: one job at a time works in a run folder. The operating system takes a dead job's lock away. Needs no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.file_lock import file_lock

log = logging.getLogger(__name__)

LOCK = ".lock"
OWNER = ".lock.owner"

WAIT_SECONDS = 10.0
"""For a job that is just ending."""

REQUEUED_SECONDS = 180.0
"""For an earlier life of the same job: a file server may need a minute or two to notice that a node is gone."""


POLL_SECONDS = 0.5


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, made if need be. A folder that holds nothing else at the end is removed again.

    Raises:
        RecipeError: another job works there; the message names it.
    """
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        with ExitStack() as stack:
            if _acquire(run_dir, stack):
                (run_dir / OWNER).write_text(_myself())
                stack.callback(_clear, run_dir)
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _acquire(run_dir: Path, stack: ExitStack) -> bool:
    """Whether the lock could be had, now held by ``stack``; a file system without locks is warned of."""
    until = None
    while True:
        with ExitStack() as attempt:
            run_dir.mkdir(parents=True, exist_ok=True)  # one that was refused removes a folder it has made
            try:
                state = attempt.enter_context(file_lock(run_dir / LOCK))
            except FileNotFoundError:
                continue
            if state == "ours":
                stack.push(attempt.pop_all())
                return True
        if state == "impossible":
            log.warning("%s cannot be locked: take care that only one job works there", run_dir)
            return False
        if until is None:
            owner = _read_owner(run_dir)
            mine = os.environ.get("SLURM_JOB_ID")
            seconds = REQUEUED_SECONDS if mine and f"job {mine} " in owner else WAIT_SECONDS
            log.info("%s is in use by %s; waiting for up to %.0f s", run_dir, owner, seconds)
            until = time.monotonic() + seconds
        if time.monotonic() > until:
            raise RecipeError(
                "run.dir",
                f"{run_dir} is in use by {_read_owner(run_dir)}",
                "wait for it or cancel it, or name another folder",
            )
        time.sleep(POLL_SECONDS)


def _clear(run_dir: Path) -> None:
    """Leave no owner behind, nor a lock in a folder that was refused before it became a run's."""
    with contextlib.suppress(OSError):  # a disk that may only be read by now keeps its files
        (run_dir / OWNER).unlink(missing_ok=True)
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
