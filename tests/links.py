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
    send_each, free = transport._send_each, 0.0

    def slow(*args, sent, **kwargs):
        nonlocal free
        transfer = send_each(*args, sent=sent, **kwargs)
        free = left = max(free, time.perf_counter()) + sent / bytes_per_second
        arrived = transfer.wait

        def wait():
            arrived()
            time.sleep(max(0.0, left - time.perf_counter()))

        transfer.wait = wait
        return transfer

    transport._send_each = slow
    try:
        yield
    finally:
        transport._send_each = send_each


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
