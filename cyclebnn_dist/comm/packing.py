"""Dense packing: ``b``-bit codes in exactly ``b / 8`` bytes each, at every width of 1 to 8 bits.

A code is cut into parts of 4, 2 and 1 bits (7 = 4 + 2 + 1; 8 stays whole), low bits first. The parts of a block
lie one after the other. A byte of a part that is ``w`` bits wide holds the parts of ``8 / w`` values that are
``size * w / 8`` apart, so packing and unpacking are shifts of whole arrays, with no interleaving.
"""

from __future__ import annotations

import torch


def parts(bits: int) -> list[tuple[int, int]]:
    """``(shift, width)`` of the parts a code of ``bits`` is cut into."""
    if bits == 8:
        return [(0, 8)]
    cut, shift = [], 0
    for width in (4, 2, 1):
        if bits & width:
            cut.append((shift, width))
            shift += width
    return cut


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes ``[n, size]`` below ``2**bits`` into uint8 ``[n, size * bits / 8]``; 8 divides ``size``."""
    packed = []
    for shift, width in parts(bits):
        split = ((codes >> shift) & (2**width - 1)).reshape(
            len(codes), 8 // width, codes.shape[1] * width // 8
        )
        merged = split[:, 0]
        for position in range(1, 8 // width):
            merged = merged | (split[:, position] << (position * width))
        packed.append(merged)
    return torch.cat(packed, dim=1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The uint8 codes ``[n, size]`` that ``pack`` was given."""
    size = packed.shape[1] * 8 // bits
    codes = torch.zeros(len(packed), size, dtype=torch.uint8, device=packed.device)
    start = 0
    for shift, width in parts(bits):
        length = size * width // 8
        part = packed[:, start : start + length]
        split = [(part >> (position * width)) & (2**width - 1) for position in range(8 // width)]
        codes |= torch.cat(split, dim=1) << shift
        start += length
    return codes
