"""The precision schedule: how many bits each step uses, as a pure function of the global step."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig

_FORMULA = 1
"""Part of the digest; raised whenever a formula below changes what a step gets."""


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

    The first ``hold_steps`` steps stay at ``high``; then come ``cycles`` whole periods of ``period_steps`` steps, and
    the steps that are left (fewer than ``cycles``) stay at ``high``, so that a run never ends at its lowest width.
    A period of 0 means constant.
    """

    low: int
    high: int
    hold_steps: int
    period_steps: int
    cycles: int

    def at(self, step: int) -> int:
        """Bits of ``step``, counted from 0: CPT's saw-tooth cosine, rising from low to high in every period.

        B_t = rint(low + (high - low) / 2 * (1 + cos(pi * (t mod P) / P + pi))), rounding half to even
        (Fu et al., CPT: Efficient Deep Neural Network Training via Cyclic Precision, ICLR 2021).
        """
        since = step - self.hold_steps
        if self.period_steps == 0 or not 0 <= since < self.cycles * self.period_steps:
            return self.high
        progress = (since % self.period_steps) / self.period_steps
        bits = self.low + 0.5 * (self.high - self.low) * (1.0 + math.cos(math.pi * progress + math.pi))
        # A tie must not hang on the last digit of this machine's cosine: ranks may run on different processors.
        return round(round(bits, 9))


@dataclass(frozen=True)
class Schedule:
    """The widths of every step of a run of ``total_steps`` steps."""

    forward: Channel
    backward: Channel
    communication: Channel
    total_steps: int

    def at(self, step: int) -> Widths:
        """Widths of ``step``, counted from 0; steps beyond the run are at the high width."""
        return Widths(self.forward.at(step), self.backward.at(step), self.communication.at(step))

    def digest(self) -> int:
        """A number from 0 to 2**63 - 1, equal for equal schedules in every process and Python version."""
        canonical = json.dumps([_FORMULA, asdict(self)], sort_keys=True, separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") >> 1


def build_schedule(precision: PrecisionConfig, *, total_steps: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a recipe.

    The cycles share the steps that warm-up leaves: each takes int(steps / cycles) of them. Where there are fewer steps
    than cycles every step is a cycle of its own, at the low width.

    Args:
        total_steps: optimizer steps of the whole run, at least 1.
        steps_per_epoch: optimizer steps of one pass over the training images.
    """
    if total_steps < 1 or steps_per_epoch < 1:
        raise ValueError(f"a run of {total_steps} steps with {steps_per_epoch} an epoch has no schedule")

    def channel(width: WidthConfig) -> Channel:
        if width.schedule == "constant" or width.low == width.high:
            return Channel(low=width.high, high=width.high, hold_steps=0, period_steps=0, cycles=0)
        hold = min(total_steps, round(width.warmup_epochs * steps_per_epoch))
        steps = total_steps - hold
        cycles = min(width.cycles, steps)
        period = steps // cycles if cycles else 0
        return Channel(low=width.low, high=width.high, hold_steps=hold, period_steps=period, cycles=cycles)

    return Schedule(
        forward=channel(precision.forward),
        backward=channel(precision.backward),
        communication=channel(precision.communication),
        total_steps=total_steps,
    )
