"""The reference kernels of the codec: plain torch operators, for any device.

Sums are taken by halves in a fixed order, so that a block's bytes depend neither on the device nor on how many
blocks are encoded together. Pieces are worked on in chunks, which bounds the memory of temporaries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cyclebnn_dist.comm.levels import CELLS_PER_UNIT, NUM_CELLS
from cyclebnn_dist.comm.packing import pack, unpack
from cyclebnn_dist.comm.pieces import Pieces
from cyclebnn_dist.comm.randomness import GOLDEN, ROUNDING_COUNTER, block_words, mix, signs

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
MAGNITUDE, INFINITY_BITS, BFLOAT16_NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC0
CAST_DTYPE = {16: torch.bfloat16, 32: torch.float32}
NEAREST, STOCHASTIC, UPWARD = 0, 1, 2


def encode(
    flat: torch.Tensor,
    out: torch.Tensor,
    pieces: Pieces,
    *,
    size: int,
    bits: int,
    words: tuple[int, int],
    phase: int,
    rotates: bool,
    rounding: int,
    cells: torch.Tensor,
    levels: torch.Tensor,
) -> None:
    """Encode pieces of ``flat`` (fp32) into ``out`` (uint8). ``cells`` is empty for uniform levels."""
    for part in _chunks(pieces, size, flat.device):
        rows = _gather(flat, part.source, part.count, size)
        per_block = block_words(words, part.parameter, part.block)
        scales, codes = encode_rows(
            rows, per_block, phase=phase, rotates=rotates, rounding=rounding, cells=cells, levels=levels
        )
        _scatter_bytes(out, part.scale_at, scales[:, None].view(torch.uint8))
        _scatter_bytes(out, part.codes_at, pack(codes, bits))


def encode_rows(
    rows: torch.Tensor,
    per_block: torch.Tensor,
    *,
    phase: int,
    rotates: bool,
    rounding: int,
    cells: torch.Tensor,
    levels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (bf16 ``[n]``) and codes (uint8 ``[n, size]``) of fp32 ``rows [n, size]``."""
    size = rows.shape[1]
    largest = (rows.view(torch.int32) & MAGNITUDE).amax(dim=1)
    finite = largest < INFINITY_BITS
    exponent = (largest >> 23).clamp(1, 253)
    up = ((254 - exponent) << 23).view(torch.float32)
    down = (exponent << 23).view(torch.float32)
    x = torch.where(finite[:, None], rows * up[:, None], 0.0)
    spread = 1.0
    if rotates:
        x = rotate(x, per_block)
        spread = float(size) ** 2
        down = down / spread
    if len(cells):
        energy = tree_sum(x * x)
        # torch's fp32 square root is off by one unit in one case of six; rounding the fp64 one is exact.
        rms = torch.sqrt((energy / size).double()).float()
        inverse = torch.where(energy > 0, 1.0 / rms, 0.0)
        cell = (x * inverse[:, None]) * CELLS_PER_UNIT + NUM_CELLS / 2
        codes = cells[cell.clamp(0, NUM_CELLS - 1).to(torch.int64)]
        chosen = levels[codes.long()]
        matched = tree_sum(x * chosen)
        if rounding == NEAREST:
            scale = matched / tree_sum(chosen * chosen)
        else:
            scale = torch.where(matched > 0, energy / matched, 0.0)
        scale_words = round_scale(scale * down, rounding, per_block, phase)
    else:
        last_code = len(levels) - 1
        top = (x.view(torch.int32) & MAGNITUDE).amax(dim=1).view(torch.float32)
        scale_words = round_scale((top / last_code) * down, UPWARD, per_block, phase)
        step = ((scale_words << 16).view(torch.float32) * up) * spread
        inverse = torch.where(step > 0, 0.5 / step, 0.0)
        codes = (x * inverse[:, None] + len(levels) // 2).clamp(0, last_code).to(torch.uint8)
    scale_words = torch.where(finite, scale_words, BFLOAT16_NAN)
    return scale_words.to(torch.int16).view(torch.bfloat16), codes


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


def add(
    message: torch.Tensor, rows: torch.Tensor, pieces: Pieces, *, bits: int, levels: torch.Tensor
) -> None:
    """Add decoded pieces of ``message`` to ``rows`` (fp32 ``[n, size]``), without rotating back."""
    size = rows.shape[1]
    done = 0
    for part in _chunks(pieces, size, rows.device):
        rows[done : done + len(part)] += _decode_rows(message, part, size=size, bits=bits, levels=levels)
        done += len(part)


def decode(
    message: torch.Tensor,
    flat: torch.Tensor,
    pieces: Pieces,
    *,
    size: int,
    bits: int,
    words: tuple[int, int],
    rotates: bool,
    levels: torch.Tensor,
) -> None:
    """Decode pieces of ``message`` into ``flat`` (fp32)."""
    for part in _chunks(pieces, size, flat.device):
        x = _decode_rows(message, part, size=size, bits=bits, levels=levels)
        if rotates:
            x = rotate_back(x, block_words(words, part.parameter, part.block))
        _scatter(flat, part.source, part.count, x)


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
    """Two turns of random signs and a Hadamard matrix, unscaled: lengths grow by ``size``."""
    for turn in (0, 1):
        rows = hadamard(_flip(rows, signs(per_block, rows.shape[1], turn=turn)))
    return rows


def rotate_back(rows: torch.Tensor, per_block: torch.Tensor) -> torch.Tensor:
    """The transpose of ``rotate``, unscaled."""
    for turn in (1, 0):
        rows = _flip(hadamard(rows), signs(per_block, rows.shape[1], turn=turn))
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


def _flip(rows: torch.Tensor, sign_bits: torch.Tensor) -> torch.Tensor:
    return (rows.view(torch.int32) ^ sign_bits).view(torch.float32)


def _decode_rows(
    message: torch.Tensor, pieces: Pieces, *, size: int, bits: int, levels: torch.Tensor
) -> torch.Tensor:
    scales = _gather_bytes(message, pieces.scale_at, 2).view(torch.bfloat16).float()
    codes = unpack(_gather_bytes(message, pieces.codes_at, size * bits // 8), bits)
    return levels[codes.long()] * scales


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
