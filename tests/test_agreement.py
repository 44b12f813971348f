"""Without these, ranks that were about to do different things would train on garbage or hang."""

import pytest
import torch
from torch import nn
from worlds import make_world

from cyclebnn_dist.agreement import Agreement, compare_parameters, digest


def exchange(rank, size, field, by_rank):
    """Run two steps of the agreement in which ``field`` has the value of ``by_rank``; return messages or flags."""
    world = make_world(rank, size)
    constants = {"recipe": 11, "parameter layout": 12, "codec": 13, "communication mode": 14}
    value = by_rank[rank]
    if field in constants:
        constants[field] = value
    agreement = Agreement(world, constants, timeout_seconds=60.0)
    try:
        stops = []
        for step in (0, 1):
            agreement.begin(
                value + step if field == "step" else step,
                widths=value if field == "widths" else digest("w"),
                stop=step == 1 and field == "stop" and bool(value),
            )
            stops.append(agreement.finish())
    except RuntimeError as error:
        return str(error)
    return stops


@pytest.mark.parametrize(
    "field", ["recipe", "communication mode", "parameter layout", "codec", "step", "widths"]
)
def test_a_difference_stops_every_rank_and_names_who_differs_in_what(ranks, field):
    messages = ranks(3, exchange, field, [7, 8, 7])
    assert len(set(messages)) == 1
    assert f"disagree in {field}" in messages[0]
    assert "7 on ranks 0, 2" in messages[0]
    assert "8 on rank 1" in messages[0]


def test_ranks_that_agree_go_on_and_one_request_stops_all(ranks):
    assert ranks(3, exchange, "none", [0, 0, 0]) == [[False, False]] * 3
    assert ranks(3, exchange, "stop", [0, 1, 0]) == [[False, True]] * 3


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
