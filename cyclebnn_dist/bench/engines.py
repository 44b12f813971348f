"""``cyclebnn bench engines``: what a step takes, sends and keeps under DDP and under DeepSpeed's ZeRO."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from cyclebnn_dist.bench.engine_rounds import Settings, measure_engines
from cyclebnn_dist.bench.engine_variants import FULL, Variant, choose_variants
from cyclebnn_dist.bench.layers import describe_machine
from cyclebnn_dist.bench.local_ranks import launch_ranks
from cyclebnn_dist.bench.namespaces import shaped_networks
from cyclebnn_dist.bench.paired import ratio_to
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.world import World, discover_world, gather_objects, join_world, leave_world

TIMEOUT_SECONDS = 600.0


def bench_engines(
    *,
    ranks: int | None = None,
    rate: str | None = None,
    variants: Sequence[str] | None = None,
    model: str = "resnet18",
    batch: int = 4,
    image_size: int = 64,
    bucket_mb: float = 25.0,
    seconds: float = 120.0,
) -> dict[str, Any] | None:
    """Measure every variant, in turn, in the same processes. Under torchrun or srun it is collective: every rank calls this.

    Args:
        ranks: processes to start on this machine, 2 without it; under torchrun or srun there are some already.
        rate: of the link of each of them, as ``tc`` writes it (1gbit); needs root. Without it they meet on the loopback.
        variants: names (see ``engine_variants``); without them all.
        batch: images of a rank and step.
        seconds: about how long to measure once everything is built; three rounds are done in any case.

    Returns:
        plain values, as ``summarize``, with ``network``, ``ranks``, ``machine`` and what was trained; None on ranks but 0.

    Raises:
        RecipeError: an argument that cannot be measured with, or a DeepSpeed that is not there.
        RuntimeError: a rank failed.
    """
    chosen = choose_variants(variants, bucket_mb=bucket_mb)
    for key, value, least in (
        ("--batch", batch, 2),
        ("--image-size", image_size, 32),
        ("--ranks", 2 if ranks is None else ranks, 2),
    ):
        if value < least:
            raise RecipeError(key, f"{value} is too few to measure with", f"ask for {least} or more")
    for key, amount in (("--bucket-mb", bucket_mb), ("--seconds", seconds)):
        if not amount > 0:
            raise RecipeError(key, f"{amount:g} is not possible", "make it more than 0")
    settings = Settings(
        variants=tuple(variant.name for variant in chosen),
        model=model,
        batch=batch,
        image_size=image_size,
        bucket_mb=bucket_mb,
        until=time.time() + seconds,
    )
    world = discover_world()
    if world.source == "alone":
        described, measured = _on_this_machine(settings, ranks=2 if ranks is None else ranks, rate=rate)
    elif ranks is not None or rate is not None:
        raise RecipeError(
            "--ranks, --rate",
            "the ranks and their network are there already",
            "leave these out under torchrun or srun",
        )
    else:
        described, measured = _on_real_network(world, settings, seconds=seconds)
    if not world.is_main:
        return None
    return {
        **described,
        "machine": {**describe_machine(world.device.type), "cores": os.cpu_count()},
        "model": model,
        "batch": batch,
        "image_size": image_size,
        **summarize(measured, chosen),
    }


def _on_this_machine(
    settings: Settings, *, ranks: int, rate: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    configure_logging(rank=0, size=1)
    with ExitStack() as stack:
        network = stack.enter_context(shaped_networks(ranks, rate)) if rate else None
        measured = launch_ranks(settings, ranks=ranks, network=network)
    return {"network": f"a link of {rate} each" if rate else "loopback", "ranks": ranks}, measured


def _on_real_network(
    world: World, settings: Settings, *, seconds: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Collective: every rank calls this."""
    if world.size == 1:
        raise RecipeError("WORLD_SIZE", "one rank alone shares out nothing", "start two or more")
    configure_logging(rank=world.rank, size=world.size)
    world = join_world(world, timeout_seconds=TIMEOUT_SECONDS)
    measured = measure_engines(world, replace(settings, until=time.time() + seconds))
    hosts = len(set(gather_objects(world, os.uname().nodename)))
    backend = "NCCL" if world.device.type == "cuda" else "Gloo"
    leave_world()
    return {
        "network": f"{backend} on {hosts} host{'s' if hosts > 1 else ''}",
        "ranks": world.size,
    }, measured


