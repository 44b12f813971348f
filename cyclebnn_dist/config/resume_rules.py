"""The rules of going on: what may change in the recipe of a run between two starts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cyclebnn_dist.config.errors import RecipeError, quoted
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.config.schema import flatten
from cyclebnn_dist.config.search_rules import SEARCH_KEYS

MAY_CHANGE = SEARCH_KEYS | frozenset(
    {
        "run.dir",
        "run.log_every",
        "run.health_every",
        "binary.recompute",
        "run.save_every",
        "run.keep_checkpoints",
        "run.keep_every",
        "run.keep_best",
        "run.extend_epochs",
        "run.collective_timeout_seconds",
        "run.progress_timeout_seconds",
        "model.pretrained",
        "model.weights",
        "distill.weights",
        "data.path",
        "data.format",
        "data.skip_list",
        "data.threads",
        "data.prefetch",
        "train.accumulation",
        "train.max_skipped_steps",
        "comm.check_every",
        "engine.name",
        "engine.zero_stage",
        "engine.reduce_scatter",
        "engine.bucket_mb",
        "engine.deepspeed",
        "eval.every_epochs",
        "eval.batch_size",
        "wandb.mode",
        "wandb.project",
        "wandb.entity",
        "wandb.group",
        "wandb.tags",
    }
)
"""Keys that may differ between two starts of one run.

Paths, threads, logging, saving, evaluation and what a search reads do not touch training. Starting weights (model.pretrained,
model.weights) are read at the first start only; files of teachers may lie elsewhere, and a warning tells if they hold other
weights. The global batch is the recipe's quantity, so accumulation may follow the number of ranks; the
run then goes on from the same weights, but batch statistics are taken over other micro-batches.
"""


def resume_differences(
    saved: Recipe, new: Recipe, *, may_change: Collection[str] = MAY_CHANGE, folder: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Compare the recipe a run was started with to the one it is started with now.

    Args:
        may_change: keys that may differ.
        folder: key and value to name in the cure, where it is not run.dir.

    Returns:
        Changed keys that may change (MAY_CHANGE, and more train.epochs under run.extend_epochs), each with (saved, new) value.

    Raises:
        RecipeError: other keys differ; every one of them is named with both values.
    """
    old_values, new_values = flatten(saved), flatten(new)
    changed = {key: (old, new_values[key]) for key, old in old_values.items() if old != new_values[key]}
    refused = [key for key in changed if key not in may_change]
    if new.run.extend_epochs and new.train.epochs > saved.train.epochs:
        refused = [key for key in refused if key != "train.epochs"]
    if refused:
        first, *others = (f"{key}: {quoted(changed[key][0])} -> {quoted(changed[key][1])}" for key in refused)
        cure = f"put back what was there, or start afresh with another {folder or f'run.dir (now {new.run.dir})'}"
        if "train.epochs" in refused:
            cure += "\n  run.extend_epochs=true allows more train.epochs; that changes every schedule from here on"
        problem = first.partition(": ")[2] + "".join(f"\n{other}" for other in others)
        raise RecipeError(refused[0], f"{problem}\n  this run was started with another recipe", cure)
    return changed
