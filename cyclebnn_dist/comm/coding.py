"""The coding: what the kernels of every backend must know about a codec at one width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cyclebnn_dist.comm.levels import LLOYD_MAX_BITS, MAX_CODE_BITS, gaussian_grid, uniform_grid

GAUSSIAN, UNIFORM, MINMAX = 0, 1, 2
"""Kinds: numbers in units of a block's root mean square; in steps up to its largest; in steps from its least."""

NEAREST, STOCHASTIC, UPWARD = 0, 1, 2
"""How a scale is rounded to bf16."""

BFLOAT16_NAN = 0x7FC0
NUM_SCALES = {GAUSSIAN: 1, UNIFORM: 1, MINMAX: 2}

CodecName = Literal["hadamard", "absmax", "minmax"]


@dataclass(frozen=True)
class Coding:
    """How a block becomes bytes.

    Attributes:
        kind: ``GAUSSIAN``, ``UNIFORM`` or ``MINMAX``; the latter has two scales, the step and the least value.
        rounding: of ``GAUSSIAN`` scales. ``NEAREST`` goes with least-squares scales, ``STOCHASTIC`` with unbiased ones.
        rotates: whether blocks are rotated before they are encoded.
        grid: of ``levels``, fp32 ``[8]``.
    """

    block_size: int
    bits: int
    kind: int
    rounding: int
    rotates: bool
    grid: torch.Tensor

    @property
    def codes_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block_size * self.bits // 8


def build_coding(
    name: CodecName, *, bits: int, block_size: int, unbiased: bool, device: torch.device
) -> Coding:
    """The coding of a codec at ``bits`` of 1 to 8, its grid on ``device``."""
    assert 1 <= bits <= MAX_CODE_BITS, bits
    rotates = name == "hadamard"
    gaussian = rotates and bits <= LLOYD_MAX_BITS
    return Coding(
        block_size=block_size,
        bits=bits,
        kind=MINMAX if name == "minmax" else GAUSSIAN if gaussian else UNIFORM,
        rounding=STOCHASTIC if unbiased else NEAREST,
        rotates=rotates,
        grid=(gaussian_grid(bits) if gaussian else uniform_grid(bits)).to(device),
    )
