"""The traffic: how many bytes the all-reduce of a model's gradients hands to the network, without sending any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cyclebnn_dist.comm.codec import scale_bytes
from cyclebnn_dist.comm.coding import CodecName
from cyclebnn_dist.comm.counters import Counters
from cyclebnn_dist.comm.hierarchy import build_hierarchical_plan, near_width
from cyclebnn_dist.comm.layout import Layout
from cyclebnn_dist.comm.plan import build_plan


def count_step(
    layout: Layout,
    buckets: Iterable[Sequence[int]],
    *,
    bits: int,
    codec: CodecName,
    rank: int = 0,
    steps: int = 1,
) -> Counters:
    """What the counters of ``rank`` gain in ``steps`` steps of ``bits`` bits; their seconds stay 0.

    Sizes are those of the plans that the reducer follows. In the first phase a rank keeps its own message, in the
    second one it sends the largest owner's size to every other rank; see ``transport``.

    Args:
        buckets: indices of the parameters that travel together, as DDP groups them.
    """
    counters = Counters()
    others = layout.world_size - 1
    if others == 0:
        return counters
    for indices in buckets:
        if layout.ranks_per_node > 1:
            sent, far = _hierarchical_bytes(layout, indices, bits=bits, codec=codec, rank=rank)
            numel = sum(layout.parameters[index].numel for index in indices)
            counters.add_exchange(
                sent_bytes=steps * sent,
                far_bytes=steps * far,
                numel=steps * numel,
                world_size=layout.world_size,
            )
            continue
        plan, answers = (
            build_plan(
                layout,
                indices,
                bits=width,
                scale_bytes=scale_bytes(codec, width),
                rank=rank,
                device=torch.device("cpu"),
            )
            for width in (bits, layout.mean_width(bits))
        )
        sent = sum(plan.sizes) - plan.sizes[rank] + others * answers.padded_size
        counters.add_exchange(sent_bytes=steps * sent, numel=steps * plan.numel, world_size=layout.world_size)
    return counters


def _hierarchical_bytes(
    layout: Layout, indices: Sequence[int], *, bits: int, codec: CodecName, rank: int
) -> tuple[int, int]:
    """Bytes that ``rank`` sends in all and to other nodes; see ``hierarchy``."""
    plan = build_hierarchical_plan(
        layout,
        indices,
        bits=bits,
        scale_bytes={
            width: scale_bytes(codec, width) for width in (bits, near_width(bits), layout.mean_width(bits))
        },
        rank=rank,
        rotated=False,
        device=torch.device("cpu"),
    )
    node, place = divmod(rank, layout.ranks_per_node)
    num_nodes = layout.world_size // layout.ranks_per_node
    far = sum(plan.far_sizes) - plan.far_sizes[node] + (num_nodes - 1) * plan.padded_size
    near = sum(plan.near_sizes) - plan.near_sizes[place]
    return near + far + (layout.ranks_per_node - 1) * num_nodes * plan.padded_size, far
