"""The saver: begins checkpoints, has them written while training goes on, and publishes them."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclebnn_dist.checkpoint.layout import FOLDER, PARTIAL, folder_name, write_meta
from cyclebnn_dist.checkpoint.retention import Remover, hide
from cyclebnn_dist.checkpoint.snapshot import Snapshot, files_of
from cyclebnn_dist.checkpoint.writing import Failure, Outcome, Writing
from cyclebnn_dist.config import Recipe
from cyclebnn_dist.world import World, gather_objects, on_main

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, alike on every rank.

    Attributes:
        folder: where the checkpoint is, or would be.
        failures: those of each rank that could not write; empty if the checkpoint is published.
        write_seconds: the slowest rank's, in the background.
    """

    step: int
    folder: Path
    failures: dict[int, Failure]
    num_bytes: int
    write_seconds: float


@dataclass(frozen=True)
class _Pending:
    step: int
    partial: Path
    facts: dict[str, Any]
    writing: Writing | None
    failure: Failure | None


class Saver:
    """Saves one checkpoint at a time. ``begin`` and ``settle`` take turns, on all ranks at the same steps.

    Attributes:
        newest: the newest checkpoint known to be intact; None if there is none.
    """

    def __init__(self, run_dir: Path, *, recipe: Recipe, world: World, newest: Path | None = None) -> None:
        self.newest = newest
        self._run_dir = run_dir
        self._recipe = recipe
        self._world = world
        self._pending: _Pending | None = None
        self._remover = Remover()

    @property
    def pending(self) -> bool:
        """Whether a save has begun that is not settled. Alike on every rank."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its files."""
        return self._pending is not None and not (
            self._pending.writing is None or self._pending.writing.finished
        )

    def begin(self, step: int, take: Callable[[], Snapshot]) -> None:
        """Collective: every rank calls this. Copy the state and begin to write it; ``settle`` tells how that ended.

        Args:
            take: makes the snapshot; on every rank, or on none where the folder cannot be made.
        """
        assert self._pending is None
        partial = self._run_dir / FOLDER / f"{PARTIAL}{folder_name(step)}_{secrets.token_hex(4)}"
        # Named anew each time: a rank of an earlier life, cut off from the others, may be writing still.
        partial, failure = on_main(self._world, lambda: (partial, self._prepare(partial)))
        if failure is not None:
            self._pending = _Pending(step, partial, {}, None, failure if self._world.is_main else None)
            return
        snapshot = take()
        assert snapshot.step == step
        files = files_of(snapshot, rank=self._world.rank, recipe=self._recipe)
        self._pending = _Pending(step, partial, snapshot.facts, Writing(partial, files), None)

    def settle(self) -> SaveResult | None:
        """Collective: every rank calls this. Wait for the save that has begun, if any; publish it if all have written.

        Where one could not, the checkpoints before it are as they were.
        """
        pending = self._pending
        if pending is None:
            return None
        own = pending.writing.outcome() if pending.writing else Outcome(failure=pending.failure)
        outcomes = gather_objects(self._world, own)
        self._pending = None
        final = pending.partial.with_name(folder_name(pending.step))
        failures = {rank: outcome.failure for rank, outcome in enumerate(outcomes) if outcome.failure}
        if not failures:
            failure = on_main(self._world, lambda: self._publish(pending, final, outcomes))
            failures = {0: failure} if failure else {}
        if failures and self._world.is_main:
            shutil.rmtree(pending.partial, ignore_errors=True)
        if not failures:
            self.newest = final
        return SaveResult(
            step=pending.step,
            folder=final,
            failures=failures,
            num_bytes=sum(written.num_bytes for outcome in outcomes for written in outcome.files.values()),
            write_seconds=max(outcome.seconds for outcome in outcomes),
        )

    def close(self) -> None:
        """Wait until superfluous checkpoints are off the disk."""
        self._remover.wait()

    def _prepare(self, partial: Path) -> Failure | None:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._remover.clear(self._run_dir)
            partial.mkdir()
        except OSError as error:
            return Failure.of(error, partial.name)
        return None

    def _publish(self, pending: _Pending, final: Path, outcomes: list[Outcome]) -> Failure | None:
        meta = {
            "step": pending.step,
            "world_size": self._world.size,
            **pending.facts,
            "files": {
                name: {"bytes": written.num_bytes, "sha256": written.sha256}
                for outcome in outcomes
                for name, written in outcome.files.items()
            },
        }
        try:
            write_meta(pending.partial, meta)
            _flush(pending.partial)
            if final.exists():
                hide(final)  # of a future that was left
            pending.partial.rename(final)
            _flush(final.parent)
        except OSError as error:
            return Failure.of(error, final.name)
        self._remover.retire(self._run_dir, newest=final, config=self._recipe.run)
        return None


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
