"""How far a run has come, read from its run folder alone; no torch, no Slurm."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclebnn_dist.config import SAVED_NAME, RecipeError, load_saved
from cyclebnn_dist.run_folder import JOURNAL, SUMMARY_JSON, finished_summary

TAIL_BYTES = 1 << 16
QUIET_ROWS = ("start", "health", "checkpoint")
"""Rows of the journal that say little about how far a run is."""


@dataclass(frozen=True)
class Progress:
    """What a run folder tells."""

    finished: bool
    checkpoint_step: int | None
    """Step of the newest complete checkpoint."""
    row: dict[str, Any] | None
    """The last row of training or evaluation in metrics.jsonl."""
    row_age_seconds: float | None
    """How long ago metrics.jsonl was written, by this machine's clock."""


def read_progress(run_dir: Path) -> Progress:
    """Return how far a run has come."""
    journal = run_dir / JOURNAL
    rows = _last_rows(journal)
    telling = [row for row in rows if row.get("event") not in QUIET_ROWS] or rows
    age = max(0.0, time.time() - journal.stat().st_mtime) if rows else None
    return Progress(is_finished(run_dir), newest_step(run_dir), telling[-1] if telling else None, age)


def is_finished(run_dir: Path) -> bool:
    """Say whether the run has ended at its recipe's length."""
    if not (run_dir / SUMMARY_JSON).exists():
        return False
    try:
        return finished_summary(run_dir, load_saved(run_dir / SAVED_NAME)) is not None
    except RecipeError:  # written by another version
        return False


def newest_step(run_dir: Path) -> int | None:
    """Return the step of the newest checkpoint that was published (see cyclebnn_dist/checkpoint), or None."""
    steps = [
        int(path.parent.name.removeprefix("step_"))
        for path in run_dir.glob("checkpoints/step_*/meta.json")
        if path.parent.name.removeprefix("step_").isdigit()
    ]
    return max(steps, default=None)


def describe(progress: Progress) -> list[str]:
    """Return the progress in words, one line a fact."""
    lines = []
    if progress.row is not None:
        facts = [
            f"{key} {_number(value)}" for key, value in progress.row.items() if key not in ("life", "event")
        ]
        age = f" ({_age(progress.row_age_seconds)} ago)" if progress.row_age_seconds is not None else ""
        lines.append(f"{progress.row.get('event', 'row')}: {', '.join(facts[:6])}{age}")
    step = progress.checkpoint_step
    lines.append("no checkpoint yet" if step is None else f"newest checkpoint: step {step}")
    return lines


def _last_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut at the beginning of the tail, or torn by a kill
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
