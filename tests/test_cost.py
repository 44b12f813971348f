"""The cost of training at given widths, against the figures CPT and CycleBNN publish."""

from collections import Counter
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


def steps_of(low, high, backward, *, cycles, total_steps=64000):
    precision = PrecisionConfig(
        forward=WidthConfig(low=low, high=high, cycles=cycles),
        backward=WidthConfig(schedule="constant", low=backward, high=backward),
    )
    schedule = build_schedule(precision, total_steps=total_steps, steps_per_epoch=500)
    return Counter(map(schedule.at, range(total_steps)))


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
