"""Evaluation of a checkpoint, at the forward width stored in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from cyclebnn_dist import loop
from cyclebnn_dist.checkpoint import complete_checkpoints, missing_parts, read_meta
from cyclebnn_dist.config import SAVED_NAME, RecipeError, load_recipe
from cyclebnn_dist.data import EvalLoader, scan_folder
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.models import build_model
from cyclebnn_dist.world import World, discover_world, join_world, leave_world, on_main


def main(path: Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Collective: every rank calls this. ``evaluate_checkpoint`` in process groups of its own.

    Raises:
        RecipeError: if there is no complete checkpoint, or the data are not as its recipe says.
    """
    world = discover_world()
    configure_logging(rank=world.rank, size=world.size)
    recipe = load_recipe(find_checkpoint(path) / SAVED_NAME, overrides)
    world = join_world(world, timeout_seconds=recipe.run.collective_timeout_seconds)
    result = evaluate_checkpoint(path, world, overrides=overrides)
    leave_world()
    return result


def evaluate_checkpoint(path: Path, world: World, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Collective: every rank calls this. Accuracy of a checkpoint folder, or of the newest one of a run folder.

    Raises:
        RecipeError: if there is no complete checkpoint, or the data are not as its recipe says.
    """
    folder = find_checkpoint(path)
    recipe = load_recipe(folder / SAVED_NAME, overrides)
    forward_bits = read_meta(folder)["eval_forward_bits"]
    images = on_main(
        world, lambda: scan_folder(recipe.data.path, "val", num_classes=recipe.model.num_classes)
    )
    start = replace(recipe.model, pretrained=False, weights="")
    model, _ = build_model(start, recipe.binary, image_size=recipe.data.image_size)
    model.to(world.device)
    loader = EvalLoader(
        images,
        recipe.data,
        batch_size=recipe.eval.batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    result: dict[str, Any] = {
        "checkpoint": str(folder),
        "step": read_meta(folder)["step"],
        "forward_bits": forward_bits,
        "images": len(images),
    }
    for prefix, file in (("", "model.safetensors"), ("ema_", "ema.safetensors")):
        if not (folder / file).exists():
            continue
        model.load_state_dict(load_file(str(folder / file)))
        found = loop.evaluate(model, loader, world=world, forward_bits=forward_bits, amp=recipe.train.amp)
        result |= {f"{prefix}top1": found.top1, f"{prefix}top5": found.top5, f"{prefix}loss": found.loss}
    loader.close()
    return result


def find_checkpoint(path: Path) -> Path:
    """``path`` itself if it is a complete checkpoint, else the newest complete one of the run folder ``path``."""
    if (path / "meta.json").exists():
        problems = missing_parts(path)
        if problems:
            raise RecipeError(str(path), f"is damaged: {'; '.join(problems)}", "choose another checkpoint")
        return path
    newest = next(iter(complete_checkpoints(path)), None)
    if newest is None:
        raise RecipeError(
            str(path), "holds no complete checkpoint", "name a run folder or a checkpoint folder"
        )
    return newest
