"""The compute time of a step, measured: forward and backward passes of one rank, without reading or communicating."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from torch import nn

from cyclebnn_dist.binary import set_progress, set_widths
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.engine.ddp import AUTOCAST_DTYPE
from cyclebnn_dist.losses import build_objective
from cyclebnn_dist.precision import Widths

REPEATS = 5
BUDGET_SECONDS = 5.0


def measure_compute(
    model: nn.Module, recipe: Recipe, *, batch: int, widths: Widths, device: torch.device
) -> float:
    """Median seconds of all forward and backward passes of a step of ``batch`` images each, with those of teachers.

    The model moves to ``device``; its gradients and statistics change.

    Raises:
        RecipeError: for fp16 without a GPU.
    """
    if recipe.train.amp == "fp16" and device.type != "cuda":
        raise RecipeError("train.amp", "fp16 needs a GPU", "give --compute-seconds, or set bf16 or fp32")
    side = recipe.data.image_size
    model.to(device)
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    if recipe.model.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    set_progress(model, 0.0)
    set_widths(model, forward_bits=widths.forward_bits, backward_bits=widths.backward_bits)
    objective = build_objective(recipe, total_steps=1, device=device, trained=False)
    dtype = AUTOCAST_DTYPE.get(recipe.train.amp)

    def one_pass() -> float:
        begun = perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(images)
        objective(model, images, logits.float(), labels, step=0).backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - begun

    one_pass()
    times = [one_pass()]
    while len(times) < REPEATS and sum(times) < BUDGET_SECONDS:
        times.append(one_pass())
    return recipe.train.accumulation * median(times)
