"""The cost of training at given widths, in CPT's measure: multiply-accumulates weighted by the bits of both operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from cyclebnn_dist.precision.schedule import Widths

FULL_BITS = 32


class CountedMacs(Protocol):
    """Multiply-accumulates of one forward pass on one image, as ``binary.count`` gives them."""

    @property
    def scheduled_macs(self) -> int:
        """In layers whose operands have the schedule's widths."""

    @property
    def unscheduled_macs(self) -> int:
        """In everything else, which trains at full cost."""


class TrainingSaving(NamedTuple):
    """Training operations saved against training everything at 32 bits, as fractions of 1."""

    binary_layers: float
    """Of the layers that follow the schedule, alone: the figure papers quote."""
    model: float
    """Of the whole model, its other layers at full cost."""


def training_cost_fraction(widths: Widths) -> float:
    """Cost of a training step of one layer at ``widths``, as a fraction of its cost at 32 bits.

    A layer multiplies three times: forward (forward x forward bits), and in the backward pass the output gradient with
    the weights and with the activations (forward x backward bits each). CPT (ICLR 2021) charges a product of operands
    of m and n bits m/32 * n/32 multiply-accumulates: (b_f^2 + 2 b_f b_g) / 3 / 32^2. Communication has no part in it.
    """
    forward, backward = widths.forward_bits, widths.backward_bits
    return (forward * forward + 2 * forward * backward) / 3 / FULL_BITS**2


def mean_training_cost(steps: Mapping[Widths, int]) -> float:
    """Mean of ``training_cost_fraction`` over steps, given how many ran at which widths; 1 for no steps."""
    total = sum(steps.values())
    if total == 0:
        return 1.0
    return sum(training_cost_fraction(widths) * count for widths, count in steps.items()) / total


def training_saving(
    counts: CountedMacs, steps: Mapping[Widths, int], *, full_steps: int = 0
) -> TrainingSaving:
    """Training operations saved by the widths that ran, against 32 bits throughout.

    CPT's own tables compare to a static schedule at the high width instead: 1 - mean cost / cost(high, backward).

    Args:
        counts: multiply-accumulates of the model by layer kind.
        steps: number of steps at each set of widths.
        full_steps: further steps that count as if nothing was quantized: those of a first phase with real weights,
            whatever the width of their inputs.
    """
    unquantized = Widths(FULL_BITS, FULL_BITS, FULL_BITS)
    cost = mean_training_cost({**steps, unquantized: steps.get(unquantized, 0) + full_steps})
    scheduled, unscheduled = counts.scheduled_macs, counts.unscheduled_macs
    if scheduled == 0:
        return TrainingSaving(binary_layers=0.0, model=0.0)
    return TrainingSaving(
        binary_layers=1.0 - cost, model=(1.0 - cost) * scheduled / (scheduled + unscheduled)
    )
