"""The summary of ``bench convergence``: paired differences to the fp32 all-reduce, and what they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cyclebnn_dist.bench.convergence_data import CLAIMED_SET
from cyclebnn_dist.bench.convergence_journal import Runs
from cyclebnn_dist.bench.convergence_variants import BASELINE, CLAIMED, Variant
from cyclebnn_dist.bench.student import mean_interval

MARGIN = 0.5
"""Percentage points that a variant may lose and still count as non-inferior."""

LEAST_SEEDS = 10
"""Pairs that a verdict needs."""

UNSATURATED = (70.0, 95.0)
"""Where the baseline's mean accuracy must lie, in percent, for a verdict: elsewhere there is little to lose."""


def summarize(runs: Runs, *, sets: Sequence[str], variants: Sequence[Variant]) -> dict[str, Any]:
    """What finished runs say, as plain values.

    Returns:
        ``variants``: a row for every set and variant that has runs. ``difference`` is the mean over seeds of the accuracy
        less that of the fp32 all-reduce of the same seed, in percentage points; ``interval`` its two-sided 95 % t interval
        (None with one seed), ``deviation`` the standard deviation of one pair. ``non_inferior``: whether the interval's
        lower end lies above -``margin_points``; None where there is no verdict: the baseline itself, sets other than
        ``shapes``, fewer than ``least_seeds`` pairs, a baseline outside ``unsaturated_percent``.
        ``claim``: True if all claimed variants are non-inferior, False if one is not, None if one has no verdict.
    """
    rows = []
    for name in sets:
        baseline = _accuracies(runs, name, BASELINE)
        for variant in variants:
            if _accuracies(runs, name, variant.name):
                rows.append(_row(runs, name, variant, baseline))
    claimed = [row["non_inferior"] for row in rows if row["claimed"]]
    complete = len(claimed) == len(CLAIMED) and None not in claimed
    return {
        "margin_points": MARGIN,
        "least_seeds": LEAST_SEEDS,
        "unsaturated_percent": UNSATURATED,
        "claim": False if False in claimed else True if complete else None,
        "variants": rows,
    }


def _row(runs: Runs, name: str, variant: Variant, baseline: Mapping[int, float]) -> dict[str, Any]:
    own = [run for (of_set, of, _), run in runs.items() if (of_set, of) == (name, variant.name)]
    accuracies = _accuracies(runs, name, variant.name)
    pairs = [accuracies[seed] - baseline[seed] for seed in sorted(accuracies.keys() & baseline.keys())]
    row: dict[str, Any] = {
        "set": name,
        "variant": variant.name,
        "low_bits": variant.bits[0],
        "high_bits": variant.bits[1],
        "mean_bits": own[0]["mean_bits"],
        "error_feedback": variant.comm.error_feedback,
        "accuracy": statistics.fmean(accuracies.values()),
        "seeds": len(pairs),
        "difference": None,
        "interval": None,
        "deviation": None,
        "sent_bytes": own[0]["sent_bytes"],
        "seconds": statistics.median(run["seconds"] for run in own),
        "skipped_steps": sum(run["skipped_steps"] for run in own),
        "claimed": name == CLAIMED_SET and variant.name in CLAIMED,
        "non_inferior": None,
    }
    if variant.name == BASELINE or not pairs:
        return row
    found = mean_interval(pairs)
    row["difference"] = found.mean
    if not math.isnan(found.deviation):
        row |= {"interval": {"low": found.low, "high": found.high}, "deviation": found.deviation}
    low, high = UNSATURATED
    judged = low <= statistics.fmean(baseline.values()) <= high and found.count >= LEAST_SEEDS
    if name == CLAIMED_SET and judged:
        row["non_inferior"] = found.low > -MARGIN
    return row


def _accuracies(runs: Runs, name: str, variant: str) -> dict[int, float]:
    """Accuracy by seed."""
    return {
        seed: run["accuracy"] for (of_set, of, seed), run in runs.items() if (of_set, of) == (name, variant)
    }
