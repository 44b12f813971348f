"""Evaluation: the accuracy of a model on all validation images, and of a checkpoint at the width stored in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from cyclebnn_dist.binary import check_two_valued, set_widths, using_real_weights
from cyclebnn_dist.buffers import averaged_buffers, using_buffers
from cyclebnn_dist.checkpoint import (
    best_checkpoint,
    complete_checkpoints,
    damaged_parts,
    has_real_weights,
    read_meta,
)
from cyclebnn_dist.config import SAVED_NAME, RecipeError, load_recipe
from cyclebnn_dist.data import Batch, EvalLoader, open_source
from cyclebnn_dist.engine.ddp import AUTOCAST_DTYPE
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.models import build_model
from cyclebnn_dist.phases import Weights
from cyclebnn_dist.world import (
    World,
    discover_world,
    join_world,
    leave_world,
    mean_in_rank_order,
    on_main,
    share_refusal,
    sum_over_ranks,
)

NEWEST, BEST = "newest", "best"
EVALUATION_KEYS = ("data.", "eval.", "train.amp", "run.collective_timeout_seconds")


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in percent and mean loss over all validation images."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    world: World,
    forward_bits: int,
    amp: str,
    weights: Weights = "binary",
) -> Evaluation:
    """Collective: every rank calls this. Every validation image counted once, with buffers averaged over ranks.

    The model, its buffers and its mode are afterwards as before.

    Args:
        batches: this rank's, as ``EvalLoader`` gives them.
        weights: real for a model of a first phase (see ``phases``), whose weights are not two-valued.

    Raises:
        RecipeError: on every rank, naming the file: an image cannot be read.
        RuntimeError: a binary weight is not two-valued (see ``check_two_valued``).
        Exception: whatever else ``batches`` raises, on every rank alike.
    """
    dtype = AUTOCAST_DTYPE.get(amp)
    counts = torch.zeros(3, dtype=torch.int64)
    loss_sum = torch.zeros(1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    set_widths(model, forward_bits=forward_bits, backward_bits=32)
    try:
        with (
            using_real_weights(model, weights == "real"),
            using_buffers(model, averaged_buffers(model, world=world)),
        ):
            if weights == "binary":
                check_two_valued(model)
            for batch in refusable(batches, world=world):
                with torch.autocast(world.device.type, dtype=dtype, enabled=dtype is not None):
                    logits = model(batch.images)
                logits = logits.float()
                loss_sum += nn.functional.cross_entropy(logits, batch.labels, reduction="sum").double().cpu()
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices
                hits = best == batch.labels[:, None]
                counts += torch.tensor([hits[:, 0].sum(), hits.any(dim=1).sum(), len(batch.labels)])
    finally:
        model.train(was_training)
    top1, top5, images = sum_over_ranks(world, counts).tolist()
    loss = mean_in_rank_order(world, loss_sum).item() * world.size / images
    return Evaluation(top1=100.0 * top1 / images, top5=100.0 * top5 / images, loss=loss, images=images)


def refusable(batches: Iterable[Batch], *, world: World) -> Iterator[Batch]:
    """Collective: every rank calls this, and exhausts it. This rank's batches, until one cannot be read.

    Raises:
        RecipeError: on every rank, after its own batches, if one of another rank's cannot be read either.
    """
    refusal = None
    try:
        yield from batches
    except RecipeError as error:
        refusal = error
    share_refusal(world, refusal)


def main(path: Path, *, which: str = NEWEST, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Collective: every rank calls this. ``evaluate_checkpoint`` in process groups of its own.

    Raises:
        RecipeError: if there is no complete checkpoint, or the data are not as its recipe says.
    """
    world = discover_world()
    configure_logging(rank=world.rank, size=world.size)
    folder = find_checkpoint(path, which=which)
    recipe = load_recipe(folder / SAVED_NAME, check_overrides(overrides))
    world = join_world(world, timeout_seconds=recipe.run.collective_timeout_seconds)
    result = evaluate_checkpoint(folder, world, overrides=overrides)
    leave_world()
    return result


def evaluate_checkpoint(path: Path, world: World, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Collective: every rank calls this. Accuracy of a checkpoint folder, or of the newest one of a run folder.

    Raises:
        RecipeError: if there is no complete checkpoint, or the data are not as its recipe says.
    """
    folder = find_checkpoint(path)
    recipe = load_recipe(folder / SAVED_NAME, check_overrides(overrides))
    forward_bits = recipe.eval.forward_bits or read_meta(folder)["eval_forward_bits"]
    weights: Weights = "real" if has_real_weights(folder) else "binary"
    images = on_main(world, lambda: open_source(recipe.data, "val", num_classes=recipe.model.num_classes))
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
        **({"weights": weights} if read_meta(folder).get("weights") else {}),
        "images": len(images),
    }
    for prefix, file in (("", "model.safetensors"), ("ema_", "ema.safetensors")):
        if not (folder / file).exists():
            continue
        model.load_state_dict(load_file(str(folder / file)))
        found = evaluate(
            model, loader, world=world, forward_bits=forward_bits, amp=recipe.train.amp, weights=weights
        )
        result |= {f"{prefix}top1": found.top1, f"{prefix}top5": found.top5, f"{prefix}loss": found.loss}
    loader.close()
    return result


def check_overrides(overrides: Sequence[str]) -> Sequence[str]:
    """The overrides, if all are of keys that an evaluation reads and a checkpoint does not fix.

    Raises:
        RecipeError: naming the first that is not.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(EVALUATION_KEYS):
            raise RecipeError(
                key,
                "does not concern an evaluation",
                f"these do: {', '.join(f'{k}*' for k in EVALUATION_KEYS)}",
            )
    return overrides


def find_checkpoint(path: Path, *, which: str = NEWEST) -> Path:
    """``path`` itself if it is a checkpoint, else one of the run folder ``path``; it is intact.

    Args:
        which: ``newest``, ``best`` or a step.

    Raises:
        RecipeError: there is no such checkpoint, or it is damaged.
    """
    if (path / "meta.json").exists():
        if which != NEWEST:
            raise RecipeError("--checkpoint", f"{path} is one checkpoint", "name its run folder")
        folder = path
    else:
        complete = complete_checkpoints(path)
        if not complete:
            raise RecipeError(
                str(path), "holds no complete checkpoint", "name a run folder or a checkpoint folder"
            )
        steps = {str(read_meta(each)["step"]): each for each in complete}
        found = {NEWEST: complete[0], BEST: best_checkpoint(path), **steps}.get(which)
        if found is None:
            raise RecipeError(
                "--checkpoint",
                "none of these was evaluated (with real weights, in a first phase, does not count)"
                if which == BEST
                else f"no complete checkpoint is called {which}",
                f"there are {NEWEST}, {BEST} and steps {', '.join(sorted(steps, key=int))}",
            )
        folder = found
    problems = damaged_parts(folder)
    if problems:
        raise RecipeError(str(folder), f"is damaged: {'; '.join(problems)}", "choose another checkpoint")
    return folder
