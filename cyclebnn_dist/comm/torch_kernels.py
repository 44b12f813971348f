"""The reference kernels of the codec: plain torch operators, for any device.

Sums are taken by halves in a fixed order, so that a block's bytes depend neither on the device nor on how many
blocks are encoded together. Pieces are worked on in chunks, which bounds the memory of temporaries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cyclebnn_dist.comm.coding import (
    BFLOAT16_NAN,
    GAUSSIAN,
    MINMAX,
    NEAREST,
    NUM_SCALES,
    STOCHASTIC,
    UPWARD,
    Coding,
)
from cyclebnn_dist.comm.levels import codes_of, levels_of
from cyclebnn_dist.comm.packing import pack, unpack
from cyclebnn_dist.comm.pieces import Pieces
from cyclebnn_dist.comm.randomness import GOLDEN, ROUNDING_COUNTER, block_words, mix, signs

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
MAGNITUDE, INFINITY_BITS = 0x7FFFFFFF, 0x7F800000
CAST_DTYPE = {16: torch.bfloat16, 32: torch.float32}


def encode(
    flat: torch.Tensor,
    out: torch.Tensor,
    pieces: Pieces,
    coding: Coding,
    *,
    words: tuple[int, int],
    phase: int,
    rotates: bool,
) -> None:
    """Encode pieces of ``flat`` (fp32) into ``out`` (uint8)."""
    size = coding.block_size
    for part in _chunks(pieces, size, flat.device):
        rows = _gather(flat, part.source, part.count, size)
        if coding.kind == MINMAX:
            rows = torch.where(_present(part.count, size), rows, rows[:, :1])
        per_block = block_words(words, part.parameter, part.block)
        scales, codes = encode_rows(rows, per_block, coding, phase=phase, rotates=rotates)
        _scatter_bytes(out, part.scale_at, scales.view(torch.uint8))
        _scatter_bytes(out, part.codes_at, pack(codes, coding.bits))


def encode_rows(
    rows: torch.Tensor, per_block: torch.Tensor, coding: Coding, *, phase: int, rotates: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (bf16 ``[n, 1]``, or ``[n, 2]``: step and least value) and codes (uint8) of fp32 ``rows [n, size]``."""
    size, bits = coding.block_size, coding.bits
    largest = (rows.view(torch.int32) & MAGNITUDE).amax(dim=1)
    finite = largest < INFINITY_BITS
    exponent = (largest >> 23).clamp(1, 253)
    up = ((254 - exponent) << 23).view(torch.float32)
    down = (exponent << 23).view(torch.float32)
    x = torch.where(finite[:, None], rows * up[:, None], 0.0)
    if coding.kind == MINMAX:
        step_words, least_words, codes = _encode_minmax(x, up, down, bits)
        scale_words = torch.stack([torch.where(finite, step_words, BFLOAT16_NAN), least_words], dim=1)
        return scale_words.to(torch.int16).view(torch.bfloat16), codes
    spread = 1.0
    if rotates:
        x = rotate(x, per_block)
        spread = float(size) ** 2
        down = down / spread
    if coding.kind == GAUSSIAN:
        energy = tree_sum(x * x)
        # torch's fp32 square root is off by one unit in one case of six; rounding the fp64 one is exact.
        rms = torch.sqrt((energy / size).double()).float()
        inverse = torch.where(energy > 0, 1.0 / rms, 0.0)
        codes = codes_of(x * inverse[:, None], coding.grid, bits)
        chosen = levels_of(codes, coding.grid, bits)
        matched = tree_sum(x * chosen)
        if coding.rounding == NEAREST:
            scale = matched / tree_sum(chosen * chosen)
        else:
            scale = torch.where(matched > 0, energy / matched, 0.0)
        scale_words = round_scale(scale * down, coding.rounding, per_block, phase)
    else:
        top = (x.view(torch.int32) & MAGNITUDE).amax(dim=1).view(torch.float32)
        scale_words = round_scale(_ratio(top, 2**bits - 1) * down, UPWARD, per_block, phase)
        step = ((scale_words << 16).view(torch.float32) * up) * spread
        inverse = torch.where(step > 0, 0.5 / step, 0.0)
        codes = codes_of(x * inverse[:, None], coding.grid, bits)
    scale_words = torch.where(finite, scale_words, BFLOAT16_NAN)
    return scale_words.to(torch.int16).view(torch.bfloat16)[:, None], codes


