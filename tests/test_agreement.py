"""Without these, ranks that were about to do different things would train on garbage or hang."""

import pytest
import torch
from torch import nn
from worlds import make_world

from cyclebnn_dist.agreement import Agreement, compare_parameters, digest

CONSTANTS = {
    "recipe": 11,
    "teachers": "resnet18 0123456789ab",
    "schedule": 12,
    "communication mode": "quantized",
    "parameter layout": 13,
    "codec": 14,
    "backend": "numba over gloo",
    "library versions": "torch 2.13.0",
}


def exchange(rank, size, field, by_rank):
    """Run two steps of the agreement in which ``field`` has the value of ``by_rank``; return messages or flags."""
    value = by_rank[rank]
    changed = {field: value} if field in CONSTANTS else {}
    world = make_world(rank, size)
    agreement = Agreement(world, CONSTANTS | changed, timeout_seconds=10.0)
    messages = []
    try:
        agreement.compare_constants()
    except RuntimeError as error:
        messages.append(str(error))
    try:
        stops = []
        for step in (0, 1):
            agreement.begin(
                value + step if field == "step" else step,
                widths=value if field == "widths" else digest("w"),
                stop=step == 1 and field == "stop" and bool(value),
                writing=step == 0 and field == "writing" and bool(value),
            )
            stops.append(tuple(agreement.finish()))
    except RuntimeError as error:
        return [*messages, str(error)]
    return stops


@pytest.mark.parametrize("field", [*CONSTANTS, "step", "widths"])
def test_a_difference_stops_every_rank_and_names_who_differs_in_what(ranks, field):
    values = [f"version {n}" for n in (7, 8, 7)] if isinstance(CONSTANTS.get(field), str) else [7, 8, 7]
    of_ranks = ranks(3, exchange, field, values)
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]
    assert len(of_ranks[0]) == (2 if field in CONSTANTS else 1), (
        "at the start if it can be, and at every step"
    )
    for message in of_ranks[0]:
        assert f"ranks disagree in {field}; all ranks stop" in message
        assert f"{values[0]} on ranks 0, 2" in message
        assert f"{values[1]} on rank 1" in message


def test_ranks_that_agree_go_on_and_what_one_asks_or_does_all_know(ranks):
    nothing, stop, writing = (False, False), (True, False), (False, True)
    assert ranks(3, exchange, "none", [0, 0, 0]) == [[nothing, nothing]] * 3
    assert ranks(3, exchange, "stop", [0, 1, 0]) == [[nothing, stop]] * 3
    assert ranks(3, exchange, "writing", [0, 0, 1]) == [[writing, nothing]] * 3


def fall_behind(rank, size):
    """Rank 1 leaves out one step by itself, as a loop that skips a bad batch would."""
    agreement = Agreement(make_world(rank, size), CONSTANTS, timeout_seconds=10.0)
    for step in range(6):
        if rank == 1 and step == 3:
            continue
        agreement.begin(step, widths=5, stop=False)
        try:
            agreement.finish()
        except RuntimeError as error:
            return str(error)
    return None


def test_a_rank_that_left_out_a_step_is_found_at_once(ranks):
    (message,) = set(ranks(3, fall_behind))
    assert "disagree in step;" in message
    assert "3 on ranks 0, 2; 4 on rank 1" in message


def vote(rank, size, bad):
    agreement = Agreement(make_world(rank, size), CONSTANTS, timeout_seconds=10.0)
    return [agreement.all_finite(rank != bad), agreement.all_finite(True)]


def test_one_rank_with_a_bad_gradient_makes_all_skip(ranks):
    assert ranks(3, vote, 2) == [[False, True]] * 3
    assert ranks(1, vote, 0) == [[False, True]]


def drift(rank, size, drifting):
    world = make_world(rank, size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    if rank == drifting:
        with torch.no_grad():
            model[1].bias[2] = -0.0
    try:
        compare_parameters(model, world=world, step=5)
    except RuntimeError as error:
        return str(error)
    return ""


def test_one_bit_of_drift_is_found_on_every_rank(ranks):
    assert ranks(2, drift, -1) == ["", ""]
    messages = ranks(2, drift, 1)
    assert len(set(messages)) == 1
    assert "rank 1 differs from rank 0 in 1 tensors, first in 1.bias" in messages[0]
