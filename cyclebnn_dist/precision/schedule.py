"""The precision schedule: how many bits each step uses, as a pure function of the global step."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import count
from typing import Literal

from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig
from cyclebnn_dist.precision.profiles import PROFILES, level

log = logging.getLogger(__name__)

_FORMULA = 2
"""Part of the digest; raised whenever a formula here or a profile changes what a step gets."""


@dataclass(frozen=True)
class Widths:
    """Bits of one step; 32 means not quantized, and 16 for communication means bfloat16."""

    forward_bits: int
    """Weights and activations of binary layers before their sign is taken."""
    backward_bits: int
    """Output gradient of binary layers."""
    communication_bits: int
    """Gradient all-reduce."""


@dataclass(frozen=True)
class Channel:
    """One width over the run.

    The first ``hold_steps`` steps stay at ``high``; then come ``cycles`` whole periods of ``period_steps`` steps. The
    steps that are left (fewer than ``cycles``) stay where the last cycle ended: at ``high``, so that a run never ends
    at its lowest width, or at ``low`` where reversed cycles are asked for. A period of 0 means constant.
    Where there are ``pieces``, (first step, bits) in ascending order from step 0 on, they say it all.
    """

    low: int
    high: int
    hold_steps: int = 0
    period_steps: int = 0
    cycles: int = 0
    profile: str = "cosine"
    shape: Literal["repeated", "triangular", "reversed"] = "repeated"
    mirror: Literal["vertical", "horizontal"] = "vertical"
    pieces: tuple[tuple[int, int], ...] = ()

    def at(self, step: int) -> int:
        """Bits of ``step``, counted from 0.

        B_t = rint(low + (high - low) * level(z)) with z = (t mod P) / P, rounding half to even. With the cosine profile
        and repeated cycles that is CPT's saw-tooth (Fu et al., ICLR 2021), rising from low to high in every period.
        Triangular cycles (arXiv 2403.02243) fall and rise in turn. There the first one falls and an even number is needed
        to end at high; here turns are counted from the last cycle, which rises.
        """
        if self.pieces:
            return self.pieces[max(0, bisect_right(self.pieces, step, key=lambda piece: piece[0]) - 1)][1]
        since = step - self.hold_steps
        if since < 0:
            return self.high
        if since >= self.cycles * self.period_steps:
            return self._end
        index, place = divmod(since, self.period_steps)
        falls = self.shape == "reversed" or (self.shape == "triangular" and (self.cycles - index) % 2 == 0)
        share = level(self.profile, place / self.period_steps, falling=self.mirror if falls else "")
        # A tie must not hang on the last digit of this machine's cosine: ranks may run on different processors.
        return round(round(self.low + (self.high - self.low) * share, 9))

    def first(self, num_steps: int) -> bytes:
        """Bits of the steps before ``num_steps``, one byte a step: as ``at``, without asking it for every cycle."""
        if self.pieces:
            starts = [min(start, num_steps) for start, _ in self.pieces] + [num_steps]
            return b"".join(
                bytes([bits]) * (end - start)
                for (_, bits), start, end in zip(self.pieces, starts, starts[1:], strict=False)
            )
        cycled = self.cycles * self.period_steps
        needed = min(cycled, max(0, num_steps - self.hold_steps), 2 * self.period_steps)  # down and up
        pair = bytes(self.at(self.hold_steps + since) for since in range(needed))
        repeats = -(-cycled // needed) if needed else 0
        cycles = (pair * repeats)[:cycled]
        begun = bytes([self.high]) * min(self.hold_steps, num_steps) + cycles
        return (begun + bytes([self._end]) * max(0, num_steps - len(begun)))[:num_steps]

    @property
    def _end(self) -> int:
        return self.low if self.shape == "reversed" and self.cycles else self.high


@dataclass(frozen=True)
class Schedule:
    """The widths of every step of a run of ``total_steps`` steps."""

    forward: Channel
    backward: Channel
    communication: Channel
    total_steps: int

    def at(self, step: int) -> Widths:
        """Widths of ``step``, counted from 0; steps beyond the run are at the width it ends with."""
        return Widths(self.forward.at(step), self.backward.at(step), self.communication.at(step))

    def counts(self, *, begin: int = 0) -> Counter[Widths]:
        """How many steps of the run, from ``begin`` on, use which widths."""
        channels = (self.forward, self.backward, self.communication)
        used = Counter(zip(*(channel.first(self.total_steps)[begin:] for channel in channels), strict=True))
        return Counter({Widths(*bits): steps for bits, steps in used.items()})

    def digest(self) -> int:
        """A number from 0 to 2**63 - 1, equal for equal schedules in every process and Python version.

        Beside the settings it holds what every profile gives at some places, so that code with other formulas differs.
        """
        probes = [[round(level(name, place / 64), 9) for place in range(64)] for name in sorted(PROFILES)]
        canonical = json.dumps([_FORMULA, asdict(self), probes], sort_keys=True, separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") >> 1


def build_schedule(
    precision: PrecisionConfig, *, total_steps: int, steps_per_epoch: int, warn: bool = True
) -> Schedule:
    """The schedule of a recipe.

    The cycles share the steps that warm-up leaves: each takes int(steps / cycles) of them. Where that is too few for a
    cycle to get off its low width (one step, or a few more between neighbouring widths), there are fewer cycles, as
    many as fit, and a warning: a short trial of a long recipe is then still a run with a cycle, and ends at its high width.

    Args:
        total_steps: optimizer steps of the whole run, at least 1.
        steps_per_epoch: optimizer steps of one pass over the training images.
        warn: whether to log a warning where cycles do not fit; one rank is enough.
    """
    if total_steps < 1 or steps_per_epoch < 1:
        raise ValueError(f"a run of {total_steps} steps with {steps_per_epoch} an epoch has no schedule")

    def channel(name: str, width: WidthConfig) -> Channel:
        if width.schedule == "piecewise":
            pieces = tuple((round(epoch * steps_per_epoch), bits) for epoch, bits in width.pieces)
            return Channel(low=width.low, high=width.high, pieces=pieces)
        if width.schedule == "constant" or width.low == width.high:
            return Channel(low=width.high, high=width.high)
        hold = min(total_steps, round(width.warmup_epochs * steps_per_epoch))
        steps = total_steps - hold
        shortest = _shortest_period(width)
        cycles = min(width.cycles, steps // shortest)
        if cycles < width.cycles and warn:
            log.warning(
                "precision.%s.cycles: %d cycles of at least %d steps do not fit into %d steps%s; %s",
                name,
                width.cycles,
                shortest,
                steps,
                " after warm-up" if hold else "",
                f"there will be {cycles}" if cycles else f"the width stays at {width.high} bits",
            )
        return Channel(
            low=width.low,
            high=width.high,
            hold_steps=hold,
            period_steps=steps // cycles if cycles else 0,
            cycles=cycles,
            profile=width.schedule,
            shape=width.shape,
            mirror=width.mirror,
        )

    return Schedule(
        forward=channel("forward", precision.forward),
        backward=channel("backward", precision.backward),
        communication=channel("communication", precision.communication),
        total_steps=total_steps,
    )


def _shortest_period(width: WidthConfig) -> int:
    """Steps a rising cycle needs at least for its last one to lie above the low width."""
    assert width.low < width.high

    def last(period: int) -> int:
        single = Channel(width.low, width.high, period_steps=period, cycles=1, profile=width.schedule)
        return single.at(period - 1)

    return next(period for period in count(1) if last(period) > width.low)
