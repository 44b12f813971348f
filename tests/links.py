"""Links below the transport: a slow one, whose rate is known on any machine, and one that counts what torch is given to send."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from cyclebnn_dist.comm import transport


@contextmanager
def slow_link(bytes_per_second: float) -> Iterator[None]:
    """Within it, what a rank sends to others leaves at this rate, one transfer after the other, and nothing arrives before."""
    send, wait, free = transport.Transfer._send, transport.Transfer.wait, 0.0

    def slow_send(self, messages):
        nonlocal free
        send(self, messages)
        free = self.left = max(free, time.perf_counter()) + self.sent_bytes / bytes_per_second

    def slow_wait(self):
        wait(self)
        time.sleep(max(0.0, self.left - time.perf_counter()))

    transport.Transfer._send, transport.Transfer.wait = slow_send, slow_wait
    try:
        yield
    finally:
        transport.Transfer._send, transport.Transfer.wait = send, wait


@contextmanager
def counted_bytes() -> Iterator[dict[object, int]]:
    """Within it, bytes given to torch to be sent to others, by process group."""
    counted: dict[object, int] = defaultdict(int)
    isend = transport.dist.isend

    def counting(tensor, *, group, **kwargs):
        counted[group] += tensor.numel() * tensor.element_size()
        return isend(tensor, group=group, **kwargs)

    transport.dist.isend = counting
    try:
        yield counted
    finally:
        transport.dist.isend = isend
