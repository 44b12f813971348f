"""The layout: how each parameter travels and which rank owns which part of it.

Everything is a pure function of a parameter's place in the model, its shape and the number of ranks. Buckets play
no part, so results, residuals and resumption do not depend on how DDP cuts the gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch


class Slot(NamedTuple):
    """Where a parameter lies in a flat tensor that is cut into equal parts, one a rank (ZeRO's partitions).

    Attributes:
        group: which flat tensor.
        offset: of the parameter's first element in it.
        part_numel: elements of a part; rank r has those from r * part_numel on.
    """

    group: int
    offset: int
    part_numel: int


@dataclass(frozen=True)
class ParameterLayout:
    """One parameter. ``small`` ones travel as plain casts, the others in blocks that share a scale.

    The last block may be incomplete. Codecs pad it with zeros: a rotation spreads its energy over the whole block,
    so that its relative error is that of any other block, and there is at most one such block a parameter.

    Where a parameter has a ``slot``, ranks own what of it falls into their parts. A border between two parts may cut a
    block, which then is owned, as a whole, by the ranks on both sides: both decode the same bytes in the same way, and
    what an element becomes depends on no border.
    """

    index: int
    name: str
    numel: int
    small: bool
    block_size: int
    world_size: int
    slot: Slot | None = None

    @property
    def num_units(self) -> int:
        """What is dealt out to ranks: elements of a small parameter, blocks of another."""
        return self.numel if self.small else -(-self.numel // self.block_size)

    def owned_units(self, rank: int) -> range:
        """The contiguous units that ``rank`` sums and sends to everyone.

        Shares differ by at most one unit. The first and larger ones go to the ranks from ``index`` on, so that over
        many parameters all ranks get equally much. With a slot: the units of which the rank needs an element.
        """
        if self.slot:
            needed = self.needed_elements(rank)
            size = 1 if self.small else self.block_size
            return range(needed.start // size, -(-needed.stop // size) if needed else needed.start // size)
        place = (rank - self.index) % self.world_size
        share, extra = divmod(self.num_units, self.world_size)
        start = place * share + min(place, extra)
        return range(start, start + share + (place < extra))

    def owned_elements(self, rank: int) -> range:
        """The contiguous elements, in memory order, that ``rank`` owns."""
        units = self.owned_units(rank)
        size = 1 if self.small else self.block_size
        return range(min(units.start * size, self.numel), min(units.stop * size, self.numel))

    def needed_elements(self, rank: int) -> range:
        """The contiguous elements, in memory order, that fall into the part of ``rank``; all of them without a slot."""
        if not self.slot:
            return range(self.numel)
        first = rank * self.slot.part_numel - self.slot.offset
        last = first + self.slot.part_numel
        return range(min(max(first, 0), self.numel), min(max(last, 0), self.numel))


@dataclass(frozen=True)
class Layout:
    """All parameters of a model, in model order."""

    parameters: tuple[ParameterLayout, ...]
    world_size: int
    block_size: int
    small_bits: Literal[16, 32]
    second_phase_extra_bits: int = 0
    ranks_per_node: int = 1
    """More than 1 where gradients are averaged within nodes first; see ``hierarchy``."""
    scattered: bool = False
    """Whether a rank gets the mean of its parts alone, of parameters with a slot; nothing else can be averaged then."""

    def bucket_digest(self, indices: Sequence[int]) -> int:
        """63-bit number that stands for the parameters of a bucket."""
        return int.from_bytes(hashlib.sha256(repr(tuple(indices)).encode()).digest()[:8], "big") >> 1

    def mean_width(self, bits: int) -> int:
        """Width at which averages of wide parameters travel in a step of ``bits``.

        Rounding errors of N gradients average out as far as they are independent, that of their mean does not: with
        D(b) the relative error of a message and R = mean |g_i|^2 / |mean g|^2, the result's is
        D(b1) R/N + D(b2) (1 + D(b1) R/N). D falls by 4 a bit, so for the same bytes the second phase should have
        log4(N/R) bits more: it pays where R/N < 1/4. With gradients of signal and s times as much noise
        R/N = (1 + s) / (N + s). Computed with this codec, error of 2 + 4 bits over that of 3 + 3: at s = 20 1.7 for 8
        ranks, 0.97 for 64, 0.52 for 256. Where it is agreement that makes R small (s = 1) errors agree as well, since
        all ranks rotate alike, and less is gained: 1.07 for 8 ranks, 0.60 for 64.
        """
        return bits if bits > 8 else min(8, bits + self.second_phase_extra_bits)

    def small_width(self, bits: int) -> int:
        """Width of small parameters in a step of ``bits``: never below a step of 16 or 32 bits."""
        return max(self.small_bits, bits) if bits > 8 else self.small_bits

    @cached_property
    def digest(self) -> int:
        """63-bit number, equal on ranks whose messages have the same meaning."""
        facts = [(p.name, p.numel, p.small, p.slot) for p in self.parameters]
        settings = (
            self.world_size,
            self.block_size,
            self.small_bits,
            self.second_phase_extra_bits,
            self.ranks_per_node,
            self.scattered,
        )
        text = repr((facts, settings))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def build_layout(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    *,
    world_size: int,
    block_size: int,
    small_bits: Literal[16, 32],
    small_numel: int,
    second_phase_extra_bits: int = 0,
    ranks_per_node: int = 1,
    slots: Mapping[str, Slot] | None = None,
) -> Layout:
    """The layout of parameters given as ``(name, tensor)`` in model order.

    Parameters with at most one dimension or fewer than ``small_numel`` elements are small.

    Args:
        slots: by parameter name, where ranks get the mean of their parts alone.
    """
    assert slots is None or ranks_per_node == 1, "within nodes everyone gets everything"
    parameters = tuple(
        ParameterLayout(
            index=index,
            name=name,
            numel=tensor.numel(),
            small=tensor.dim() <= 1 or tensor.numel() < small_numel,
            block_size=block_size,
            world_size=world_size,
            slot=(slots or {}).get(name),
        )
        for index, (name, tensor) in enumerate(named_parameters)
    )
    return Layout(
        parameters=parameters,
        world_size=world_size,
        block_size=block_size,
        small_bits=small_bits,
        second_phase_extra_bits=second_phase_extra_bits,
        ranks_per_node=ranks_per_node,
        scattered=slots is not None,
    )
