"""The state of a run folder, as far as it can be told without torch."""

from __future__ import annotations

import json
from pathlib import Path

from cyclebnn_dist.config import SAVED_NAME, Recipe, load_saved, resume_differences

SUMMARY_JSON, SUMMARY_TEXT = "summary.json", "summary.txt"


def check_recipe_of(run_dir: Path, recipe: Recipe) -> None:
    """Refuse a run folder that belongs to another recipe.

    Raises:
        RecipeError: naming the keys that differ.
    """
    saved = run_dir / SAVED_NAME
    if saved.exists():
        resume_differences(load_saved(saved), recipe)


def finished_text(run_dir: Path, recipe: Recipe) -> str | None:
    """Return the summary of a run that has ended at this recipe's length, else None."""
    try:
        summary = json.loads((run_dir / SUMMARY_JSON).read_text())
        text = (run_dir / SUMMARY_TEXT).read_text()
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or summary.get("finished") is not True:
        return None
    return text if summary.get("epochs", recipe.train.epochs) == recipe.train.epochs else None
