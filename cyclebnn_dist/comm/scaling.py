"""The scaling model: how long a step takes on clusters of any size, and how much of its communication shows.

The simplest model that has the parts that matter; arithmetic alone, no torch. Every rank computes equally long at every
size. The backward pass is two thirds of a step's last forward and backward pass; a bucket may leave when that share of the
gradient is done which it and the buckets before it hold; exchanges follow one another in a queue of one, beside the
computation and without slowing it. What of the queue is left when the backward pass ends is exposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cyclebnn_dist.comm.breakeven import CodecCost, Link, Load, exchange_seconds

BACKWARD_SHARE = 2 / 3
"""Of a pass: a backward multiplies twice where the forward multiplies once."""


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike.

    Attributes:
        nodes, gpus_per_node: a rank a GPU.
        network_bytes_per_second: of a node's link in each direction; the ranks of a node share it.
        intra_bytes_per_second: of a rank to the others of its node, in each direction.
        message_seconds: latency of one message.
    """

    nodes: int
    gpus_per_node: int
    network_bytes_per_second: float
    intra_bytes_per_second: float
    message_seconds: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def link(self) -> Link:
        """What a rank sees of it: it sends equally much to every other rank, inside and outside its node at once.

        Each of the two phases is as many messages as there are other ranks.
        """
        others = self.world_size - 1
        inside = (self.gpus_per_node - 1) / others if others else 0.0
        outside = self.gpus_per_node * (1 - inside) if self.nodes > 1 else 0.0
        byte_seconds = max(inside / self.intra_bytes_per_second, outside / self.network_bytes_per_second)
        rate = 1 / byte_seconds if byte_seconds else self.intra_bytes_per_second
        return Link(latency_seconds=2 * others * self.message_seconds, bytes_per_second=rate)


def exposed_seconds(exchanges: Sequence[tuple[float, float]], *, backward_seconds: float) -> float:
    """What a queue of exchanges still has to do when the backward pass ends.

    Args:
        exchanges: in order, (share of the backward pass after which it may begin, seconds it takes).
    """
    end = 0.0
    for ready, seconds in exchanges:
        end = max(end, ready * backward_seconds) + seconds
    return max(0.0, end - backward_seconds)


def step_exposure(
    loads: Sequence[Load],
    costs: Mapping[int, CodecCost],
    link: Link,
    *,
    world_size: int,
    compute_seconds: float,
    overlap: bool,
    passes: int = 1,
) -> float:
    """Seconds of a step's exchanges that the backward pass does not hide.

    Args:
        loads: of the step's buckets, in the order in which they leave.
        overlap: whether codec and link overlap within a bucket; those of different buckets do not, which is a little
            pessimistic.
        compute_seconds: of all forward and backward passes of the step.
        passes: how many there are (``train.accumulation``); gradients leave during the last one only.
    """
    if world_size == 1:
        return 0.0
    backward = BACKWARD_SHARE * compute_seconds / passes
    whole = sum(sum(load.elements.values()) for load in loads)
    exchanges, done = [], 0
    for load in loads:
        done += sum(load.elements.values())
        seconds = exchange_seconds(load, costs, link, world_size=world_size, overlap=overlap)
        exchanges.append((done / whole, seconds))
    return exposed_seconds(exchanges, backward_seconds=backward)
