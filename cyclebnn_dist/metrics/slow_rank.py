"""The slow-rank report: which rank the others wait for, and whether it is always the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from cyclebnn_dist.world import World, gather_objects

log = logging.getLogger(__name__)

SLOW_RATIO = 1.2
WINDOWS = 3
"""How many windows in a row make it persistent. Warnings come at so many windows, at twice as many, four times, ..."""
LEAST_STEPS = 20
"""How many steps they must hold to say anything: single steps of healthy ranks differ by more than this ratio."""

FIRST_STEPS = 2
"""Steps of a life that say nothing: the first compiles, and in the second's forward pass DDP has ranks meet, to regroup
its buckets."""


@dataclass(frozen=True)
class Slowest:
    """The rank with the longest own time of a step, against the median over ranks (of two, the faster one)."""

    rank: int
    seconds: float
    median_seconds: float
    data_share: float
    """The part of its excess over the median that it spent waiting for images, 0 to 1; the rest is computing."""

    @property
    def ratio(self) -> float:
        return self.seconds / self.median_seconds if self.median_seconds else 1.0


def find_slowest(own_seconds: Sequence[float], data_seconds: Sequence[float]) -> Slowest:
    """The slowest of all ranks, given each one's own time of a step and the part of it that was waiting for images."""
    rank = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    middle = median_low(own_seconds)
    computing = [own - data for own, data in zip(own_seconds, data_seconds, strict=True)]
    excess_data = max(0.0, data_seconds[rank] - median_low(data_seconds))
    excess_computing = max(0.0, computing[rank] - median_low(computing))
    excess = excess_data + excess_computing
    return Slowest(rank, own_seconds[rank], middle, excess_data / excess if excess else 0.0)


class SlowRankReport:
    """Gathers every rank's own time once a window of steps, and has rank 0 warn of a place that stays slow."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._steps_of_life = 0
        self._own_seconds, self._data_seconds, self._steps = 0.0, 0.0, 0
        self._slow_place, self._slow_windows, self._slow_steps = "", 0, 0
        self._warn_at = WINDOWS

    def add(self, *, own_seconds: float, data_seconds: float) -> None:
        """Count one step of this rank.

        Args:
            own_seconds: see ``OwnTime``.
            data_seconds: the part of it that was waiting for images.
        """
        self._steps_of_life += 1
        if self._steps_of_life > FIRST_STEPS:
            self._own_seconds += own_seconds
            self._data_seconds += data_seconds
            self._steps += 1

    def report(self) -> dict[str, float]:
        """Collective: every rank calls this. What a row of metrics.jsonl says of the steps since the last report."""
        steps = self._steps
        if not steps:
            return {}
        times = gather_objects(self._world, (self._own_seconds / steps, self._data_seconds / steps))
        self._own_seconds, self._data_seconds, self._steps = 0.0, 0.0, 0
        slowest = find_slowest([own for own, _ in times], [data for _, data in times])
        self._watch(slowest, steps=steps)
        return {
            "slowest_rank": slowest.rank,
            "slowest_rank_ratio": slowest.ratio,
            "slowest_rank_data_share": slowest.data_share,
        }

    def _watch(self, slowest: Slowest, *, steps: int) -> None:
        """A node counts as one place, since all of its ranks may be slow, one more than the other by turns."""
        world = self._world
        place = world.hosts[slowest.rank] if len(set(world.hosts)) > 1 else f"rank {slowest.rank}"
        if slowest.ratio < SLOW_RATIO:
            place = ""
        if place != self._slow_place:
            self._slow_place, self._slow_windows, self._slow_steps = place, 0, 0
            self._warn_at = WINDOWS
        self._slow_windows += 1
        self._slow_steps += steps
        enough = self._slow_windows >= self._warn_at and self._slow_steps >= LEAST_STEPS
        if place and enough:
            self._warn_at = 2 * self._slow_windows
        if place and enough and world.is_main:
            cause = "waiting for images" if slowest.data_share > 0.5 else "computing"
            log.warning(
                "%s is slow: its own part of a step takes %.3g s, %.2f times the median, in each of the last %d reports "
                "(%d steps); what takes longer is %s. All ranks wait for it",
                world.name(slowest.rank),
                slowest.seconds,
                slowest.ratio,
                self._slow_windows,
                self._slow_steps,
                cause,
            )
