"""The rules of a layer search's settings, and what no search can do."""

from __future__ import annotations

import dataclasses

from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.recipe import Recipe, SearchConfig

SEARCH_KEYS = frozenset(f"search.{field.name}" for field in dataclasses.fields(SearchConfig))
"""A run does not read them; a search goes on only with the same ones, but for its folder."""


def check_search(recipe: Recipe) -> None:
    """Refuse settings out of range.

    Raises:
        RecipeError: naming the key, the reason and the cure.
    """
    search = recipe.search
    if not 0 < search.budget <= 1:
        raise RecipeError(
            "search.budget", f"{search.budget:g} is out of range", "it must be above 0, up to 1"
        )
    for name, least in (
        ("steps", 1),
        ("eval_images", 1),
        ("batch_size", 2),
        ("pretrain_steps", 0),
        ("finetune_steps", 0),
        ("peak_lr", 0),
        ("random_seed", 0),
    ):
        value = getattr(search, name)
        if value < least:
            raise RecipeError(f"search.{name}", f"{value:g} is out of range", f"it must be at least {least}")
    if recipe.binary.pattern and recipe.binary.layers:
        raise RecipeError(
            "binary.pattern",
            "stands beside binary.layers, into which it is read",
            "leave one of the two out, e.g. binary.layers={}",
        )


def check_searchable(recipe: Recipe) -> None:
    """Refuse a recipe whose layers a search cannot choose, or whose training it cannot do on one rank alone.

    Raises:
        RecipeError: naming the key, the reason and the cure.
    """
    binary = recipe.binary
    if binary.method == "none":
        raise RecipeError("binary.method", "none leaves nothing to search", "choose a method")
    if binary.layers:
        raise RecipeError("binary.layers", "is what a search is to find", "leave it and binary.pattern out")
    for key, kept in (
        ("binary.keep_stem", binary.keep_stem),
        ("binary.keep_classifier", binary.keep_classifier),
    ):
        if not kept:
            raise RecipeError(key, "false, but a search leaves stem and classifier real", "set it to true")
    if recipe.train.amp == "fp16":
        raise RecipeError("train.amp", "fp16 needs a loss scale, which a search has not", "use bf16 or fp32")
