"""Counter-based randomness: random words that are a pure function of (seed, step, parameter, block, counter)."""

from __future__ import annotations

import torch

MASK = 0xFFFFFFFF
MASK_64 = 0xFFFFFFFFFFFFFFFF
GOLDEN = 0x9E3779B9
MULTIPLIER_A = 0x7FEB352D
MULTIPLIER_B = 0x846CA68B

ROUNDING_COUNTER = 0x10000
"""Counters from here on round the scales (plus the phase); those below draw signs."""

SIGN_ROWS = 16
"""Rows a block is cut into to draw its signs."""


def step_words(seed: int, step: int) -> tuple[int, int]:
    """Two 32-bit words that stand for (seed, step) (splitmix64, Steele et al. 2014)."""
    state = (seed * 0xD1342543DE82EF95 + step * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
    state ^= state >> 31
    return state & MASK, state >> 32


def mix(words: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words (held in int64) whose output bits all depend on all input bits."""
    words = words & MASK
    words = words ^ (words >> 16)
    words = (words * MULTIPLIER_A) & MASK
    words = words ^ (words >> 15)
    words = (words * MULTIPLIER_B) & MASK
    return words ^ (words >> 16)


def block_words(words: tuple[int, int], parameters: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """One 32-bit word per block, int64 ``[n]``, from a step's words and int64 ``[n]`` parameter and block indices."""
    return mix(mix(parameters ^ words[0]) ^ mix(blocks + words[1]))


def random_words(per_block: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Random 32-bit words ``[n, len(counters)]`` (int64) from block words ``[n]`` and counters."""
    return mix(per_block[:, None] + counters[None, :] * GOLDEN)


def signs(per_block: torch.Tensor, size: int, *, turn: int) -> torch.Tensor:
    """Random signs as int32 ``[n, size]`` masks of the sign bit: 0 or the most negative int32.

    ``turn`` 0 and 1 give independent signs. Of ``w = size / 16`` words, bit ``16 * turn + i`` of word ``j`` is the sign
    of element ``i * w + j``: the two turns share words, and a row of ``w`` elements takes the same bit of each.
    """
    words = random_words(per_block, torch.arange(size // SIGN_ROWS, device=per_block.device))
    shifts = torch.arange(SIGN_ROWS, device=per_block.device) + SIGN_ROWS * turn
    bits = (words[:, None, :] >> shifts[:, None]) & 1
    return (bits.reshape(len(per_block), size) << 31).to(torch.int32)
