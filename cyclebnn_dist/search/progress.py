"""The progress of a search: a bar where there is a terminal, else a line for each round and some of its candidates."""

from __future__ import annotations

import logging
import sys

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cyclebnn_dist.search.selection import Round

log = logging.getLogger(__name__)


class SearchProgress:
    """Of one process; others than rank 0 pass ``enabled=False`` and stay silent."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._done = 0
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(
                TextColumn("{task.description}"), *columns, console=RichConsole(stderr=True), transient=True
            )
            self._task = self._bar.add_task("")
            self._bar.start()

    def begin(self, what: str, *, total: int) -> None:
        """A round, or another part, of so many trainings begins."""
        self._done, self._what, self._total = 0, what, total
        if self._bar is not None:
            self._bar.reset(self._task, description=what, total=total)
        elif self._enabled:
            log.info("%s: %d to train", what, total)

    def at(self, done: int) -> None:
        """So many of them are finished, by whoever."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._enabled and 4 * done // self._total > 4 * self._done // self._total:
            log.info("%s: %d of %d trained", self._what, done, self._total)
        self._done = done

    def chose(self, choice: Round) -> None:
        """A round ends."""
        if self._enabled:
            log.info(
                "round %d: %s becomes %s, top-1 %.2f %% (%+.2f), cost %.4f of the real network's",
                choice.number,
                choice.layer,
                choice.to,
                choice.outcome.accuracy,
                choice.outcome.accuracy - choice.unchanged.accuracy,
                choice.share,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
