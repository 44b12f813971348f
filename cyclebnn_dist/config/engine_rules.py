"""The rules an engine must keep: what DeepSpeed cannot do, and why."""

from __future__ import annotations

from cyclebnn_dist.config.deepspeed_rules import check_deepspeed_settings
from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.recipe import Recipe


def check_engine(recipe: Recipe) -> None:
    """Refuse what the chosen engine does not do.

    Raises:
        RecipeError: naming the key, the reason and the cure.
    """
    engine, stage = recipe.engine, recipe.engine.zero_stage
    if engine.name != "deepspeed":
        if stage:
            raise RecipeError(
                "engine.zero_stage",
                f"{stage} beside engine.name={engine.name}, which shares out nothing",
                "set engine.name=deepspeed, or engine.zero_stage=0",
            )
        if engine.deepspeed:
            raise RecipeError(
                "engine.deepspeed",
                f"is told to DeepSpeed, which engine.name={engine.name} does not use",
                "set engine.name=deepspeed, or leave it out",
            )
        return
    check_deepspeed_settings(engine.deepspeed)
    if stage == 3:
        raise RecipeError(
            "engine.zero_stage",
            "3 leaves no rank with whole weights, which widths, averaged weights, health and checkpoints read",
            "use engine.zero_stage=2, which shares out all but the weights",
        )
    if stage and recipe.optim.name == "lamb":
        raise RecipeError(
            "optim.name",
            "lamb needs the norm of every whole parameter, of which ZeRO leaves a rank a part",
            "use optim.name=adamw, or engine.zero_stage=0",
        )
    if stage and recipe.model.channels_last:
        raise RecipeError(
            "model.channels_last",
            f"true beside engine.zero_stage={stage}, which keeps weights one after the other in a flat tensor",
            "set it to false, or engine.zero_stage=0",
        )
    if stage and engine.reduce_scatter:
        check_reduce_scatter(recipe)
    for key, wanted in [
        ("engine.find_unused_parameters", engine.find_unused_parameters),
        ("model.compile", recipe.model.compile),
    ]:
        if wanted:
            raise RecipeError(
                key, "has no meaning yet under DeepSpeed", "set it to false, or engine.name=ddp"
            )


def check_reduce_scatter(recipe: Recipe) -> None:
    """Refuse what belongs to the second half of an all-reduce, which a reduce-scatter does not have.

    Raises:
        RecipeError: naming the key, the reason and the cure.
    """
    for key, wanted in [
        ("comm.hierarchical", recipe.comm.hierarchical),
        ("comm.second_phase_extra_bits", recipe.comm.second_phase_extra_bits > 0),
    ]:
        if wanted:
            raise RecipeError(
                key,
                f"stands beside engine.reduce_scatter=true at engine.zero_stage={recipe.engine.zero_stage}, "
                "which sends each mean to no rank but its owner",
                "leave it out, or set engine.reduce_scatter=false for a whole all-reduce",
            )