def _encode_minmax(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Upper halves (int32) of step and least value, both rounded so that they widen the range, and codes (uint8)."""
    last_code = 2**bits - 1
    least = ((x.amin(dim=1) + 0.0) * down).view(torch.int32)
    least_words = ((least.long() + torch.where(least < 0, 0xFFFF, 0)) >> 16).to(torch.int32)
    lowest = (least_words << 16).view(torch.float32) * up
    step = _ratio(x.amax(dim=1) - lowest, last_code) * down
    step_words = round_scale(step, UPWARD, step, 0)
    step = (step_words << 16).view(torch.float32) * up
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    codes = ((x - lowest[:, None]) * inverse[:, None]).clamp(0, last_code) + 0.5
    return step_words, least_words, codes.to(torch.uint8)


def round_scale(scale: torch.Tensor, rounding: int, per_block: torch.Tensor, phase: int) -> torch.Tensor:
    """Upper 16 bits (int32) of positive fp32 ``scale``: to nearest even, at random without bias, or upwards."""
    bits = scale.view(torch.int32).to(torch.int64)
    if rounding == UPWARD:
        bits = bits + 0xFFFF
    elif rounding == STOCHASTIC:
        bits = bits + (mix(per_block + (ROUNDING_COUNTER + phase) * GOLDEN) & 0xFFFF)
    else:
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).to(torch.int32)


def add(message: torch.Tensor, rows: torch.Tensor, pieces: Pieces, coding: Coding) -> None:
    """Add decoded pieces of ``message`` to ``rows`` (fp32 ``[n, size]``), without rotating back."""
    size = coding.block_size
    done = 0
    for part in _chunks(pieces, size, rows.device):
        decoded = _decode_part(message, part, coding)
        if coding.kind == MINMAX:
            decoded = torch.where(_present(part.count, size), decoded, 0.0)
        rows[done : done + len(part)] += decoded
        done += len(part)


def decode(
    message: torch.Tensor, flat: torch.Tensor, pieces: Pieces, coding: Coding, *, words: tuple[int, int]
) -> None:
    """Decode pieces of ``message`` into ``flat`` (fp32)."""
    for part in _chunks(pieces, coding.block_size, flat.device):
        x = _decode_part(message, part, coding)
        if coding.rotates:
            x = rotate_back(x, block_words(words, part.parameter, part.block))
        _scatter(flat, part.source, part.count, x)


def decode_rows(scales: torch.Tensor, codes: torch.Tensor, coding: Coding) -> torch.Tensor:
    """The fp32 rows ``[n, size]`` of bf16 scales ``[n, 1 or 2]`` and uint8 codes ``[n, size]``, not rotated back."""
    scales = scales.float()
    if coding.kind == MINMAX:
        return scales[:, 1:] + codes.float() * scales[:, :1]
    return levels_of(codes, coding.grid, coding.bits) * scales


def rotate_rows(rows: torch.Tensor, pieces: Pieces, *, words: tuple[int, int], inverse: bool) -> None:
    """Rotate fp32 rows ``[n, size]`` in place into the domain of the codes, or back; back, padding becomes zero."""
    size = rows.shape[1]
    done = 0
    for part in _chunks(pieces, size, rows.device):
        x = rows[done : done + len(part)]
        per_block = block_words(words, part.parameter, part.block)
        if inverse:
            x.copy_(torch.where(_present(part.count, size), rotate_back(x, per_block), 0.0))
        else:
            x.copy_(rotate(x, per_block) * (1.0 / size**2))
        done += len(part)


def encode_cast(flat: torch.Tensor, out: torch.Tensor, pieces: Pieces, *, size: int, bits: int) -> None:
    """Cast pieces of ``flat`` (fp32) to fp32 or bf16 bytes in ``out`` (uint8)."""
    for part in _chunks(pieces, size, flat.device):
        cast = _gather(flat, part.source, part.count, size).to(CAST_DTYPE[bits])
        _scatter(out, part.codes_at, part.count * (bits // 8), cast.view(torch.uint8))


def add_cast(message: torch.Tensor, rows: torch.Tensor, pieces: Pieces, *, bits: int) -> None:
    """Add cast pieces of ``message`` to ``rows`` (fp32 ``[n, size]``)."""
    done = 0
    for part in _chunks(pieces, rows.shape[1], rows.device):
        rows[done : done + len(part)] += _read_cast(message, part, rows.shape[1], bits)
        done += len(part)


def decode_cast(message: torch.Tensor, flat: torch.Tensor, pieces: Pieces, *, size: int, bits: int) -> None:
    """Write cast pieces of ``message`` into ``flat`` (fp32)."""
    for part in _chunks(pieces, size, flat.device):
        _scatter(flat, part.source, part.count, _read_cast(message, part, size, bits))


def rotate(rows: torch.Tensor, per_block: torch.Tensor) -> torch.Tensor:
    """Two turns of random signs, a Hadamard matrix and a transposition, unscaled: lengths grow by ``size``.

    The transposition, of the block as a matrix of 16 rows, spares the CPU half of the shuffles of a transform.
    """
    size = rows.shape[1]
    for turn in (0, 1):
        rows = hadamard(_flip(rows, signs(per_block, size, turn=turn)))
        rows = rows.view(-1, 16, size // 16).transpose(1, 2).reshape(-1, size)
    return rows


def rotate_back(rows: torch.Tensor, per_block: torch.Tensor) -> torch.Tensor:
    """The transpose of ``rotate``, unscaled."""
    size = rows.shape[1]
    for turn in (1, 0):
        rows = hadamard(rows).view(-1, size // 16, 16).transpose(1, 2).reshape(-1, size)
        rows = _flip(rows, signs(per_block, size, turn=turn))
    return rows


def hadamard(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[n, size]`` times the Hadamard matrix; strides halve from ``size / 2`` to 1."""
    count, size = rows.shape
    stride = size // 2
    while stride:
        pairs = rows.reshape(count, size // (2 * stride), 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack((first + second, first - second), dim=2).reshape(count, size)
        stride //= 2
    return rows


def tree_sum(rows: torch.Tensor) -> torch.Tensor:
    """Sums ``[n]`` of rows ``[n, size]`` by halves: ``x[i] + x[i + size / 2]`` first."""
    half = rows.shape[1] // 2
    while half:
        rows = rows[:, :half] + rows[:, half : 2 * half]
        half //= 2
    return rows[:, 0]


def _ratio(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """The rounded quotient; on a GPU torch multiplies by the reciprocal of a divisor that is a plain number."""
    return x / torch.full_like(x, divisor)


def _flip(rows: torch.Tensor, sign_bits: torch.Tensor) -> torch.Tensor:
    return (rows.view(torch.int32) ^ sign_bits).view(torch.float32)


def _decode_part(message: torch.Tensor, pieces: Pieces, coding: Coding) -> torch.Tensor:
    scales = _gather_bytes(message, pieces.scale_at, 2 * NUM_SCALES[coding.kind]).view(torch.bfloat16)
    codes = unpack(_gather_bytes(message, pieces.codes_at, coding.codes_bytes), coding.bits)
    return decode_rows(scales, codes, coding)


def _read_cast(message: torch.Tensor, pieces: Pieces, size: int, bits: int) -> torch.Tensor:
    width = bits // 8
    cast = _gather(message, pieces.codes_at, pieces.count * width, size * width)
    return cast.view(CAST_DTYPE[bits]).float()


def _chunks(pieces: Pieces, size: int, device: torch.device) -> Iterator[Pieces]:
    chunk = max(1, CHUNK_ELEMENTS.get(device.type, 1 << 22) // size)
    for start in range(0, len(pieces), chunk):
        yield pieces[start : start + chunk]


def _present(count: torch.Tensor, size: int) -> torch.Tensor:
    return torch.arange(size, device=count.device) < count[:, None]


def _gather(flat: torch.Tensor, begin: torch.Tensor, count: torch.Tensor, size: int) -> torch.Tensor:
    offsets = torch.arange(size, device=flat.device)
    present = offsets < count[:, None]
    return torch.where(present, flat[torch.where(present, begin[:, None] + offsets, 0)], 0)


def _scatter(flat: torch.Tensor, begin: torch.Tensor, count: torch.Tensor, rows: torch.Tensor) -> None:
    offsets = torch.arange(rows.shape[1], device=flat.device)
    present = offsets < count[:, None]
    flat[(begin[:, None] + offsets)[present]] = rows[present]


def _gather_bytes(message: torch.Tensor, begin: torch.Tensor, size: int) -> torch.Tensor:
    return message[begin[:, None] + torch.arange(size, device=message.device)]


def _scatter_bytes(out: torch.Tensor, begin: torch.Tensor, rows: torch.Tensor) -> None:
    out[begin[:, None] + torch.arange(rows.shape[1], device=out.device)] = rows
