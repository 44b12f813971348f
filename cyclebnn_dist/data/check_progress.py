"""The progress of a data set's check on the terminal, undisturbed by what decoders print."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 60.0


@contextmanager
def check_progress() -> Iterator[Callable[[int, int], None]]:
    """A function to call with (images done, images in all): a bar on a terminal, else a line a minute.

    Meanwhile nothing else reaches standard error: decoders write there about bad files without naming them.
    """
    sys.stderr.flush()
    kept, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    begun = told = time.monotonic()
    try:
        with os.fdopen(os.dup(kept), "w") as terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=Console(file=terminal), disable=not terminal.isatty()) as bar:
                task = bar.add_task("decoding", total=None)

                def report(done: int, total: int) -> None:
                    nonlocal told
                    bar.update(task, completed=done, total=total)
                    now = time.monotonic()
                    if bar.disable and now - told > _LINE_SECONDS:
                        told = now
                        print(
                            f"{done} of {total} images, {done / (now - begun):.0f}/s",
                            file=terminal,
                            flush=True,
                        )

                yield report
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silence)
