"""The codec: what turns blocks of a gradient into scales and codes of 1 to 8 bits, and back. It knows no ranks.

``hadamard`` rotates a block by two turns of random signs and a Hadamard transform, which makes its elements nearly
Gaussian whatever they were (after a single turn a sparse block is neither Gaussian nor unbiased), and rounds them to Lloyd-Max levels (up to 5 bits) or uniform ones between the extremes (6 to 8).
Up to 5 bits a scale either makes the decoded block unbiased over the random signs (EDEN, Vargaftik et al. 2022), or
minimizes its squared error, which is right where error feedback makes up for the bias. ``absmax`` does not rotate
and is uniform at every width. Widths of 16 and 32 bits are casts to bf16 and fp32 through the same interface.

Rotation is linear and all ranks use the same signs for a block, so decoded blocks of several ranks may be added in
the rotated domain and encoded again there; only the last decoding rotates back.

A scale is bf16, whose exponent covers all of fp32. For Lloyd-Max levels its rounding adds 3e-6 to a relative error of
at least 2.5e-3, and is random where the codec promises no bias; for uniform levels it is rounded upwards before the
codes are chosen, so that it only widens the steps, by 0.3 % on average.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from cyclebnn_dist.comm import numba_kernels, torch_kernels
from cyclebnn_dist.comm.levels import (
    LLOYD_MAX_BITS,
    MAX_CODE_BITS,
    cell_codes,
    lloyd_max_levels,
    uniform_levels,
)
from cyclebnn_dist.comm.packing import pack, unpack
from cyclebnn_dist.comm.pieces import CAST_BYTES, Pieces
from cyclebnn_dist.comm.randomness import block_words, step_words

FORMAT_VERSION = 1
WIDTHS = (*range(1, MAX_CODE_BITS + 1), *CAST_BYTES)


@dataclass(frozen=True)
class BlockKey:
    """What a block's randomness depends on: ``parameter`` and ``block`` are int64 ``[n]``, one entry a block."""

    seed: int
    step: int
    parameter: torch.Tensor
    block: torch.Tensor


