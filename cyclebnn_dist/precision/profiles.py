"""The profiles: how a width moves between its ends within one cycle, as functions of the cycle's progress.

Cosine is CPT's (Fu et al., ICLR 2021). The others, their rates, and the two mirrors are those of Wolfe and Kyrillidis,
Better Schedules for Low Precision Training of Deep Neural Networks (arXiv 2403.02243), as the code beside that paper
computes them. A profile rises; a falling cycle is its mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

EXPONENTIAL_RATE = 4.0
"""Of the exponential profile: it has covered half its way after 0.17 of a cycle, and 98 % at the end."""

DEMON_WEIGHT = 0.9
"""Of the demon profile: the decay rule of Demon with 0.9, turned round. The paper calls it REX, reflected exponential."""


def cosine(progress: float) -> float:
    """(1 + cos(pi z + pi)) / 2: slow at both ends."""
    return 0.5 * (1.0 + math.cos(math.pi * progress + math.pi))


def linear(progress: float) -> float:
    """z."""
    return progress


def exponential(progress: float) -> float:
    """1 - exp(-4 z): leaves the low end at once and stays near the high one, the dearest of the profiles."""
    return 1.0 - math.exp(-EXPONENTIAL_RATE * progress)


def demon(progress: float) -> float:
    """1 - (1 - z) / (1 - 0.9 + 0.9 (1 - z)): stays near the low end for most of a cycle, the cheapest of the profiles."""
    left = 1.0 - progress
    return 1.0 - left / (1.0 - DEMON_WEIGHT + DEMON_WEIGHT * left)


PROFILES: Mapping[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "exponential": exponential,
    "demon": demon,
}
"""By the name a recipe gives them: progress from 0 to 1 -> share of the way from low to high, 0 at 0, never falling."""


def level(profile: str, progress: float, *, falling: Literal["", "vertical", "horizontal"] = "") -> float:
    """How far a cycle is from its low end, from 0 to 1.

    Args:
        profile: key of ``PROFILES``.
        progress: of the cycle, from 0 to 1.
        falling: empty for a rising cycle; else how it is mirrored. ``vertical`` swaps high and low, 1 - g(z), so that
            the cycle lingers where the profile does, at the other end; ``horizontal`` runs it backwards, g(1 - z). For
            cosine and linear the two are the same.
    """
    rising = PROFILES[profile]
    if falling == "vertical":
        return 1.0 - rising(progress)
    return rising(1.0 - progress) if falling else rising(progress)
