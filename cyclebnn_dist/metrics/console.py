"""The console: one progress line every few steps, and a bar where there is a terminal."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cyclebnn_dist.precision.schedule import Widths

log = logging.getLogger(__name__)


class Console:
    """Progress of rank 0; other ranks pass ``enabled=False`` and stay silent."""

    def __init__(self, *, total_steps: int, enabled: bool) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=RichConsole(stderr=True),
            )
            self._task = self._bar.add_task("", total=total_steps)
            self._bar.start()

    def progress(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        widths: Widths,
        images_per_second: float,
        seconds_left: float,
    ) -> None:
        """Show where the run is. ``step`` counts finished steps."""
        if not self._enabled:
            return
        left = timedelta(seconds=round(seconds_left))
        if self._bar is not None:
            bits = f"{widths.forward_bits}/{widths.backward_bits}/{widths.communication_bits}"
            line = f"loss {loss:.4f} lr {lr:.1e} bits {bits} {images_per_second:.0f} images/s left {left}"
            self._bar.update(self._task, completed=step, description=line)
            return
        log.info(
            f"step {step:>{len(str(self._total))}}/{self._total}  loss {loss:7.4f}  lr {lr:.2e}  "
            f"bits fwd {widths.forward_bits} bwd {widths.backward_bits} comm {widths.communication_bits}  "
            f"{images_per_second:7.1f} images/s  left {left}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
