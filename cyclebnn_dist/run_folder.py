"""The run folder: which recipe it belongs to, how often it was started, and whether its run has ended. Needs no torch.

run_dir/
  recipe.yaml       the resolved recipe; what makes the folder a run's
  layers.txt        what was swapped and why not
  comm.json         what comm.mode=auto took, for how many ranks, and what was measured
  checkpoints/      see checkpoint/__init__.py
  metrics.jsonl     one row every few steps; see metrics/journal.py
  wandb/            Weights & Biases; its run id in wandb_run_id
  summary.json      written at the end, for programs
  summary.txt       the same for people
  submitit/         job files and logs of python -m launch
  in_flight/        the images being read, while they are; see data/in_flight.py
  .lock             held by the job that works here; see run_lock.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cyclebnn_dist import disk
from cyclebnn_dist.config import (
    SAVED_NAME,
    Recipe,
    RecipeError,
    load_saved,
    resume_differences,
    save_recipe,
)
from cyclebnn_dist.run_lock import LOCK, OWNER

LAYERS, JOURNAL, SUMMARY_JSON, SUMMARY_TEXT = "layers.txt", "metrics.jsonl", "summary.json", "summary.txt"
VERDICT = "comm.json"
LAUNCHER_FOLDER = "submitit"


def check_run_folder(run_dir: Path, recipe: Recipe) -> None:
    """Refuse a folder that belongs to another recipe or to something else; nothing is written.

    Raises:
        RecipeError: naming the keys that differ, or the foreign content.
    """
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise RecipeError("run.dir", f"{nearest} is a file", "name a folder that may be created")
    for path in (nearest, run_dir / "checkpoints"):
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise RecipeError("run.dir", f"{path} may not be written", "name a folder on a disk that may be")
    saved = run_dir / SAVED_NAME
    if saved.exists():
        resume_differences(load_saved(saved), recipe)
        return
    foreign = (
        sorted(p.name for p in run_dir.iterdir() if p.name not in (LAUNCHER_FOLDER, LOCK, OWNER))
        if run_dir.exists()
        else []
    )
    if foreign:
        raise RecipeError(
            "run.dir",
            f"{run_dir} holds {foreign[0]} and no {SAVED_NAME}, so it is not the folder of a run",
            "name a new or empty folder",
        )


@contextmanager
def refusing_bad_disk(run_dir: Path) -> Iterator[None]:
    """Within it, a disk that does not take what a run needs to begin is the user's to mend.

    Raises:
        RecipeError: naming the file, what the system says, and what to do.
    """
    try:
        yield
    except OSError as error:
        if not disk.is_about_disk(error):
            raise
        path = error.filename or run_dir
        raise RecipeError("run.dir", f"{path}: {disk.cause(error)}", disk.cure(error.errno)) from error


def finished_summary(run_dir: Path, recipe: Recipe) -> str | None:
    """The summary of a run that has ended at this recipe's length, else None."""
    try:
        summary = json.loads((run_dir / SUMMARY_JSON).read_text())
        text = (run_dir / SUMMARY_TEXT).read_text()
    except (OSError, ValueError):
        return None
    return text if summary["finished"] and summary["epochs"] == recipe.train.epochs else None


def claim_run_folder(run_dir: Path, recipe: Recipe, layer_table: str) -> int:
    """Make the folder this recipe's and return the number of this life, counted from 1."""
    run_dir.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run_dir / SAVED_NAME)
    (run_dir / LAYERS).write_text(layer_table)
    journal = run_dir / JOURNAL
    starts = journal.read_text().count('"event": "start"') if journal.exists() else 0
    return starts + 1


def write_verdict(run_dir: Path, state: dict[str, Any]) -> None:
    """Keep what ``comm.mode=auto`` took, so that a start before the first checkpoint takes the same."""
    partial = run_dir / f".{VERDICT}.partial"
    partial.write_text(json.dumps(state, indent=2) + "\n")
    os.replace(partial, run_dir / VERDICT)


def read_verdict(run_dir: Path) -> dict[str, Any] | None:
    """What ``write_verdict`` kept, else None."""
    try:
        state: dict[str, Any] = json.loads((run_dir / VERDICT).read_text())
    except (OSError, ValueError):
        return None
    return state
