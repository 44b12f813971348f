"""Without these an evaluation would change the run it measures, or each rank would evaluate another model."""

import torch
from torch import nn
from worlds import make_world

from cyclebnn_dist.buffers import averaged_buffers, model_state, using_buffers


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("width", torch.tensor(4.0), persistent=False)


def average(rank, size):
    world = make_world(rank, size)
    model = Network()
    model.norm.running_mean.fill_(float(rank))
    model.norm.num_batches_tracked.fill_(17)
    buffers = averaged_buffers(model, world=world)
    with using_buffers(model, buffers):
        inside = model.norm.running_mean.tolist()
    after = model.norm.running_mean.tolist()
    state = model_state(model, buffers)
    return (
        inside,
        after,
        state["norm.running_mean"].tolist(),
        int(state["norm.num_batches_tracked"]),
        sorted(buffers),
    )


def test_buffers_are_averaged_for_evaluation_and_come_back_untouched(ranks):
    for rank, (inside, after, saved, batches, names) in enumerate(ranks(3, average)):
        assert inside == saved == [1.0, 1.0, 1.0]
        assert after == [float(rank)] * 3
        assert batches == 17
        assert "width" not in names
