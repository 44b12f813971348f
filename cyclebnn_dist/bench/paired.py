"""Paired timing: variants run in turn, round after round, and compared within each round.

A machine's speed drifts and other jobs come and go; variants of one round see much the same of it, so the ratio of their
times is steadier than either.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds of a time divided by the baseline's of that round, with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def time_in_turn(
    variants: Mapping[str, Callable[[], None]],
    *,
    seconds: float,
    least_rounds: int = 3,
    most_rounds: int = 50,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round, in an order drawn anew for each; one round before is not counted.

    Args:
        seconds: about how long to go on; ``least_rounds`` are done whatever they take.
    """
    for run in variants.values():
        run()
    order, generator = list(variants), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    for done in range(most_rounds):
        if done >= least_rounds and time.perf_counter() > end:
            break
        generator.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            variants[name]()
            times[name].append(time.perf_counter() - begun)
    return times


def ratio_to(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """How many times as long as ``baseline``, round by round."""
    ratios = [ours / theirs for ours, theirs in zip(times, baseline, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return Ratio(
        statistics.median(ratios), medians[round(0.025 * RESAMPLES)], medians[round(0.975 * RESAMPLES) - 1]
    )


def ratio_over_launches(times: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Ratio:
    """``ratio_to`` for rounds ``[launch][round]``; launches are drawn anew first and then rounds within each.

    Processes differ from one start to the next more than rounds within one do.
    """
    ratios = [
        [ours / theirs for ours, theirs in zip(*launch, strict=True)]
        for launch in zip(times, baseline, strict=True)
    ]
    generator = random.Random(0)

    def resampled_median() -> float:
        launches = generator.choices(ratios, k=len(ratios))
        return statistics.median(
            ratio for launch in launches for ratio in generator.choices(launch, k=len(launch))
        )

    medians = sorted(resampled_median() for _ in range(RESAMPLES))
    return Ratio(
        statistics.median(ratio for launch in ratios for ratio in launch),
        medians[round(0.025 * RESAMPLES)],
        medians[round(0.975 * RESAMPLES) - 1],
    )
