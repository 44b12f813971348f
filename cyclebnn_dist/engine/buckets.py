"""The buckets: which parameters' gradients will travel together under either engine, and how they are laid out.

DDP's are found by asking it in a world of one: how it groups them depends on the order in which a backward pass yields
gradients, never on the number of ranks. The DeepSpeed engine groups them by their order in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from cyclebnn_dist.binary import parameter_kinds, set_progress, set_widths
from cyclebnn_dist.comm import Layout, Reducer, Slot, build_layout
from cyclebnn_dist.comm.traffic import trained_buckets
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.engine.ddp import DDPEngine
from cyclebnn_dist.engine.zero_groups import scatters, slots_of_optimizer
from cyclebnn_dist.losses import kurtosis_penalty
from cyclebnn_dist.optimizer import build_optimizer
from cyclebnn_dist.precision import Widths

Grouping = tuple[tuple[int, ...], ...]
"""Of each bucket, the places of its parameters in the model, in the order of their gradients."""


@dataclass(frozen=True)
class Buckets:
    """DDP regroups once, when it has seen in which order gradients come."""

    first_step: Grouping
    later_steps: Grouping


class BucketRecorder:
    """Stands where the reducer of a rank would, and notes what it is given; a world of one sends nothing."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.steps: list[list[tuple[int, ...]]] = []

    def reduce_flat(self, flat: torch.Tensor, *, parameters: list[int]) -> torch.futures.Future[torch.Tensor]:
        self.steps[-1].append(tuple(parameters))
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(flat)
        return done


def foretell_layout(model: nn.Module, recipe: Recipe, *, world_size: int, ranks_per_node: int = 1) -> Layout:
    """The layout of a run of ``model``; with slots where its ranks will need the mean of their parts alone."""
    comm = recipe.comm
    return build_layout(
        model.named_parameters(),
        world_size=world_size,
        block_size=comm.block_size,
        small_bits=comm.small_bits,
        small_numel=comm.small_numel,
        second_phase_extra_bits=comm.second_phase_extra_bits,
        ranks_per_node=ranks_per_node,
        slots=foretell_slots(model, recipe, world_size=world_size) if scatters(recipe.engine) else None,
    )


def foretell_slots(model: nn.Module, recipe: Recipe, *, world_size: int) -> dict[str, Slot]:
    """Where ZeRO will have each trained parameter, by name; none where ranks share out nothing."""
    if world_size == 1 or recipe.engine.zero_stage == 0:
        return {}
    optimizer = build_optimizer(
        model, recipe.optim, kinds=parameter_kinds(model), first_phase=recipe.first_phase
    )
    return slots_of_optimizer(model, optimizer, bucket_mb=recipe.engine.bucket_mb, world_size=world_size)


def foretell_buckets(model: nn.Module, recipe: Recipe, layout: Layout, *, widths: Widths) -> Buckets:
    """The buckets of a run of ``model`` under its engine; see ``observe_buckets``."""
    if recipe.engine.name == "ddp":
        return observe_buckets(model, recipe, layout, widths=widths)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grouping = trained_buckets(layout, bucket_mb=recipe.engine.bucket_mb, trained=trained)
    return Buckets(first_step=grouping, later_steps=grouping)


def observe_buckets(model: nn.Module, recipe: Recipe, layout: Layout, *, widths: Widths) -> Buckets:
    """The buckets of a run of ``model`` under DDP, from two passes of two black images on the CPU.

    The model's gradients and statistics change. It makes a process group of its own, so there must not be one already.
    A model that is compiled (``model.compile``) hands over its gradients in an order that may differ from this one.
    """
    side = recipe.data.image_size
    recorder = BucketRecorder(layout)
    amp = "fp32" if recipe.train.amp == "fp32" else "bf16"
    device = torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        reducer = cast(Reducer, recorder)
        engine = DDPEngine(model, optimizer, reducer, config=recipe.engine, amp=amp, device=device)  # type: ignore[arg-type]
        set_progress(model, 0.0)
        set_widths(model, forward_bits=widths.forward_bits, backward_bits=widths.backward_bits)
        for _ in range(2):
            recorder.steps.append([])
            model.zero_grad(set_to_none=True)
            logits = engine.forward(torch.zeros(2, 3, side, side))
            loss = nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))
            loss = loss + kurtosis_penalty(
                model, weight=recipe.loss.kurtosis_weight, target=recipe.loss.kurtosis_target
            )
            loss.backward()
    finally:
        dist.destroy_process_group()
    first, later = recorder.steps
    return Buckets(first_step=tuple(first), later_steps=tuple(later))
