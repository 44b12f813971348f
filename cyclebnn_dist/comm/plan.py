"""The plan: where every byte of an exchange lies, for one bucket of parameters at one width.

A message of a rank to an owner is

    header (32 bytes) | small elements | scales | codes or cast elements | up to 7 bytes of padding

with the owner's share of every parameter, in the order of the bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from cyclebnn_dist.comm.header import HEADER_BYTES
from cyclebnn_dist.comm.layout import Layout, ParameterLayout
from cyclebnn_dist.comm.pieces import Pieces, piece_bytes
from cyclebnn_dist.comm.shares import Share

CHUNK_NUMEL = 2**21
"""Elements of a chunk, at least: on a CPU one is encoded while others travel."""


@dataclass(frozen=True)
class OwnedRows:
    """The rows of a rank's own wide pieces that belong to ``parameter``, and how many elements they hold."""

    parameter: ParameterLayout
    rows: slice
    numel: int


@dataclass(frozen=True)
class Plan:
    """How one bucket travels.

    Attributes:
        parameters: its parameters, in the order of their gradients in the flat bucket.
        bits, small_bits: widths of wide and small pieces.
        sizes: bytes of the message for each owner; ``padded_size`` is the largest.
        outgoing: pieces of all messages, one message after the other (what a rank sends in the first phase).
        own: pieces of a message for this rank (what it receives from everyone, and answers with).
        own_rows: the same, with their elements in rows of a block each (where their mean is).
        gathered: pieces of all messages, ``padded_size`` apart (what everyone receives in the second phase).
        owned: this rank's rows, parameter by parameter.
        digest: 63-bit number that stands for ``parameters``.
    """

    parameters: tuple[ParameterLayout, ...]
    numel: int
    bits: int
    small_bits: int
    sizes: tuple[int, ...]
    outgoing: Share
    own: Share
    own_rows: Share
    gathered: Share
    owned: tuple[OwnedRows, ...]
    digest: int

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of small and of wide pieces."""
        return self.small_bits, self.bits

    @property
    def padded_size(self) -> int:
        return max(self.sizes)


def build_plan(
    layout: Layout,
    indices: Sequence[int],
    *,
    bits: int,
    scale_bytes: int,
    rank: int,
    device: torch.device,
    rotated: bool = False,
) -> Plan:
    """The plan of the parameters with these indices, concatenated in this order, on ``device``.

    Args:
        scale_bytes: of each wide block beside its codes, as the codec has it.
        rotated: whether the mean of wide pieces is in the domain of a rotation, where incomplete blocks are whole.
    """
    parameters = tuple(layout.parameters[index] for index in indices)
    starts = parameter_starts(parameters)
    owners = range(layout.world_size)
    shares = [
        share_of_owner(parameters, starts, owner, layout, bits=bits, scale_bytes=scale_bytes)
        for owner in owners
    ]
    sizes = tuple(size for _, size in shares)
    padded = max(sizes)

    tables = [share for share, _ in shares]
    own = tables[rank].to(device)
    return Plan(
        parameters=parameters,
        numel=starts[-1],
        bits=bits,
        small_bits=layout.small_width(bits),
        sizes=sizes,
        outgoing=concatenate_shares(tables, (0, *accumulate(sizes))[:-1]).to(device),
        own=own,
        own_rows=own.as_rows(layout.block_size, rotated=rotated),
        gathered=concatenate_shares(tables, [owner * padded for owner in owners]).to(device),
        owned=_owned_rows(parameters, rank),
        digest=layout.bucket_digest(indices),
    )


def cut_in_chunks(numels: Sequence[int], least: int) -> list[range]:
    """Neighbouring parameters that travel together: places in ``numels`` of at least ``least`` elements in all."""
    chunks, start, held = [], 0, 0
    for place, numel in enumerate(numels):
        held += numel
        if held >= least:
            chunks.append(range(start, place + 1))
            start, held = place + 1, 0
    if chunks and held < least // 2:  # too little for a chunk of its own
        start = chunks.pop().start
    if start < len(numels):
        chunks.append(range(start, len(numels)))
    return chunks


def parameter_starts(parameters: Sequence[ParameterLayout]) -> tuple[int, ...]:
    """Where each parameter begins in the flat gradient, and where the last one ends."""
    return (0, *accumulate(p.numel for p in parameters))


def share_of_owner(
    parameters: Sequence[ParameterLayout],
    starts: Sequence[int],
    owner: int,
    layout: Layout,
    *,
    bits: int,
    scale_bytes: int,
) -> tuple[Share, int]:
    """An owner's pieces, with offsets from the beginning of its message, and the message's size in bytes."""
    size = layout.block_size
    tables: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter, start in zip(parameters, starts, strict=False):
        elements = parameter.owned_elements(owner)
        begin = torch.arange(elements.start, elements.stop, size)
        count = (elements.stop - begin).clamp(max=size)
        block = begin // size
        tables[parameter.small].append(
            torch.stack([begin + start, count, torch.full_like(begin, parameter.index), block])
        )
    small = torch.cat([torch.empty(4, 0, dtype=torch.int64), *tables[True]], dim=1)
    wide = torch.cat([torch.empty(4, 0, dtype=torch.int64), *tables[False]], dim=1)

    small_bytes = piece_bytes(small[1], bits=layout.small_width(bits), block_size=size)
    small_at = HEADER_BYTES + small_bytes.cumsum(0) - small_bytes
    scales_at = HEADER_BYTES + int(small_bytes.sum())
    scale_at = scales_at + scale_bytes * torch.arange(wide.shape[1])
    wide_bytes = piece_bytes(wide[1], bits=bits, block_size=size)
    codes_at = scales_at + scale_bytes * wide.shape[1] + wide_bytes.cumsum(0) - wide_bytes
    end = scales_at + scale_bytes * wide.shape[1] + int(wide_bytes.sum())
    share = Share(
        Pieces(small[0], small[1], small[2], small[3], small_at, small_at),
        Pieces(wide[0], wide[1], wide[2], wide[3], scale_at, codes_at),
    )
    return share, -(-end // 8) * 8


def concatenate_shares(shares: Sequence[Share], bases: Sequence[int]) -> Share:
    """The pieces of messages that begin at ``bases``."""
    return Share(
        _concatenate([share.small for share in shares], bases),
        _concatenate([share.wide for share in shares], bases),
    )


def _concatenate(tables: Sequence[Pieces], bases: Sequence[int]) -> Pieces:
    return Pieces(
        source=torch.cat([table.source for table in tables]),
        count=torch.cat([table.count for table in tables]),
        parameter=torch.cat([table.parameter for table in tables]),
        block=torch.cat([table.block for table in tables]),
        scale_at=torch.cat([table.scale_at + base for table, base in zip(tables, bases, strict=True)]),
        codes_at=torch.cat([table.codes_at + base for table, base in zip(tables, bases, strict=True)]),
    )


def _owned_rows(parameters: Sequence[ParameterLayout], rank: int) -> tuple[OwnedRows, ...]:
    owned, first = [], 0
    for parameter in parameters:
        if not parameter.small:
            num_rows = len(parameter.owned_units(rank))
            rows = slice(first, first + num_rows)
            owned.append(OwnedRows(parameter, rows, len(parameter.owned_elements(rank))))
            first += num_rows
    return tuple(owned)
