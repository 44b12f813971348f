"""Recipes: typed, validated, saved beside the run. No torch is imported here."""

from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.load import (
    SAVED_NAME,
    load_recipe,
    load_saved,
    load_settings,
    recipe_digest,
    recipe_from_dict,
    save_recipe,
    to_dict,
)
from cyclebnn_dist.config.recipe import (
    BinaryConfig,
    CommConfig,
    DataConfig,
    DistillConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    Recipe,
    RunConfig,
    SearchConfig,
    TrainConfig,
    WandbConfig,
    WidthConfig,
)
from cyclebnn_dist.config.reference import render_reference
from cyclebnn_dist.config.resume_rules import MAY_CHANGE, resume_differences
from cyclebnn_dist.config.validate import validate

__all__ = [
    "MAY_CHANGE",
    "SAVED_NAME",
    "BinaryConfig",
    "CommConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "Recipe",
    "RecipeError",
    "RunConfig",
    "SearchConfig",
    "TrainConfig",
    "WandbConfig",
    "WidthConfig",
    "load_recipe",
    "load_saved",
    "load_settings",
    "recipe_digest",
    "recipe_from_dict",
    "render_reference",
    "resume_differences",
    "save_recipe",
    "to_dict",
    "validate",
]
