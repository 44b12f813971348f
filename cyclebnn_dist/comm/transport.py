"""The transport: the two movements of an exchange, which carry bytes and know nothing of what they mean.

Gloo's ``all_to_all`` and ``all_gather`` leave one direction of a link idle for a part of the time, so on Gloo every message
goes by itself, all of them at once. NCCL has its own collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TAGS = 2**30


class Transfer:
    """One message from every rank of a group to this one, and as many from this one to them. Collective.

    On Gloo messages are awaited from the beginning, which spares their senders a question. Tensors must stay as they are
    until ``finish``.

    Args:
        incoming: uint8 ``[ranks * bytes]``: the messages of all ranks, in rank order.
        rank: of this process in ``group``.
        tag: a number that no other transfer of the group has that is under way; the same on all ranks.
    """

    def __init__(self, incoming: torch.Tensor, *, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        self.sent_bytes = 0
        self._incoming, self._rank, self._group, self._tag = incoming, rank, group, tag % _TAGS
        self._arrivals: list[dist.Work | None] = []
        self._departures: list[dist.Work | None] = []
        self._singly = dist.get_backend(group) == "gloo"
        # Those next in the circle first, so that no rank is everyone's first.
        size = group.size()
        self._peers = [(rank + distance) % size for distance in range(1, size)]
        if self._singly:
            messages = incoming.view(size, -1)
            self._arrivals = [
                dist.irecv(messages[peer], group=group, group_src=peer, tag=self._tag)
                for peer in reversed(self._peers)
            ]

    def send_each(self, outgoing: torch.Tensor, sizes: Sequence[int]) -> None:
        """Send every rank its own message.

        Args:
            outgoing: uint8, one message after the other, ``sizes[i]`` bytes for rank ``i``; every rank gets as many from
                each.
        """
        self.sent_bytes = sum(sizes) - sizes[self._rank]
        if self._singly:
            self._send(outgoing.split(list(sizes)))
            return
        received = [sizes[self._rank]] * len(sizes)
        self._arrivals = [
            dist.all_to_all_single(
                self._incoming, outgoing, received, list(sizes), group=self._group, async_op=True
            )
        ]

    def send_all(self, message: torch.Tensor) -> None:
        """Send all ranks the same message, uint8, as long on every rank."""
        self.sent_bytes = len(self._peers) * len(message)
        if self._singly:
            self._send([message] * (len(self._peers) + 1))
            return
        self._arrivals = [_all_gather(self._incoming, message, group=self._group, async_op=True)]

    def wait(self) -> None:
        """Return when everything for this rank is here; on a GPU, let its stream wait for that.

        Raises:
            RuntimeError: a peer is gone, or the group's timeout is over.
        """
        _wait(self._arrivals)

    def finish(self) -> None:
        """Return when everything has left, too."""
        _wait(self._departures)

    def _send(self, messages: Sequence[torch.Tensor]) -> None:
        self._departures = [
            dist.isend(messages[peer], group=self._group, group_dst=peer, tag=self._tag)
            for peer in self._peers
        ]
        self._incoming.view(len(messages), -1)[self._rank].copy_(messages[self._rank])


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
