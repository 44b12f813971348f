"""Retention: which checkpoints stay on disk, and how the others leave it."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from cyclebnn_dist import disk
from cyclebnn_dist.checkpoint.layout import (
    FOLDER,
    PARTIAL,
    REMOVED,
    complete_checkpoints,
    evaluated_top1,
    published_checkpoints,
    step_of,
)
from cyclebnn_dist.config import RunConfig

log = logging.getLogger(__name__)


def kept_steps(scores: Mapping[int, float | None], *, last: int, every: int, best: bool) -> set[int]:
    """Steps whose checkpoints stay.

    Args:
        scores: validation accuracy at each step there is a checkpoint of; None where there was no evaluation.
        last: so many of the newest stay.
        every: steps that are multiples of it stay; 0 means none for that reason.
        best: the one of the highest score stays, the earliest of several.
    """
    kept = set(sorted(scores)[-last:])
    if every:
        kept |= {step for step in scores if step % every == 0}
    scored = {step: score for step, score in scores.items() if score is not None}
    if best and scored:
        kept.add(max(scored, key=lambda step: (scored[step], -step)))
    return kept


def superfluous_checkpoints(run_dir: Path, *, newest: Path, config: RunConfig) -> list[Path]:
    """Checkpoints that need not stay, now that ``newest`` has been published.

    Those of later steps are of a future that was left when they were found damaged, and go as well.
    """
    future = [folder for folder in published_checkpoints(run_dir) if step_of(folder) > step_of(newest)]
    complete = {step_of(folder): folder for folder in complete_checkpoints(run_dir) if folder not in future}
    kept = kept_steps(
        {step: evaluated_top1(folder) for step, folder in complete.items()},
        last=config.keep_checkpoints,
        every=config.keep_every,
        best=config.keep_best,
    )
    return future + [folder for step, folder in complete.items() if step not in kept]


class Remover:
    """Removes folders in a thread: finding and deleting many gigabytes may take a file server seconds."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def retire(self, run_dir: Path, *, newest: Path, config: RunConfig) -> None:
        """Remove what need not stay, now that ``newest`` has been published."""

        def work() -> None:
            try:
                superfluous = superfluous_checkpoints(run_dir, newest=newest, config=config)
            except (OSError, ValueError) as error:
                log.warning("older checkpoints in %s stay: %s", run_dir / FOLDER, error)
                return
            for folder in superfluous:
                hide(folder)
            for hidden in (run_dir / FOLDER).glob(f"{REMOVED}*"):
                shutil.rmtree(hidden, ignore_errors=True)

        self._start(work)

    def clear(self, run_dir: Path) -> None:
        """Remove what a kill, or a disk that could not be written, has left behind; nothing may be being written."""
        self.wait()
        root = run_dir / FOLDER
        leftovers = [path for prefix in (PARTIAL, REMOVED) for path in root.glob(f"{prefix}*")]

        def work() -> None:
            for path in leftovers:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()

        if leftovers:
            self._start(work)

    def wait(self) -> None:
        """Return when everything that was to be removed is gone, or cannot be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, work: Callable[[], None]) -> None:
        self.wait()
        self._thread = threading.Thread(target=work, name="checkpoint removal", daemon=True)
        self._thread.start()


def hide(folder: Path) -> None:
    """Take a checkpoint out of sight at once, so that none is ever seen half removed; ``retire`` removes it."""
    try:
        folder.rename(folder.with_name(f"{REMOVED}{folder.name}_{secrets.token_hex(4)}"))
    except OSError as error:
        log.warning("%s could not be removed: %s", folder, disk.cause(error))
