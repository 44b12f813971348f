"""The limits of an all-reduce: how fast the network carries bytes, and how fast these cores encode and decode them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cyclebnn_dist.comm import reducer as reducer_module
from cyclebnn_dist.world import World, gather_objects

FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 28


def link_rate(world: World, *, seconds: float = 3.0) -> float:
    """Collective: every rank calls this. Bytes a second that a rank sends while all send to all and receive as much.

    The faster of two ways counts: all messages at once, and one after the other, each rank to the next one in the circle,
    then the one after it. The first fills all links of a node, the second keeps senders out of each other's way. The amount
    grows until all takes about ``seconds``; the slowest rank counts.
    """
    return max(_rate(world, at_once=at_once, seconds=seconds / 4) for at_once in (True, False))


def _rate(world: World, *, at_once: bool, seconds: float) -> float:
    peers = world.size - 1
    sent, slowest = FIRST_BYTES, _exchange_bytes(world, FIRST_BYTES, at_once=at_once)
    while slowest < 0.5 * seconds and sent < MOST_BYTES:
        sent = int(min(MOST_BYTES, sent * min(8.0, max(2.0, seconds / slowest))))
        slowest = _exchange_bytes(world, sent, at_once=at_once)
    # A connection that was idle begins slowly, so the second time may be the better one.
    slowest = min(slowest, _exchange_bytes(world, sent, at_once=at_once))
    return sent // peers * peers / slowest


def _exchange_bytes(world: World, sent: int, *, at_once: bool) -> float:
    """Seconds that the slowest rank took to send ``sent`` bytes, divided evenly over its peers."""
    size = sent // (world.size - 1)
    outgoing = torch.zeros(size, dtype=torch.uint8, device=world.device)
    incoming = [torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(world.size - 1)]
    pairs = [
        [
            dist.P2POp(dist.irecv, each, (world.rank - distance) % world.size),
            dist.P2POp(dist.isend, outgoing, (world.rank + distance) % world.size),
        ]
        for distance, each in enumerate(incoming, start=1)
    ]
    dist.barrier(group=world.control)
    begun = time.perf_counter()
    for operations in [[each for pair in pairs for each in pair]] if at_once else pairs:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    wait_for_device(world.device)
    return max(gather_objects(world, time.perf_counter() - begun))


@dataclass
class Silence:
    """Seconds that copying took in place of sending: of the clock, and of the copying thread's core."""

    copy_seconds: float = 0.0
    copy_core_seconds: float = 0.0


@contextmanager
def silent_network() -> Iterator[Silence]:
    """Let every reducer of this process exchange with itself: it gets its own messages back, as if all ranks had sent them.

    What remains of an all-reduce is the work of its codec. Values are meaningless.
    """
    silence, transfer = Silence(), reducer_module.Transfer

    @contextmanager
    def copying() -> Iterator[None]:
        clock, core = time.perf_counter(), time.thread_time()
        yield
        silence.copy_seconds += time.perf_counter() - clock
        silence.copy_core_seconds += time.thread_time() - core

    class SilentTransfer:
        sent_bytes = 0

        def __init__(self, incoming: torch.Tensor, *, rank: int, **_: object) -> None:
            self._incoming, self._rank = incoming, rank

        def send_each(self, outgoing: torch.Tensor, sizes: Sequence[int]) -> None:
            self.send_all(outgoing.split(list(sizes))[self._rank])

        def send_all(self, message: torch.Tensor) -> None:
            with copying():
                self._incoming.view(-1, len(message)).copy_(message)

        def wait(self) -> None:
            pass

        def finish(self) -> None:
            pass

    reducer_module.Transfer = SilentTransfer  # type: ignore[assignment,misc]
    try:
        yield silence
    finally:
        reducer_module.Transfer = transfer  # type: ignore[misc]


def codec_seconds(world: World, reduce: Callable[[], None]) -> tuple[float, float]:
    """Collective: every rank calls this. What ``reduce`` takes without a network, on all ranks at once.

    Returns:
        seconds of this rank by the clock, and of all its cores together; copying in place of sending is not counted.
    """
    dist.barrier(group=world.control)
    with silent_network() as silence:
        clock, core = time.perf_counter(), time.process_time()
        reduce()
        wait_for_device(world.device)
        clock, core = time.perf_counter() - clock, time.process_time() - core
    return clock - silence.copy_seconds, core - silence.copy_core_seconds


def wait_for_device(device: torch.device) -> None:
    """Return when everything that was enqueued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
