"""One run of ``bench convergence``: the small network trained to the end with one kind of all-reduce, then tested."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from cyclebnn_dist.agreement import compare_parameters
from cyclebnn_dist.bench.convergence_data import ImageSet
from cyclebnn_dist.bench.convergence_net import build_net
from cyclebnn_dist.bench.convergence_variants import Variant
from cyclebnn_dist.binary import parameter_kinds, scheduled_precision, set_progress, set_widths
from cyclebnn_dist.comm import Layout, build_reducer
from cyclebnn_dist.config.recipe import EngineConfig, OptimConfig, PrecisionConfig
from cyclebnn_dist.data import EvalLoader
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.evaluate import evaluate
from cyclebnn_dist.optimizer import build_optimizer, learning_rate
from cyclebnn_dist.precision.schedule import build_schedule
from cyclebnn_dist.world import World, largest_over_ranks

OPTIM = OptimConfig(name="adamw", lr=5e-3)
WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""

TEST_BATCH = 500


def train_run(
    world: World, variant: Variant, sets: tuple[ImageSet, ImageSet], *, seed: int, steps: int, batch: int
) -> dict[str, Any]:
    """Collective: every rank calls this. Train from the start, by the parts that train a recipe.

    Runs of one seed have the same initial weights and see the same images in the same order, on the same ranks.

    Args:
        sets: to train with and to test with, whole on every rank.
        steps: optimizer steps.
        batch: images of a step over all ranks, a multiple of their number.

    Returns:
        ``accuracy`` in percent of the test images (all ranks together see each once), ``sent_bytes`` (the largest
        rank's), ``mean_bits`` of its steps, ``skipped_steps``, ``wide_share`` of parameters that travel at the width of
        the step, ``parameters``, ``images`` and ``seconds``; alike on every rank.
    """
    begun = time.perf_counter()
    train, test = sets
    net = build_net(seed=seed).to(world.device)
    named = list(net.named_parameters())
    optimizer = build_optimizer(net, OPTIM, kinds=parameter_kinds(net))
    place: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "device": world.device}
    reducer = build_reducer(variant.comm, named, seed=seed, **place)
    precision = scheduled_precision(PrecisionConfig(communication=variant.width), net)
    schedule = build_schedule(precision, total_steps=steps, steps_per_epoch=steps)
    engine = DDPEngine(net, optimizer, reducer, config=EngineConfig(), amp="fp32", device=world.device)
    skipped, bits = 0, 0
    share = batch // world.size
    for step, chosen in enumerate(batches(len(train), seed=seed, steps=steps, batch=batch)):
        ours = chosen[world.rank * share : (world.rank + 1) * share].to(world.device)
        widths = schedule.at(step)
        bits += widths.communication_bits
        engine.begin_step(step, lr=rate_at(step, steps=steps), communication_bits=widths.communication_bits)
        set_progress(net, step / steps)
        set_widths(net, forward_bits=widths.forward_bits, backward_bits=widths.backward_bits)
        engine.backward(nn.functional.cross_entropy(engine.forward(train.images[ours]), train.labels[ours]))
        finite = bool(
            torch.isfinite(engine.clip(0.0))
        )  # of the averaged gradient, which all ranks have alike
        engine.step(skip=not finite)
        skipped += not finite
    compare_parameters(net, world=world, step=steps)
    part = cast(EvalLoader, list(rank_batches(test, rank=world.rank, world_size=world.size)))
    found = evaluate(net, part, world=world, forward_bits=widths.forward_bits, amp="fp32")
    assert found.images == len(test)
    sent, seconds = largest_over_ranks(
        world, [float(reducer.counters.sent_bytes), time.perf_counter() - begun]
    )
    reducer.close()
    return {
        "accuracy": found.top1,
        "sent_bytes": round(sent),
        "mean_bits": bits / steps,
        "skipped_steps": skipped,
        "wide_share": wide_share(reducer.layout),
        "parameters": sum(parameter.numel() for _, parameter in named),
        "images": {"train": len(train), "test": len(test)},
        "seconds": seconds,
    }


def rate_at(step: int, *, steps: int) -> float:
    """The learning rate: up over the first steps, then down to 0 along a cosine."""
    warmed = OptimConfig(lr=OPTIM.lr, warmup_epochs=WARMUP)
    return learning_rate(step, warmed, total_steps=steps, steps_per_epoch=steps)


def batches(count: int, *, seed: int, steps: int, batch: int) -> Iterator[torch.Tensor]:
    """Indices of each step's images, int64 ``[batch]``: pass after pass over ``count`` images, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        chosen, waiting = waiting.split([batch, len(waiting) - batch])
        yield chosen


def rank_batches(test: ImageSet, *, rank: int, world_size: int) -> Iterator[ImageSet]:
    """Every ``world_size``-th image from ``rank`` on."""
    parts = (whole[rank::world_size].split(TEST_BATCH) for whole in (test.images, test.labels))
    for images, labels in zip(*parts, strict=True):
        yield ImageSet(images, labels)


def wide_share(layout: Layout) -> float:
    """Share of the parameters' elements that travel at the width of the step."""
    wide = sum(parameter.numel for parameter in layout.parameters if not parameter.small)
    return wide / sum(parameter.numel for parameter in layout.parameters)
