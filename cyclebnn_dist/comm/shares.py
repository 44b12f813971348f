"""The share: what messages hold of some parameters, small pieces and wide ones, which have widths of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cyclebnn_dist.comm.codec import Codec
from cyclebnn_dist.comm.pieces import Pieces
from cyclebnn_dist.comm.scratch import Scratch


@dataclass(frozen=True)
class Share:
    """The pieces of some messages: ``small`` ones at ``small_bits``, ``wide`` ones at ``bits``."""

    small: Pieces
    wide: Pieces

    def to(self, device: torch.device) -> Share:
        """The same pieces with their tables on ``device``."""
        return Share(self.small.to(device), self.wide.to(device))

    def as_rows(self, block_size: int, *, rotated: bool) -> Share:
        """The same pieces with elements in rows of a block each, those of wide ones perhaps ``rotated``."""
        return Share(
            self.small.as_rows(block_size, whole=False), self.wide.as_rows(block_size, whole=rotated)
        )


Widths = tuple[int, int]
"""Bits of small and of wide pieces."""


def encode_share(
    codec: Codec,
    sources: tuple[torch.Tensor, torch.Tensor],
    share: Share,
    out: torch.Tensor,
    *,
    widths: Widths,
    words: tuple[int, int],
    phase: int,
    rotated: bool = False,
) -> None:
    """Write a share of ``sources`` (fp32: where small elements lie, and where wide ones do) into the messages ``out``."""
    for source, pieces, bits in zip(sources, (share.small, share.wide), widths, strict=True):
        codec.encode_pieces(
            source.view(-1), pieces, out, bits=bits, words=words, phase=phase, rotated=rotated
        )


def mean_of_shares(
    codec: Codec, messages: torch.Tensor, share: Share, *, widths: Widths, scratch: Scratch, name: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over ``messages [ranks, bytes]`` of small and of wide pieces: fp32 ``[n, block_size]`` in the domain of the codes."""
    small, wide = (
        _mean(
            codec,
            messages,
            pieces,
            bits=bits,
            rows=scratch.get(f"{name}{kind}", len(pieces) * codec.block_size, torch.float32),
        )
        for kind, pieces, bits in zip(("small", "wide"), (share.small, share.wide), widths, strict=True)
    )
    return small, wide


def decode_share(
    codec: Codec,
    messages: torch.Tensor,
    share: Share,
    flat: torch.Tensor,
    *,
    widths: Widths,
    words: tuple[int, int],
) -> None:
    """Write a share of messages into ``flat`` (fp32)."""
    for pieces, bits in zip((share.small, share.wide), widths, strict=True):
        codec.decode_pieces(messages, pieces, flat, bits=bits, words=words)


def _mean(
    codec: Codec, messages: torch.Tensor, pieces: Pieces, *, bits: int, rows: torch.Tensor
) -> torch.Tensor:
    rows = rows.zero_().view(-1, codec.block_size)
    for message in messages:
        codec.add_pieces(message, pieces, rows, bits=bits)
    return rows.div_(len(messages))
