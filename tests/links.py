"""A slow link below the transport: every rank sleeps for the bytes it sends to others. Its rate is known on any machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cyclebnn_dist.comm import transport


@contextmanager
def slow_link(bytes_per_second: float, *, rank: int) -> Iterator[None]:
    """Within it, each rank's collectives of both phases last at least as long as its bytes take at this rate."""
    exchange, gather = transport.dist.all_to_all_single, transport._all_gather

    def slow_exchange(output, input_, output_split_sizes, input_split_sizes, group):
        begun = time.perf_counter()
        exchange(output, input_, output_split_sizes, input_split_sizes, group=group)
        linger(begun, sum(input_split_sizes) - input_split_sizes[rank])

    def slow_gather(output, input_, group):
        begun = time.perf_counter()
        gather(output, input_, group=group)
        linger(begun, output.numel() - input_.numel())

    def linger(begun: float, sent: int) -> None:
        time.sleep(max(0.0, begun + sent / bytes_per_second - time.perf_counter()))

    transport.dist.all_to_all_single, transport._all_gather = slow_exchange, slow_gather
    try:
        yield
    finally:
        transport.dist.all_to_all_single, transport._all_gather = exchange, gather
