"""A World for functions that run on the pool of test ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from cyclebnn_dist.world import World


def make_world(rank: int, size: int) -> World:
    """Collective: every rank calls this. The world of ranks whose default process group is ready."""
    return World(
        rank=rank,
        size=size,
        local_rank=rank,
        device=torch.device("cpu"),
        source="test",
        control=dist.new_group(backend="gloo"),
    )
