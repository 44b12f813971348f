"""The break-even: where fewer bytes are less time, given what a link and a codec do. Arithmetic alone, no torch.

An exchange of a bucket of n elements among N ranks takes

    n (e + o / N) + N m   codec: e per element encoded, added and decoded once, o per element of a rank's own share
                          encoded again, m per message added up
    + l + s / B           link: l however few bytes, s bytes sent by a rank at B bytes a second

where both are done one after the other, as on a GPU. Where they overlap (on a CPU), the longer of the two hides the shorter
but for one chunk of it. ``bf16`` and ``fp32`` take the same path, with casts for a codec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["fp32", "bf16", "quantized"]

MODE_BITS: dict[Mode, int] = {"fp32": 32, "bf16": 16}
"""Widths of the plain modes; ``quantized`` has those of the schedule."""

MARGIN = 0.05
"""How much faster than a more exact mode one must be to be chosen: about what such a short measurement scatters by."""

SLOWEST, FASTEST = 1e4, 1e13
"""Bytes a second between which a break-even is searched for."""


@dataclass(frozen=True)
class Link:
    """What the network does with both phases of an exchange.

    Attributes:
        latency_seconds: of an exchange of next to nothing.
        bytes_per_second: that a rank sends to others while all ranks do.
    """

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class CodecCost:
    """What one width costs a rank.

    Attributes:
        element_seconds: per element of the gradient: encoded, added to a sum and decoded once each.
        owned_seconds: per element of the rank's own share: its mean encoded again.
        message_seconds: per message added up, however short: calls and launches.
    """

    element_seconds: float
    owned_seconds: float
    message_seconds: float = 0.0


@dataclass(frozen=True)
class Load:
    """One bucket at one width.

    Attributes:
        elements: how many elements travel at which bits; small tensors have a width of their own.
        sent_bytes: what a rank hands to the network in both phases.
        chunks: how many it is cut into where codec and link overlap.
    """

    elements: Mapping[int, int]
    sent_bytes: int
    chunks: int = 1


def codec_seconds(load: Load, costs: Mapping[int, CodecCost], *, world_size: int) -> float:
    """Seconds a rank encodes, adds and decodes for one bucket.

    Args:
        costs: by bits, for every width in ``load.elements``.
    """
    total = 0.0
    for bits, elements in load.elements.items():
        if elements:
            cost = costs[bits]
            total += elements * (cost.element_seconds + cost.owned_seconds / world_size)
            total += world_size * cost.message_seconds
    return total


def exchange_seconds(
    load: Load, costs: Mapping[int, CodecCost], link: Link, *, world_size: int, overlap: bool
) -> float:
    """Seconds from a bucket's first byte encoded to its last one decoded.

    Args:
        overlap: whether one chunk is encoded while others travel.
    """
    codec = codec_seconds(load, costs, world_size=world_size)
    wire = load.sent_bytes / link.bytes_per_second
    hidden = min(codec, wire) * (1 - 1 / load.chunks) if overlap else 0.0
    return link.latency_seconds + codec + wire - hidden


def step_seconds(
    loads: Sequence[Load], costs: Mapping[int, CodecCost], link: Link, *, world_size: int, overlap: bool
) -> float:
    """Seconds of the exchanges of all buckets of a step, all of them ready at once."""
    if overlap:
        loads = [_join(loads)]
    return sum(exchange_seconds(load, costs, link, world_size=world_size, overlap=overlap) for load in loads)


def _join(loads: Sequence[Load]) -> Load:
    elements: dict[int, int] = {}
    for load in loads:
        for bits, count in load.elements.items():
            elements[bits] = elements.get(bits, 0) + count
    return Load(elements, sum(load.sent_bytes for load in loads), sum(load.chunks for load in loads))


def schedule_mean(seconds: Mapping[int, float], steps: Mapping[int, int]) -> float:
    """Mean over a run of what a step of each width takes.

    Args:
        seconds: of a step, by bits.
        steps: how many steps of the run have these bits.
    """
    return sum(seconds[bits] * count for bits, count in steps.items()) / sum(steps.values())


def breakeven_bytes_per_second(
    narrow: Callable[[float], float], wide: Callable[[float], float]
) -> float | None:
    """Rate of the link (bytes/s per rank) below which the narrow exchange is the faster one.

    Args:
        narrow, wide: seconds of each at a rate; the narrow one gains on the other as the rate falls.

    Returns:
        None where the narrow one is faster at any rate; 0 where it is at none.
    """
    if narrow(FASTEST) <= wide(FASTEST):
        return None
    if narrow(SLOWEST) >= wide(SLOWEST):
        return 0.0
    low, high = SLOWEST, FASTEST
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        if narrow(middle) < wide(middle):
            low = middle
        else:
            high = middle
    return low


def choose(seconds: Mapping[Mode, float]) -> Mode:
    """The fastest of fp32, bf16 and quantized; a more exact one where it takes at most MARGIN longer."""
    fastest = min(seconds.values())
    order: tuple[Mode, ...] = ("fp32", "bf16", "quantized")
    return next(mode for mode in order if seconds[mode] <= (1 + MARGIN) * fastest)
