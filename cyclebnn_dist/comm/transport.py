"""The transport: the two movements of an exchange, which carry bytes and know nothing of what they mean.

Gloo's ``all_to_all`` and ``all_gather`` leave one direction of a link idle for a part of the time, so on Gloo every message
goes by itself, all of them posted at once. NCCL has its own collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TAGS = 2**30


class Transfer:
    """Messages under way. Their tensors must stay as they are until ``finish``.

    ``sent_bytes`` is what goes to other ranks.
    """

    def __init__(
        self, sent_bytes: int, *, arrivals: Sequence[dist.Work] = (), departures: Sequence[dist.Work] = ()
    ) -> None:
        self.sent_bytes = sent_bytes
        self._arrivals = arrivals
        self._departures = departures

    def wait(self) -> None:
        """Return when everything for this rank is here; on a GPU, let its stream wait for that.

        Raises:
            RuntimeError: a peer is gone, or the group's timeout is over.
        """
        for work in self._arrivals:
            work.wait()

    def finish(self) -> None:
        """Return when everything has left, too."""
        for work in self._departures:
            work.wait()


def to_owners(
    outgoing: torch.Tensor,
    incoming: torch.Tensor,
    *,
    sizes: Sequence[int],
    rank: int,
    group: dist.ProcessGroup,
    tag: int,
) -> Transfer:
    """Collective: every rank calls this. Send message ``i`` of ``outgoing`` to rank ``i``.

    Args:
        outgoing: uint8, one message after the other, ``sizes[i]`` bytes for rank ``i``.
        incoming: uint8 ``[ranks * sizes[rank]]``: messages from all ranks, in rank order.
        tag: a number that no other transfer of the group has that is under way.
    """
    sent = sum(sizes) - sizes[rank]
    if dist.get_backend(group) != "gloo":
        work = dist.all_to_all_single(
            incoming,
            outgoing,
            output_split_sizes=[sizes[rank]] * len(sizes),
            input_split_sizes=list(sizes),
            group=group,
            async_op=True,
        )
        return Transfer(sent, arrivals=[work])
    return _send_each(
        outgoing.split(list(sizes)), incoming.view(len(sizes), -1), sent=sent, rank=rank, group=group, tag=tag
    )


def to_everyone(
    message: torch.Tensor, incoming: torch.Tensor, *, rank: int, group: dist.ProcessGroup, tag: int
) -> Transfer:
    """Collective: every rank calls this. Send ``message`` (uint8, as long on every rank) to all.

    Args:
        incoming: uint8 ``[ranks * len(message)]``: messages of all ranks, in rank order.
        tag: a number that no other transfer of the group has that is under way.
    """
    ranks, sent = len(incoming) // len(message), len(incoming) - len(message)
    if dist.get_backend(group) != "gloo":
        return Transfer(sent, arrivals=[_all_gather(incoming, message, group=group, async_op=True)])
    return _send_each([message] * ranks, incoming.view(ranks, -1), sent=sent, rank=rank, group=group, tag=tag)


def _send_each(
    outgoing: Sequence[torch.Tensor],
    incoming: torch.Tensor,
    *,
    sent: int,
    rank: int,
    group: dist.ProcessGroup,
    tag: int,
) -> Transfer:
    """One message to and from every other rank; those next in the circle first, so that no rank is everyone's first."""
    size = len(outgoing)
    after = [(rank + distance) % size for distance in range(1, size)]
    arrivals = [
        dist.irecv(incoming[peer], group=group, group_src=peer, tag=tag % _TAGS) for peer in reversed(after)
    ]
    departures = [dist.isend(outgoing[peer], group=group, group_dst=peer, tag=tag % _TAGS) for peer in after]
    incoming[rank].copy_(outgoing[rank])
    return Transfer(sent, arrivals=_present(arrivals), departures=_present(departures))


def _present(works: Sequence[dist.Work | None]) -> list[dist.Work]:
    return [work for work in works if work is not None]
