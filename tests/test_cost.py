"""The cost of training at given widths, against the figures CPT and CycleBNN publish."""

from dataclasses import dataclass

import pytest

from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig
from cyclebnn_dist.precision import (
    Widths,
    build_schedule,
    mean_training_cost,
    training_cost_fraction,
    training_saving,
)
from cyclebnn_dist.precision.profiles import PROFILES


def steps_of(low, high, backward, *, cycles, total_steps=64000, **width):
    precision = PrecisionConfig(
        forward=WidthConfig(low=low, high=high, cycles=cycles, **width),
        backward=WidthConfig(schedule="constant", low=backward, high=backward),
    )
    schedule = build_schedule(precision, total_steps=total_steps, steps_per_epoch=500)
    return schedule.counts()


@dataclass
class Macs:
    scheduled_macs: int
    unscheduled_macs: int


def test_full_precision_costs_one():
    assert training_cost_fraction(Widths(32, 32, 2)) == 1.0
    assert training_cost_fraction(Widths(8, 8, 32)) == 1 / 16


@pytest.mark.parametrize(("low", "published"), [(3, 36.7), (4, 30.1)])
def test_cpt_saves_what_it_publishes_against_its_static_width(low, published):
    cost = mean_training_cost(steps_of(low, 8, 8, cycles=32))
    saving = 1 - cost / training_cost_fraction(Widths(8, 8, 8))
    assert round(100 * saving, 1) == published


FALLING = [("repeated", "vertical"), ("triangular", "vertical"), ("triangular", "horizontal")]


def test_the_ten_schedules_of_2403_02243_are_ten_in_three_groups_of_cost():
    """Four profiles repeated, and triangular by both mirrors, which for two of them are one: its authors' ten.

    At their 3 to 8 bits with gradients at 8, in 8 cycles: what lingers at one end must be cheap or dear by it.
    """
    sequences, costs = set(), {}
    for profile in PROFILES:
        for shape, mirror in FALLING:
            width = {"schedule": profile, "shape": shape, "mirror": mirror}
            forward = WidthConfig(low=3, high=8, cycles=8, **width)
            schedule = build_schedule(
                PrecisionConfig(forward=forward), total_steps=64000, steps_per_epoch=500
            )
            sequences.add(schedule.forward.first(64000))
            cost = mean_training_cost(steps_of(3, 8, 8, cycles=8, **width))
            costs[profile, shape, mirror] = 1 - cost / training_cost_fraction(Widths(8, 8, 8))
    assert len(sequences) == 10
    cheap = {("demon", "repeated", "vertical"), ("demon", "triangular", "horizontal")}
    dear = {("exponential", "repeated", "vertical"), ("exponential", "triangular", "horizontal")}
    for key, saving in costs.items():
        expected = 0.601 if key in cheap else 0.178 if key in dear else 0.367
        assert saving == pytest.approx(expected, abs=0.006), key


def test_cyclebnn_schedule_saves_97_percent_of_its_layers_operations():
    saving = training_saving(Macs(1000, 0), steps_of(2, 6, 8, cycles=8))
    assert saving.binary_layers == pytest.approx(0.9732, abs=1e-4)
    assert saving.model == saving.binary_layers


def test_real_layers_are_charged_in_full():
    """A saving of the binary layers must not be read as one of the whole model."""
    steps = {Widths(8, 8, 2): 10}
    saving = training_saving(Macs(scheduled_macs=300, unscheduled_macs=100), steps)
    assert saving.binary_layers == 15 / 16
    assert saving.model == pytest.approx(1 - (300 / 16 + 100) / 400)


def test_nothing_scheduled_saves_nothing():
    assert training_saving(Macs(0, 100), {Widths(2, 2, 2): 5}) == (0.0, 0.0)


def test_steps_count_by_how_often_they_ran():
    steps = {Widths(32, 32, 32): 3, Widths(8, 8, 8): 1}
    assert mean_training_cost(steps) == pytest.approx((3 + 1 / 16) / 4)
    assert mean_training_cost({}) == 1.0