def summarize(measured: Mapping[str, Any], variants: Sequence[Variant]) -> dict[str, Any]:
    """One row a variant of what ``measure_engines`` returned.

    Returns:
        plain values: ``rounds``, ``parameters`` and ``variants``, of each its seconds a step, their ratio to DDP's with the
        same gradients and to DDP's in fp32 (median and 95 % interval), bytes a step of gradients and of updated weights,
        and bytes kept.
    """
    found = measured["variants"]
    rows = []
    for variant in variants:
        ours = found[variant.name]
        rows.append(
            {
                "variant": variant.name,
                "engine": variant.engine.name,
                "zero_stage": variant.engine.zero_stage,
                "gradients": variant.gradients,
                "median_seconds": statistics.median(ours["seconds"]),
                "time_ratio_to_ddp": asdict(ratio_to(ours["seconds"], found[variant.baseline]["seconds"])),
                "time_ratio_to_ddp_fp32": asdict(ratio_to(ours["seconds"], found[f"ddp_{FULL}"]["seconds"])),
                "sent_bytes": ours["sent_bytes"],
                "weight_bytes": ours["weight_bytes"],
                "held_bytes": ours["held"],
                "peak_bytes": ours["peak_bytes"],
            }
        )
    return {"rounds": measured["rounds"], "parameters": measured["parameters"], "variants": rows}


def render_engines(result: Mapping[str, Any]) -> str:
    """Table for people."""
    machine = result["machine"]
    on_gpu = result["variants"][0]["peak_bytes"] is not None
    lines = [
        f"training {result['model']} with binary layers, {result['parameters']:,} parameters, {result['batch']} images of "
        f"{result['image_size']} px a rank, AdamW, fp32",
        f"{result['ranks']} ranks, {result['network']}; {machine['device']}, {machine['cores']} cores, "
        f"torch {machine['torch']}; {result['rounds']} rounds in turn",
        "",
        f"{'variant':<14}{'s a step':>9}{'x DDP (95 %)':>21}{'x DDP fp32 (95 %)':>21}{'sent MB':>9}{'weights':>9}"
        f"{'kept MB':>9}{'weights':>9}{'grads':>7}{'optim':>7}" + (f"{'peak MB':>9}" if on_gpu else ""),
    ]
    for row in result["variants"]:
        ratios = [_ratio(row[key]) for key in ("time_ratio_to_ddp", "time_ratio_to_ddp_fp32")]
        held = row["held_bytes"]
        lines.append(
            f"{row['variant']:<14}{row['median_seconds']:>9.3f}{ratios[0]:>21}{ratios[1]:>21}"
            f"{row['sent_bytes'] / 1e6:>9.2f}{row['weight_bytes'] / 1e6:>9.2f}{sum(held.values()) / 1e6:>9.1f}"
            f"{held['weights'] / 1e6:>9.1f}{held['gradients'] / 1e6:>7.1f}{held['optimizer'] / 1e6:>7.1f}"
            + (f"{row['peak_bytes'] / 1e6:>9.1f}" if on_gpu else "")
        )
    return "\n".join(
        [
            *lines,
            "",
            "s a step   median over rounds, slowest rank; cyclic: a step each of 2, 5 and 8 bits, timed together",
            "x DDP      times as long as DDP with the same gradients, and as DDP in fp32, paired by round",
            "sent       bytes a step and rank: gradients as counted, beside them ZeRO's updated weights in fp32",
            "kept       bytes of the largest rank when gradients are averaged; activations and buffers come on top",
        ]
    )


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