class Codec:
    """Encodes pieces of a flat gradient into messages, adds messages up, decodes them. Pure and stateless.

    Args:
        name: ``hadamard`` or ``absmax``.
        block_size: elements that share a scale; a power of two of at least 16.
        unbiased: whether scales up to 5 bits are unbiased instead of least-squares.
        backend: ``numba`` (CPU), ``torch`` (any device), or ``auto``: numba for CPU tensors.
    """

    def __init__(
        self,
        name: Literal["hadamard", "absmax"] = "hadamard",
        *,
        block_size: int = 256,
        unbiased: bool = True,
        backend: Literal["auto", "numba", "torch"] = "auto",
    ) -> None:
        assert block_size >= 16, block_size
        assert block_size & (block_size - 1) == 0, block_size
        self.name = name
        self.block_size = block_size
        self.unbiased = unbiased
        self.backend = backend
        self._rotates = name == "hadamard"
        self._rounding = torch_kernels.STOCHASTIC if unbiased else torch_kernels.NEAREST
        self._tables: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def digest(self) -> int:
        """63-bit number, equal for codecs that write the same bytes."""
        facts = (FORMAT_VERSION, self.name, self.block_size, self.unbiased)
        return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1

    def warm_up(self, device: torch.device) -> None:
        """Compile the kernels for ``device`` by encoding one block; the rotation by itself serves error feedback only."""
        size = self.block_size
        flat, rows = torch.ones(size, device=device), torch.zeros(1, size, device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        pieces = Pieces(zero, zero + size, zero, zero, zero, zero + 8)
        message = torch.zeros(8 + 4 * size, dtype=torch.uint8, device=device)
        for bits in (1, MAX_CODE_BITS, *CAST_BYTES):
            self.encode_pieces(flat, pieces, message, bits=bits, words=(0, 0), phase=1)
            self.add_pieces(message, pieces, rows, bits=bits)
            self.decode_pieces(message, pieces, flat, bits=bits, words=(0, 0))
        if not self.unbiased:
            self.rotate_rows(rows, pieces, bits=1, words=(0, 0))

    def encode(self, x: torch.Tensor, bits: int, key: BlockKey) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode fp32 blocks ``[n, block_size]`` at 1 to 8 bits.

        Returns:
            scales (bf16 ``[n]``) and packed codes (uint8 ``[n, block_size * bits / 8]``). A block with a value that
            is not finite has scale NaN, a block of zeros has scale 0.
        """
        cells, levels = self._table(bits, x.device)
        scales, codes = torch_kernels.encode_rows(
            x,
            block_words(step_words(key.seed, key.step), key.parameter, key.block),
            phase=1,
            rotates=self._rotates,
            rounding=self._rounding,
            cells=cells,
            levels=levels,
        )
        return scales, pack(codes, bits)

    def decode(self, scales: torch.Tensor, codes: torch.Tensor, bits: int, key: BlockKey) -> torch.Tensor:
        """The fp32 blocks ``[n, block_size]`` that ``encode`` wrote, up to its error."""
        _, levels = self._table(bits, codes.device)
        x = levels[unpack(codes, bits).long()] * scales.float()[:, None]
        if self._rotates:
            words = block_words(step_words(key.seed, key.step), key.parameter, key.block)
            x = torch_kernels.rotate_back(x, words)
        return x

    def encode_pieces(
        self,
        flat: torch.Tensor,
        pieces: Pieces,
        out: torch.Tensor,
        *,
        bits: int,
        words: tuple[int, int],
        phase: int,
        rotated: bool = False,
    ) -> None:
        """Write ``pieces`` of ``flat`` (fp32) into the message bytes ``out``.

        Args:
            words: ``step_words(seed, step)``.
            phase: 1 for the gradients of ranks, 2 for their mean; it separates the random rounding of scales.
            rotated: whether ``flat`` is in the domain of the codes already.
        """
        if bits in CAST_BYTES:
            if self._on_numba(flat):
                numba_kernels.encode_cast(
                    *_arrays(flat, out, pieces.source, pieces.count, pieces.codes_at), bits
                )
            else:
                torch_kernels.encode_cast(flat, out, pieces, size=self.block_size, bits=bits)
            return
        cells, levels = self._table(bits, flat.device)
        rotates = self._rotates and not rotated
        if self._on_numba(flat):
            numba_kernels.encode(
                *_arrays(flat, out, *_tables(pieces)),
                *(self.block_size, bits, *words, phase, rotates, self._rounding, *_arrays(cells, levels)),
            )
        else:
            torch_kernels.encode(
                flat,
                out,
                pieces,
                size=self.block_size,
                bits=bits,
                words=words,
                phase=phase,
                rotates=rotates,
                rounding=self._rounding,
                cells=cells,
                levels=levels,
            )

    def add_pieces(self, message: torch.Tensor, pieces: Pieces, rows: torch.Tensor, *, bits: int) -> None:
        """Add ``pieces`` of a message to fp32 ``rows [n, block_size]``, in the domain of the codes."""
        if bits in CAST_BYTES:
            if self._on_numba(rows):
                numba_kernels.add_cast(*_arrays(message, rows, pieces.count, pieces.codes_at), bits)
            else:
                torch_kernels.add_cast(message, rows, pieces, bits=bits)
            return
        _, levels = self._table(bits, rows.device)
        if self._on_numba(rows):
            numba_kernels.add(
                *_arrays(message, rows, pieces.scale_at, pieces.codes_at), bits, *_arrays(levels)
            )
        else:
            torch_kernels.add(message, rows, pieces, bits=bits, levels=levels)

    def decode_pieces(
        self, message: torch.Tensor, pieces: Pieces, flat: torch.Tensor, *, bits: int, words: tuple[int, int]
    ) -> None:
        """Write the ``pieces`` of a message into ``flat`` (fp32), rotated back."""
        if bits in CAST_BYTES:
            if self._on_numba(flat):
                numba_kernels.decode_cast(
                    *_arrays(message, flat, pieces.source, pieces.count, pieces.codes_at), bits
                )
            else:
                torch_kernels.decode_cast(message, flat, pieces, size=self.block_size, bits=bits)
            return
        _, levels = self._table(bits, flat.device)
        if self._on_numba(flat):
            numba_kernels.decode(
                *_arrays(message, flat, *_tables(pieces)),
                *(self.block_size, bits, *words, self._rotates, *_arrays(levels)),
            )
        else:
            torch_kernels.decode(
                message,
                flat,
                pieces,
                size=self.block_size,
                bits=bits,
                words=words,
                rotates=self._rotates,
                levels=levels,
            )

    def rotate_rows(
        self, rows: torch.Tensor, pieces: Pieces, *, bits: int, words: tuple[int, int], inverse: bool = False
    ) -> None:
        """Take fp32 ``rows [n, block_size]`` in place into the domain of the codes at ``bits``, or back."""
        if bits in CAST_BYTES or not self._rotates:
            return
        if self._on_numba(rows):
            numba_kernels.rotate_rows(
                *_arrays(rows, pieces.count, pieces.parameter, pieces.block), *words, inverse
            )
        else:
            torch_kernels.rotate_rows(rows, pieces, words=words, inverse=inverse)

    def _on_numba(self, tensor: torch.Tensor) -> bool:
        return self.backend == "numba" or (self.backend == "auto" and tensor.device.type == "cpu")

    def _table(self, bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if (bits, device) not in self._tables:
            assert 1 <= bits <= MAX_CODE_BITS, bits
            if self._rotates and bits <= LLOYD_MAX_BITS:
                cells, levels = cell_codes(bits), lloyd_max_levels(bits)
            else:
                cells, levels = torch.empty(0, dtype=torch.uint8), uniform_levels(bits)
            self._tables[bits, device] = (cells.to(device), levels.to(device))
        return self._tables[bits, device]


def _tables(pieces: Pieces) -> tuple[torch.Tensor, ...]:
    return (pieces.source, pieces.count, pieces.parameter, pieces.block, pieces.scale_at, pieces.codes_at)


def _arrays(*tensors: torch.Tensor) -> list:
    return [tensor.numpy() for tensor in tensors]
