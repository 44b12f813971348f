"""The CPU kernels of the codec: compiled loops over the tables of pieces, one thread each."""

from __future__ import annotations

import torch

from cyclebnn_dist.comm import numba_casts, numba_loops
from cyclebnn_dist.comm.coding import Coding
from cyclebnn_dist.comm.pieces import Pieces


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
    arguments = (
        *_arrays(flat, out, *_tables(pieces)),
        *(coding.bits, coding.kind, coding.rounding, *words, phase, rotates, coding.grid.numpy()),
    )
    if coding.block_size == numba_loops.FAST:
        numba_loops.encode_256(*arguments)
    else:
        numba_loops.encode(*arguments, coding.block_size)


def add(message: torch.Tensor, rows: torch.Tensor, pieces: Pieces, coding: Coding) -> None:
    """Add decoded pieces of ``message`` to ``rows`` (fp32 ``[n, size]``), without rotating back."""
    add_rows = numba_loops.add_256 if coding.block_size == numba_loops.FAST else numba_loops.add
    add_rows(
        *_arrays(message, rows, pieces.count, pieces.scale_at, pieces.codes_at),
        *(coding.bits, coding.kind, coding.grid.numpy()),
    )


def decode(
    message: torch.Tensor, flat: torch.Tensor, pieces: Pieces, coding: Coding, *, words: tuple[int, int]
) -> None:
    """Decode pieces of ``message`` into ``flat`` (fp32)."""
    arguments = (
        *_arrays(message, flat, *_tables(pieces)),
        *(coding.bits, coding.kind, *words, coding.rotates, coding.grid.numpy()),
    )
    if coding.block_size == numba_loops.FAST:
        numba_loops.decode_256(*arguments)
    else:
        numba_loops.decode(*arguments, coding.block_size)


def rotate_rows(rows: torch.Tensor, pieces: Pieces, *, words: tuple[int, int], inverse: bool) -> None:
    """Rotate fp32 rows ``[n, size]`` in place into the domain of the codes, or back; back, padding becomes zero."""
    rotate = numba_loops.rotate_rows_256 if rows.shape[1] == numba_loops.FAST else numba_loops.rotate_rows
    rotate(*_arrays(rows, pieces.count, pieces.parameter, pieces.block), *words, inverse)


def encode_cast(flat: torch.Tensor, out: torch.Tensor, pieces: Pieces, *, size: int, bits: int) -> None:
    """Cast pieces of ``flat`` (fp32) to fp32 or bf16 bytes in ``out`` (uint8)."""
    numba_casts.encode_cast(*_arrays(flat, out, pieces.source, pieces.count, pieces.codes_at), bits)


def add_cast(message: torch.Tensor, rows: torch.Tensor, pieces: Pieces, *, bits: int) -> None:
    """Add cast pieces of ``message`` to ``rows`` (fp32 ``[n, size]``)."""
    numba_casts.add_cast(*_arrays(message, rows, pieces.count, pieces.codes_at), bits)


def decode_cast(message: torch.Tensor, flat: torch.Tensor, pieces: Pieces, *, size: int, bits: int) -> None:
    """Write cast pieces of ``message`` into ``flat`` (fp32)."""
    numba_casts.decode_cast(*_arrays(message, flat, pieces.source, pieces.count, pieces.codes_at), bits)


def _tables(pieces: Pieces) -> tuple[torch.Tensor, ...]:
    return (pieces.source, pieces.count, pieces.parameter, pieces.block, pieces.scale_at, pieces.codes_at)


def _arrays(*tensors: torch.Tensor) -> list:
    return [tensor.numpy() for tensor in tensors]
