"""The pieces of a message: up to one block of consecutive elements each, and where their bytes lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CAST_BYTES = {16: 2, 32: 4}
"""Bytes of an element at the widths that are plain casts: bf16 and fp32."""


@dataclass(frozen=True)
class Pieces:
    """Parallel int64 tensors ``[n]``, one entry a piece.

    Attributes:
        source: index of the first element in the flat gradient.
        count: elements that are present; a codec pads the rest of the block with zeros.
        parameter: index of the parameter.
        block: index of the piece within its parameter.
        scale_at: byte offset of the block's scales (unused by casts).
        codes_at: byte offset of its codes or cast elements; casts are aligned to their width.
    """

    source: torch.Tensor
    count: torch.Tensor
    parameter: torch.Tensor
    block: torch.Tensor
    scale_at: torch.Tensor
    codes_at: torch.Tensor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> Pieces:
        return Pieces(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> Pieces:
        """The same pieces with their tables on ``device``."""
        return Pieces(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def as_rows(self, block_size: int, *, whole: bool) -> Pieces:
        """The same pieces of the same messages, with elements in rows of ``block_size`` instead of a flat gradient.

        Args:
            whole: whether a row counts from end to end, as one that is rotated does: what was padding then holds part
                of the elements.
        """
        rows = torch.arange(len(self), device=self.source.device) * block_size
        count = torch.full_like(self.count, block_size) if whole else self.count
        return Pieces(rows, count, self.parameter, self.block, self.scale_at, self.codes_at)


def piece_bytes(count: torch.Tensor, *, bits: int, block_size: int) -> torch.Tensor:
    """Bytes of each piece in a message, without its scales: int64 ``[n]``."""
    if bits in CAST_BYTES:
        return count * CAST_BYTES[bits]
    return torch.full_like(count, block_size * bits // 8)
