"""The worlds of a run: its totals, cut where the number of ranks changed, since speeds and bytes do not add up over that."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

World = dict[str, Any]


def begin_world(worlds: list[World], *, ranks: int, device: str, totals: Mapping[str, float]) -> None:
    """Note at the start of a life that from here on steps are those of ``ranks`` ranks, unless they were before.

    The first world noted counts from the run's beginning.

    Args:
        worlds: noted so far; changed.
        totals: of the run up to here.
    """
    if not worlds or (worlds[-1]["ranks"], worlds[-1]["device"]) != (ranks, device):
        before = dict(totals) if worlds else dict.fromkeys(totals, 0)
        worlds.append({"ranks": ranks, "device": device, "before": before})


def split_by_world(worlds: list[World], totals: Mapping[str, float]) -> list[World]:
    """What was added to ``totals`` in each world that had a step; ``first_step`` counts from 0."""
    marks = [world["before"] for world in worlds] + [dict(totals)]
    return [
        {
            "ranks": world["ranks"],
            "device": world["device"],
            "first_step": int(before["steps"]),
            **{name: after[name] - before.get(name, 0) for name in totals},
        }
        for world, (before, after) in zip(worlds, pairwise(marks), strict=True)
        if after["steps"] > before["steps"]
    ]
