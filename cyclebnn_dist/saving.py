"""Saving: when a run's checkpoints are begun, published and waited for, and what becomes of one that cannot be written."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from cyclebnn_dist import disk
from cyclebnn_dist.checkpoint import SaveResult
from cyclebnn_dist.resume import take_snapshot
from cyclebnn_dist.run import Run

log = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint that a run may not end without could not be written."""


def due(run: Run) -> bool:
    """Whether the step that has just ended is one to save at, by the recipe or as the best so far."""
    config = run.recipe.run
    return (
        run.step % config.save_every == 0
        or (config.keep_every > 0 and run.step % config.keep_every == 0)
        or (config.keep_best and run.totals.best_step == run.step)
    )


def save(run: Run, *, wait: bool) -> None:
    """Collective: every rank calls this. Begin a checkpoint of the run at its current step; changes no training state.

    The one before is published first. It is written while training goes on, unless ``wait``.

    Raises:
        SaveError: on every rank, if ``wait`` and it could not be written.
    """
    settle(run)
    with standing_still(run):
        run.saver.begin(run.step, partial(take_snapshot, run))
    if wait and (result := settle(run)) and result.failures:
        raise SaveError(
            f"this run ends without the checkpoint of step {result.step}: {_reason(result)}\n{_newest(run)}; "
            "when that is mended, the same command goes on from there"
        )
    run.watchdog.saw(f"the checkpoint of step {run.step}")


def publish_if_written(run: Run, *, writing: bool) -> None:
    """Collective: every rank calls this. Publish the checkpoint that was begun, when no rank is writing any more.

    Args:
        writing: whether any rank was, as all have learnt in the step that has just ended.
    """
    if run.saver.pending and not writing:
        settle(run)


def settle(run: Run) -> SaveResult | None:
    """Collective: every rank calls this. Wait until the checkpoint that was begun, if any, is published or has failed."""
    if not run.saver.pending:
        return None
    with standing_still(run):
        result = run.saver.settle()
    assert result is not None
    if result.failures:
        run.totals.failed_checkpoints += 1
        if run.world.is_main:
            log.error("the checkpoint of step %d failed: %s", result.step, _reason(result))
            log.error("training goes on and the next one is tried at its step; %s", _newest(run))
    run.write_row(
        "checkpoint",
        {
            "of_step": result.step,
            "bytes": result.num_bytes,
            "write_seconds": result.write_seconds,
            "save_seconds": run.totals.save_seconds,
            "failed_checkpoints": run.totals.failed_checkpoints,
        },
    )
    return result


@contextmanager
def standing_still(run: Run) -> Iterator[None]:
    """Within it, time counts as time that training stood still for checkpoints."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        run.totals.save_seconds += time.perf_counter() - begun


def _reason(result: SaveResult) -> str:
    """Where it was to be written, what the system says, and what to do."""
    told: dict[str, list[str]] = {}
    for rank, failure in result.failures.items():
        told.setdefault(failure.cause, []).append(f"{failure.what} of rank {rank}")
    causes = "; ".join(f"{cause} ({', '.join(where)})" for cause, where in told.items())
    cures = dict.fromkeys(disk.cure(failure.errno) for failure in result.failures.values())
    return f"{result.folder.parent}: {causes}. What to do: {'; '.join(cures)}"


def _newest(run: Run) -> str:
    newest = run.saver.newest
    return f"the newest intact checkpoint is {newest}" if newest else "there is no checkpoint yet"
