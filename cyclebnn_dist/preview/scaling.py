"""The scaling of a recipe: what a step takes and sends on clusters of several sizes, before any of them is rented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from cyclebnn_dist.batching import per_rank_batch
from cyclebnn_dist.binary import scheduled_precision
from cyclebnn_dist.comm import Codec
from cyclebnn_dist.comm.breakeven import CodecCost, Load, schedule_mean, step_seconds
from cyclebnn_dist.comm.measure import measure_codec
from cyclebnn_dist.comm.pieces import CAST_BYTES
from cyclebnn_dist.comm.scaling import Cluster, step_exposure
from cyclebnn_dist.comm.traffic import bucket_loads
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.engine.buckets import foretell_buckets, foretell_layout, foretell_slots
from cyclebnn_dist.engine.zero_groups import weight_bytes
from cyclebnn_dist.models import build_model
from cyclebnn_dist.precision import build_schedule
from cyclebnn_dist.preview.compute import measure_compute
from cyclebnn_dist.preview.describe import Length

ASSUMPTIONS = (
    "every rank computes equally long at every size: the images of a rank stay, the global batch grows with the ranks",
    "the backward pass is 2/3 of a pass, and a bucket may leave when its share of it is done; only the last pass of an "
    "accumulation has anything to overlap with",
    "buckets leave one after the other; codec and network take turns, beside the computation and without slowing it (on a "
    "CPU they share its cores, and a step takes longer than this)",
    "every rank sends to every other: inside a node at --intra, outside at --network, which the ranks of a node share, both "
    "at once and at their full rate; two messages a peer and bucket at --message-us",
    "under ZeRO, from stage 1 on, updated weights go to all ranks in fp32 when the step is done, and nothing hides them",
    "steps after the first, whose gradients DDP sends in one bucket; no waiting for images, no evaluation, no saving",
)


def plan_scaling(
    recipe: Recipe,
    clusters: Sequence[Cluster],
    *,
    length: Length,
    compute_seconds: float | None = None,
    batch: int | None = None,
    codec_gb_per_second: float | None = None,
) -> dict[str, Any]:
    """What a step is predicted to take on each cluster in fp32, bf16 and at the schedule's widths, as plain values.

    Makes a process group of its own, so there must not be one already.

    Args:
        compute_seconds: of one rank's passes of a step; None to measure it here with ``batch`` images a pass.
        codec_gb_per_second: GB of fp32 gradients a second over a whole exchange, at every width of 1 to 8 bits, casts then
            being free; None to measure it here.

    Raises:
        RecipeError: as ``build_model``, or for a batch that cannot be.
    """
    side, device = recipe.data.image_size, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if compute_seconds is None and batch is None:
        batch = _smallest_cluster_batch(recipe, clusters[0])
    if batch is not None and batch < 1:
        raise RecipeError("--batch", f"{batch} is out of range", "it must be at least 1")
    model, _ = build_model(
        replace(recipe.model, pretrained=False, weights=""), recipe.binary, image_size=side
    )
    precision = scheduled_precision(recipe.precision, model)
    schedule = build_schedule(
        precision, total_steps=length.total_steps, steps_per_epoch=length.steps_per_epoch
    )
    used = Counter(schedule.communication.first(length.total_steps))
    choices: dict[str, Mapping[int, int]] = {"fp32": {32: 1}, "bf16": {16: 1}, "schedule": used}
    layouts = {cluster: foretell_layout(model, recipe, world_size=cluster.world_size) for cluster in clusters}
    buckets = foretell_buckets(model, recipe, layouts[clusters[0]], widths=schedule.at(0)).later_steps
    widths = sorted({*used, *CAST_BYTES})
    costs = _codec_costs(
        recipe,
        widths,
        device=device,
        gb_per_second=codec_gb_per_second,
        scattered=layouts[clusters[0]].scattered,
    )
    measured_compute = compute_seconds is None
    if compute_seconds is None:
        assert batch is not None
        compute_seconds = measure_compute(model, recipe, batch=batch, widths=schedule.at(0), device=device)
    rows = []
    for cluster in clusters:
        loads = {
            bits: bucket_loads(layouts[cluster], buckets, bits=bits, codec=recipe.comm.codec)
            for bits in widths
        }
        slots = foretell_slots(model, recipe, world_size=cluster.world_size)
        modes = {
            name: _predict(
                cluster,
                loads,
                costs,
                steps,
                weight_bytes=weight_bytes(slots.values(), world_size=cluster.world_size),
                compute_seconds=compute_seconds,
                passes=recipe.train.accumulation,
                total_steps=length.total_steps,
                overlap=device.type == "cpu",
            )
            for name, steps in choices.items()
        }
        rows.append({**asdict(cluster), "ranks": cluster.world_size, "modes": modes})
    return {
        "steps": length.total_steps,
        "steps_known_from": length.source,
        "gradients": sum(parameter.numel for parameter in layouts[clusters[0]].parameters),
        "buckets": len(buckets),
        "mean_bits": schedule_mean({bits: float(bits) for bits in used}, used),
        "compute_seconds": compute_seconds,
        "compute_measured": measured_compute,
        "batch": batch if measured_compute else None,
        "codec_measured": codec_gb_per_second is None,
        "codec_gb_per_second": {bits: _gb_per_second(cost) for bits, cost in costs.items()},
        "device": device.type,
        "assumptions": list(ASSUMPTIONS),
        "rows": rows,
    }


def _predict(
    cluster: Cluster,
    loads: Mapping[int, Sequence[Load]],
    costs: Mapping[int, CodecCost],
    steps: Mapping[int, int],
    *,
    weight_bytes: int,
    compute_seconds: float,
    passes: int,
    total_steps: int,
    overlap: bool,
) -> dict[str, float]:
    """Means over steps, of which ``steps`` have which bits; bytes are those of rank 0, of gradients where not said."""
    size, link = cluster.world_size, cluster.link()
    exposed = {
        bits: step_exposure(
            loads[bits],
            costs,
            link,
            world_size=size,
            compute_seconds=compute_seconds,
            passes=passes,
            overlap=overlap,
        )
        for bits in steps
    }
    alone = {
        bits: step_seconds(loads[bits], costs, link, world_size=size, overlap=overlap) if size > 1 else 0.0
        for bits in steps
    }
    sent = {bits: float(sum(load.sent_bytes for load in loads[bits])) for bits in steps}
    exposed_seconds, step_bytes = schedule_mean(exposed, steps), schedule_mean(sent, steps)
    exchange_seconds = schedule_mean(alone, steps)
    if weight_bytes:
        weight_seconds = link.latency_seconds / 2 + weight_bytes / link.bytes_per_second
        exposed_seconds, exchange_seconds = (
            exposed_seconds + weight_seconds,
            exchange_seconds + weight_seconds,
        )
    return {
        "step_seconds": compute_seconds + exposed_seconds,
        "exchange_seconds": exchange_seconds,
        "exposed_seconds": exposed_seconds,
        "efficiency": compute_seconds / (compute_seconds + exposed_seconds),
        "sent_bytes_per_step": step_bytes,
        "sent_bytes": step_bytes * total_steps,
        "weight_bytes_per_step": weight_bytes,
    }


def _codec_costs(
    recipe: Recipe,
    widths: Sequence[int],
    *,
    device: torch.device,
    gb_per_second: float | None,
    scattered: bool,
) -> dict[int, CodecCost]:
    if gb_per_second is not None:
        cost = CodecCost(4e-9 / gb_per_second, 0.0)
        return {bits: CodecCost(0.0, 0.0) if bits in CAST_BYTES else cost for bits in widths}
    codec = Codec(
        recipe.comm.codec, block_size=recipe.comm.block_size, unbiased=not recipe.comm.error_feedback
    )
    return measure_codec(codec, widths, device=device, scattered=scattered)


def _gb_per_second(cost: CodecCost) -> float | None:
    """GB of fp32 gradients through all a rank does in a large world; None where it takes no time."""
    return 4e-9 / cost.element_seconds if cost.element_seconds else None


def _smallest_cluster_batch(recipe: Recipe, cluster: Cluster) -> int:
    try:
        return per_rank_batch(recipe.train, world_size=cluster.world_size)
    except RecipeError as error:
        raise RecipeError(
            error.key,
            error.problem,
            "give --batch N (images of a rank and pass) to measure with, or --compute-seconds",
        ) from None
