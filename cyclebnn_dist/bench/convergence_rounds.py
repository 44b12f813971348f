"""The rounds of ``bench convergence``: on one rank, every run that is still missing, seed after seed."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cyclebnn_dist.bench.convergence_data import make_sets
from cyclebnn_dist.bench.convergence_journal import RunKey, append_run
from cyclebnn_dist.bench.convergence_variants import choose_variants
from cyclebnn_dist.world import World, on_main


@dataclass(frozen=True)
class Settings:
    """What a launch trains.

    Attributes:
        missing: (set, variant, seed) of every run, in order.
        journal: file that finished runs are appended to, by rank 0.
        until: when to end, in seconds of ``time.time``; one run is done in any case.
    """

    benchmark: ClassVar[str] = "convergence"

    missing: tuple[RunKey, ...]
    journal: str
    steps: int
    batch: int
    num_train: int
    num_test: int
    until: float


def draw_order(
    sets: Sequence[str], variants: Sequence[str], *, seeds: int, done: Collection[RunKey]
) -> tuple[RunKey, ...]:
    """The runs that are not ``done``: seed after seed, the variants of each in an order drawn from the seed."""
    order: list[RunKey] = []
    for seed in range(seeds):
        runs = [(name, variant, seed) for name in sets for variant in variants]
        random.Random(seed).shuffle(runs)
        order += [run for run in runs if run not in done]
    return tuple(order)


def measure_runs(world: World, settings: Settings) -> dict[str, Any]:
    """Collective: every rank calls this. Train every missing run there is time for.

    Returns:
        ``stopped``: whether time ran out before the last one.
    """
    from cyclebnn_dist.bench.convergence_run import (
        train_run,
    )  # loads timm and DALI: only ranks shall wait for them

    variants = {variant.name: variant for variant in choose_variants(None)}
    sets = {}
    longest = 0.0
    for done, (name, variant, seed) in enumerate(settings.missing):
        if done and not on_main(world, lambda: time.time() + longest < settings.until):  # noqa: B023
            return {"stopped": True}
        if name not in sets:
            pair = make_sets(name, num_train=settings.num_train, num_test=settings.num_test)
            sets[name] = (pair[0].to(world.device), pair[1].to(world.device))
        result = train_run(
            world, variants[variant], sets[name], seed=seed, steps=settings.steps, batch=settings.batch
        )
        longest = max(longest, result["seconds"])
        if world.is_main:
            append_run(Path(settings.journal), (name, variant, seed), result)
    return {"stopped": False}
