"""The rules of a run in two phases: what a first phase needs, and what would have no effect."""

from __future__ import annotations

from dataclasses import fields

from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.recipe import FirstPhaseConfig, Recipe


def check_first_phase(recipe: Recipe) -> None:
    """Refuse a first phase that leaves nothing of the run, or that nothing of the model would notice.

    Raises:
        RecipeError: naming the key, the reason and the cure.
    """
    first, optim, epochs = recipe.first_phase, recipe.optim, recipe.train.epochs
    if not first.epochs:
        unused = FirstPhaseConfig()
        for name in (each.name for each in fields(first)):
            if getattr(first, name) != getattr(unused, name):
                raise RecipeError(
                    f"first_phase.{name}",
                    "has no effect: first_phase.epochs is 0",
                    "set first_phase.epochs, or leave it out",
                )
        return
    _check_ranges(first)
    if first.epochs >= epochs:
        raise RecipeError(
            "first_phase.epochs",
            f"{first.epochs:g} leaves nothing of train.epochs = {epochs:g}, which both phases share",
            "it must be smaller",
        )
    if recipe.binary.method == "none" and all(method == "none" for method in recipe.binary.methods.values()):
        raise RecipeError(
            "first_phase.epochs",
            f"{first.epochs:g} beside binary.method=none, which has no weights to binarize afterwards",
            "set it to 0, or choose a method",
        )
    shorter = min(first.epochs, epochs - first.epochs)
    if optim.warmup_epochs >= shorter:
        raise RecipeError(
            "optim.warmup_epochs",
            f"{optim.warmup_epochs:g} leaves nothing of a phase of {shorter:g} epochs: each has its own warm-up",
            "it must be smaller",
        )
    if optim.schedule == "step" and optim.milestones and optim.milestones[-1] >= shorter:
        raise RecipeError(
            "optim.milestones",
            f"{optim.milestones[-1]:g} is never reached in a phase of {shorter:g} epochs: milestones count from its start",
            "every milestone must be smaller than both phases",
        )
    if first.lr is not None and optim.min_lr > first.lr:
        raise RecipeError(
            "optim.min_lr",
            f"{optim.min_lr:g} is above first_phase.lr = {first.lr:g}",
            "it must not be larger",
        )


def _check_ranges(first: FirstPhaseConfig) -> None:
    if first.lr is not None and first.lr <= 0:
        raise RecipeError("first_phase.lr", f"{first.lr:g} is out of range", "it must be greater than 0")
    decays = {
        "weight_decay": first.weight_decay,
        "binary_weight_decay": first.binary_weight_decay,
        "other_weight_decay": first.other_weight_decay,
        **{f"weight_decay_of.{pattern}": decay for pattern, decay in first.weight_decay_of.items()},
    }
    for name, decay in decays.items():
        if decay is not None and decay < 0:
            raise RecipeError(f"first_phase.{name}", f"{decay:g} is out of range", "it must be 0 or more")
