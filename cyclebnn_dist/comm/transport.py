"""The transport: the two collectives of an exchange, which move bytes and know nothing of what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def to_owners(
    outgoing: torch.Tensor,
    incoming: torch.Tensor,
    *,
    sizes: Sequence[int],
    rank: int,
    group: dist.ProcessGroup,
) -> int:
    """Collective: every rank calls this. Send message ``i`` of ``outgoing`` to rank ``i``.

    Args:
        outgoing: uint8, one message after the other, ``sizes[i]`` bytes for rank ``i``.
        incoming: uint8 ``[ranks * sizes[rank]]``: messages from all ranks, in rank order.

    Returns:
        bytes that went to other ranks.
    """
    dist.all_to_all_single(
        incoming,
        outgoing,
        output_split_sizes=[sizes[rank]] * len(sizes),
        input_split_sizes=list(sizes),
        group=group,
    )
    return sum(sizes) - sizes[rank]


def to_everyone(message: torch.Tensor, incoming: torch.Tensor, *, group: dist.ProcessGroup) -> int:
    """Collective: every rank calls this. Send ``message`` (uint8, as long on every rank) to all.

    Args:
        incoming: uint8 ``[ranks * len(message)]``: messages of all ranks, in rank order.

    Returns:
        bytes that went to other ranks.
    """
    _all_gather(incoming, message, group=group)
    return len(incoming) - len(message)
