"""The GPU kernels of the codec: Triton, one program a block. They write the bytes that ``torch_kernels`` writes.

Sums run by halves, products are not fused with sums, quotients and roots are rounded to nearest: nothing is left to
the compiler. Without a GPU they run in Triton's interpreter (``TRITON_INTERPRET=1``), which is slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cyclebnn_dist.comm.coding import Coding
from cyclebnn_dist.comm.pieces import Pieces
from cyclebnn_dist.comm.triton_blocks import (
    BFLOAT16_NAN,
    GAUSSIAN,
    INFINITY_BITS,
    MAGNITUDE,
    MINMAX,
    NEAREST,
    STOCHASTIC,
    block_word,
    codes_of,
    decoded,
    half_to_float,
    levels_of,
    mix,
    pack,
    power_of_two,
    rotate,
    rotate_back,
    round_up,
    store_half,
    tree_sum,
)

ELEMENTS_PER_WARP = 256


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
    _launch(
        _encode,
        pieces,
        coding.block_size,
        *(flat, out, *_tables(pieces), coding.grid, *_signed(words), phase),
        BITS=coding.bits,
        KIND=coding.kind,
        ROUNDING=coding.rounding,
        ROTATES=rotates,
    )


def add(message: torch.Tensor, rows: torch.Tensor, pieces: Pieces, coding: Coding) -> None:
    """Add decoded pieces of ``message`` to ``rows`` (fp32 ``[n, size]``), without rotating back."""
    _launch(
        _add,
        pieces,
        coding.block_size,
        *(message, rows, pieces.count, pieces.scale_at, pieces.codes_at, coding.grid),
        BITS=coding.bits,
        KIND=coding.kind,
    )


def decode(
    message: torch.Tensor, flat: torch.Tensor, pieces: Pieces, coding: Coding, *, words: tuple[int, int]
) -> None:
    """Decode pieces of ``message`` into ``flat`` (fp32)."""
    _launch(
        _decode,
        pieces,
        coding.block_size,
        *(message, flat, *_tables(pieces), coding.grid, *_signed(words)),
        BITS=coding.bits,
        KIND=coding.kind,
        ROTATES=coding.rotates,
    )


def rotate_rows(rows: torch.Tensor, pieces: Pieces, *, words: tuple[int, int], inverse: bool) -> None:
    """Rotate fp32 rows ``[n, size]`` in place into the domain of the codes, or back; back, padding becomes zero."""
    tables = (pieces.count, pieces.parameter, pieces.block)
    _launch(_rotate_rows, pieces, rows.shape[1], rows, *tables, *_signed(words), INVERSE=inverse)


def encode_cast(flat: torch.Tensor, out: torch.Tensor, pieces: Pieces, *, size: int, bits: int) -> None:
    """Cast pieces of ``flat`` (fp32) to fp32 or bf16 bytes in ``out`` (uint8), where they lie aligned."""
    _launch(_encode_cast, pieces, size, flat, _wide(out, bits), *_cast_tables(pieces), BITS=bits)


def add_cast(message: torch.Tensor, rows: torch.Tensor, pieces: Pieces, *, bits: int) -> None:
    """Add cast pieces of ``message`` to ``rows`` (fp32 ``[n, size]``)."""
    size = rows.shape[1]
    _launch(
        _decode_cast, pieces, size, _wide(message, bits), rows, *_cast_tables(pieces), BITS=bits, ADDS=True
    )


def decode_cast(message: torch.Tensor, flat: torch.Tensor, pieces: Pieces, *, size: int, bits: int) -> None:
    """Write cast pieces of ``message`` into ``flat`` (fp32)."""
    _launch(
        _decode_cast, pieces, size, _wide(message, bits), flat, *_cast_tables(pieces), BITS=bits, ADDS=False
    )


def _launch(kernel, pieces: Pieces, size: int, *arguments, **constants) -> None:
    if len(pieces):
        kernel[(len(pieces),)](
            *arguments,
            SIZE=size,
            LOG_SIZE=size.bit_length() - 1,
            **constants,
            num_warps=min(8, max(1, size // ELEMENTS_PER_WARP)),
            enable_fp_fusion=False,
        )


def _tables(pieces: Pieces) -> tuple[torch.Tensor, ...]:
    return (pieces.source, pieces.count, pieces.parameter, pieces.block, pieces.scale_at, pieces.codes_at)


def _cast_tables(pieces: Pieces) -> tuple[torch.Tensor, ...]:
    return (pieces.source, pieces.count, pieces.codes_at)


def _signed(words: tuple[int, int]) -> tuple[int, int]:
    """The words as int32, so that Triton sees one type whatever their value."""
    low, high = (word - ((word >> 31) << 32) for word in words)
    return low, high


def _wide(message: torch.Tensor, bits: int) -> torch.Tensor:
    return message.view(torch.int16 if bits == 16 else torch.int32)


@triton.jit(do_not_specialize=["low", "high", "phase"])
def _encode(
    flat, out, source, count, parameter, block, scale_at, codes_at, grid, low, high, phase,
    BITS: tl.constexpr, KIND: tl.constexpr, ROUNDING: tl.constexpr, ROTATES: tl.constexpr, SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    element = tl.arange(0, SIZE)
    present = element < tl.load(count + piece)
    begin = flat + tl.load(source + piece)
    if KIND == MINMAX:
        x = tl.load(begin + tl.where(present, element, 0))
    else:
        x = tl.load(begin + element, mask=present, other=0.0)
    largest = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, 0)
    finite = largest < INFINITY_BITS
    exponent = tl.minimum(tl.maximum(largest >> 23, 1), 253)
    up, down = power_of_two(254 - exponent), power_of_two(exponent)
    x = tl.where(finite, x * up, 0.0)
    word = block_word(low, high, tl.load(parameter + piece), tl.load(block + piece))
    spread = 1.0
    if ROTATES:
        x = rotate(x, word, SIZE, LOG_SIZE)
        spread = 1.0 * SIZE * SIZE
        down = down * (1.0 / (SIZE * SIZE))
    scales = out + tl.load(scale_at + piece)
    if KIND == GAUSSIAN:
        energy = tree_sum(x * x, SIZE, LOG_SIZE)
        rms = tl.sqrt_rn(energy * (1.0 / SIZE))
        inverse = tl.where(energy > 0, tl.div_rn(1.0, tl.where(energy > 0, rms, 1.0)), 0.0)
        codes = codes_of(x * inverse, grid, BITS)
        chosen = levels_of(codes, grid, BITS)
        matched = tree_sum(x * chosen, SIZE, LOG_SIZE)
        if ROUNDING == NEAREST:
            scale = tl.div_rn(matched, tree_sum(chosen * chosen, SIZE, LOG_SIZE))
        else:
            scale = tl.where(matched > 0, tl.div_rn(energy, tl.where(matched > 0, matched, 1.0)), 0.0)
        bits = (scale * down).to(tl.uint32, bitcast=True)
        if ROUNDING == STOCHASTIC:
            noise = mix(word + (0x10000 + phase).to(tl.uint32) * 0x9E3779B9)
            half = (bits + (noise & 0xFFFF)) >> 16
        else:
            half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif KIND == MINMAX:
        least = ((tl.min(x, 0) + 0.0) * down).to(tl.uint32, bitcast=True)
        least_half = (least + tl.where(least >> 31 != 0, 0xFFFF, 0).to(tl.uint32)) >> 16
        store_half(scales + 2, least_half)
        lowest = half_to_float(least_half) * up
        half = round_up(tl.div_rn(tl.max(x, 0) - lowest, 1.0 * ((1 << BITS) - 1)) * down)
        step = half_to_float(half) * up
        inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
        number = tl.minimum(tl.maximum((x - lowest) * inverse, 0.0), 1.0 * ((1 << BITS) - 1))
        codes = (number + 0.5).to(tl.int32)
    else:
        top = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, 0).to(tl.float32, bitcast=True)
        half = round_up(tl.div_rn(top, 1.0 * ((1 << BITS) - 1)) * down)
        step = (half_to_float(half) * up) * spread
        inverse = tl.where(step > 0, tl.div_rn(0.5, tl.where(step > 0, step, 1.0)), 0.0)
        codes = codes_of(x * inverse, grid, BITS)
    store_half(scales, tl.where(finite, half, BFLOAT16_NAN))
    pack(codes, out + tl.load(codes_at + piece), BITS, SIZE)


@triton.jit
def _add(
    message, rows, count, scale_at, codes_at, grid,
    BITS: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    element = tl.arange(0, SIZE)
    x = decoded(message, tl.load(scale_at + piece), tl.load(codes_at + piece), grid, BITS, KIND, SIZE)
    if KIND == MINMAX:
        x = tl.where(element < tl.load(count + piece), x, 0.0)
    target = rows + piece.to(tl.int64) * SIZE + element
    tl.store(target, tl.load(target) + x)


@triton.jit(do_not_specialize=["low", "high"])
def _decode(
    message, flat, source, count, parameter, block, scale_at, codes_at, grid, low, high,
    BITS: tl.constexpr, KIND: tl.constexpr, ROTATES: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    element = tl.arange(0, SIZE)
    x = decoded(message, tl.load(scale_at + piece), tl.load(codes_at + piece), grid, BITS, KIND, SIZE)
    if ROTATES:
        word = block_word(low, high, tl.load(parameter + piece), tl.load(block + piece))
        x = rotate_back(x, word, SIZE, LOG_SIZE)
    tl.store(flat + tl.load(source + piece) + element, x, mask=element < tl.load(count + piece))


@triton.jit(do_not_specialize=["low", "high"])
def _rotate_rows(
    rows, count, parameter, block, low, high,
    INVERSE: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    element = tl.arange(0, SIZE)
    target = rows + piece.to(tl.int64) * SIZE + element
    word = block_word(low, high, tl.load(parameter + piece), tl.load(block + piece))
    x = tl.load(target)
    if INVERSE:
        x = tl.where(element < tl.load(count + piece), rotate_back(x, word, SIZE, LOG_SIZE), 0.0)
    else:
        x = rotate(x, word, SIZE, LOG_SIZE) * (1.0 / (SIZE * SIZE))
    tl.store(target, x)


@triton.jit
def _encode_cast(
    flat, out, source, count, codes_at, BITS: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr
):
    piece = tl.program_id(0)
    element = tl.arange(0, SIZE)
    present = element < tl.load(count + piece)
    x = tl.load(flat + tl.load(source + piece) + element, mask=present, other=0.0)
    word = x.to(tl.uint32, bitcast=True)
    target = out + tl.load(codes_at + piece) // (BITS // 8) + element
    if BITS == 32:
        tl.store(target, word.to(tl.int32, bitcast=True), mask=present)
    else:
        half = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        half = tl.where((word & MAGNITUDE) > INFINITY_BITS, BFLOAT16_NAN, half)
        tl.store(target, half.to(tl.uint16).to(tl.int16, bitcast=True), mask=present)


@triton.jit
def _decode_cast(
    message, target, source, count, codes_at,
    BITS: tl.constexpr, ADDS: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    element = tl.arange(0, SIZE)
    present = element < tl.load(count + piece)
    word = tl.load(message + tl.load(codes_at + piece) // (BITS // 8) + element, mask=present, other=0)
    if BITS == 32:
        x = word.to(tl.float32, bitcast=True)
    else:
        x = half_to_float(word.to(tl.uint16, bitcast=True))
    if ADDS:
        target += piece.to(tl.int64) * SIZE + element
        x = tl.load(target, mask=present, other=0.0) + x
    else:
        target += tl.load(source + piece) + element
    tl.store(target, x, mask=present)
