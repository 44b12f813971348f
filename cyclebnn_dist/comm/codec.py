"""The codec: what turns blocks of a gradient into scales and codes of 1 to 8 bits, and back. It knows no ranks.

``hadamard`` rotates a block by two turns of random signs and a Hadamard transform, which makes its elements nearly
Gaussian whatever they were (after a single turn a sparse block is neither Gaussian nor unbiased), and rounds them to
Lloyd-Max levels (up to 5 bits) or uniform ones between the extremes (6 to 8). Up to 5 bits a scale either makes the
decoded block unbiased over the random signs (EDEN, Vargaftik et al. 2022), or minimizes its squared error, which is
right where error feedback makes up for the bias.

``absmax`` and ``minmax`` are what others use: no rotation, rounding to the nearest of uniform levels, from minus to
plus the largest magnitude, or from the least to the largest value (as CGX, Markov et al. 2022). Widths of 16 and 32
bits are casts to bf16 and fp32 through the same interface.

A block that is mostly padding is rotated as a whole, however few elements are present, and the error of these is at
most that of a full block: what padding takes of it is thrown away.

Rotation is linear and all ranks use the same signs for a block, so decoded blocks of several ranks may be added in
the rotated domain and encoded again there; only the last decoding rotates back.

A scale is bf16, whose exponent covers all of fp32. For Lloyd-Max levels its rounding adds 3e-6 to a relative error of
at least 2.5e-3, and is random where the codec promises no bias; for uniform levels it is rounded upwards before the
codes are chosen, so that it only widens the steps, by 0.3 % on average.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Literal

import torch

from cyclebnn_dist.comm import numba_kernels, torch_kernels
from cyclebnn_dist.comm.coding import CodecName, Coding, build_coding
from cyclebnn_dist.comm.levels import MAX_CODE_BITS
from cyclebnn_dist.comm.packing import pack, unpack
from cyclebnn_dist.comm.pieces import CAST_BYTES, Pieces
from cyclebnn_dist.comm.randomness import block_words, step_words

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
WIDTHS = (*range(1, MAX_CODE_BITS + 1), *CAST_BYTES)


@dataclass(frozen=True)
class BlockKey:
    """What a block's randomness depends on: ``parameter`` and ``block`` are int64 ``[n]``, one entry a block."""

    seed: int
    step: int
    parameter: torch.Tensor
    block: torch.Tensor


def scale_bytes(name: CodecName, bits: int) -> int:
    """Bytes a message of a codec holds per block beside its codes; none at the widths of casts."""
    return 0 if bits in CAST_BYTES else 4 if name == "minmax" else 2


class Codec:
    """Encodes pieces of a flat gradient into messages, adds messages up, decodes them. Pure and stateless.

    Args:
        name: ``hadamard``, ``absmax`` or ``minmax``.
        block_size: elements that share a scale; a power of two of at least 16.
        unbiased: whether scales up to 5 bits are unbiased instead of least-squares.
        backend: ``numba`` (CPU), ``triton`` (GPU), ``torch`` (any device), or ``auto``: numba for CPU tensors, triton
            for those of a GPU where it is installed. All write the same bytes.
    """

    def __init__(
        self,
        name: CodecName = "hadamard",
        *,
        block_size: int = 256,
        unbiased: bool = True,
        backend: Literal["auto", "numba", "torch", "triton"] = "auto",
    ) -> None:
        assert block_size >= 16, block_size
        assert block_size & (block_size - 1) == 0, block_size
        self.name = name
        self.block_size = block_size
        self.unbiased = unbiased
        self.backend = backend
        self._rotates = name == "hadamard"
        self._codings: dict[tuple[int, torch.device], Coding] = {}

    @cached_property
    def digest(self) -> int:
        """63-bit number, equal for codecs that write the same bytes."""
        facts = (FORMAT_VERSION, self.name, self.block_size, self.unbiased)
        return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1

    def scale_bytes(self, bits: int) -> int:
        """Bytes a message holds per block beside its codes."""
        return scale_bytes(self.name, bits)

    def warm_up(self, device: torch.device, *, rotating: bool) -> None:
        """Compile the kernels for ``device`` by encoding one block.

        Args:
            rotating: whether rows will be rotated by themselves, as error feedback and a reduce-scatter do.
        """
        size = self.block_size
        flat, rows = torch.ones(size, device=device), torch.zeros(1, size, device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        pieces = Pieces(zero, zero + size, zero, zero, zero, zero + 8)
        message = torch.zeros(8 + 4 * size, dtype=torch.uint8, device=device)
        for bits in WIDTHS:
            self.encode_pieces(flat, pieces, message, bits=bits, words=(0, 0), phase=1)
            self.add_pieces(message, pieces, rows, bits=bits)
            self.decode_pieces(message, pieces, flat, bits=bits, words=(0, 0))
        if rotating:
            self.rotate_rows(rows, pieces, bits=1, words=(0, 0))

    def encode(self, x: torch.Tensor, bits: int, key: BlockKey) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode fp32 blocks ``[n, block_size]`` at 1 to 8 bits.

        Returns:
            scales (bf16 ``[n, 1]``; ``[n, 2]`` of minmax: step and least value) and packed codes (uint8 ``[n, block_size
            * bits / 8]``). A block with a value that is not finite has scale NaN, a block of zeros has scale 0.
        """
        words = block_words(step_words(key.seed, key.step), key.parameter, key.block)
        coding = self._coding(bits, x.device)
        scales, codes = torch_kernels.encode_rows(x, words, coding, phase=1, rotates=coding.rotates)
        return scales, pack(codes, bits)

    def decode(self, scales: torch.Tensor, codes: torch.Tensor, bits: int, key: BlockKey) -> torch.Tensor:
        """The fp32 blocks ``[n, block_size]`` that ``encode`` wrote, up to its error."""
        coding = self._coding(bits, codes.device)
        x = torch_kernels.decode_rows(scales, unpack(codes, bits), coding)
        if coding.rotates:
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
        kernels = self._kernels(flat)
        if bits in CAST_BYTES:
            kernels.encode_cast(flat, out, pieces, size=self.block_size, bits=bits)
            return
        coding = self._coding(bits, flat.device)
        rotates = coding.rotates and not rotated
        kernels.encode(flat, out, pieces, coding, words=words, phase=phase, rotates=rotates)

    def add_pieces(self, message: torch.Tensor, pieces: Pieces, rows: torch.Tensor, *, bits: int) -> None:
        """Add ``pieces`` of a message to fp32 ``rows [n, block_size]``, in the domain of the codes."""
        if bits in CAST_BYTES:
            self._kernels(rows).add_cast(message, rows, pieces, bits=bits)
        else:
            self._kernels(rows).add(message, rows, pieces, self._coding(bits, rows.device))

    def decode_pieces(
        self, message: torch.Tensor, pieces: Pieces, flat: torch.Tensor, *, bits: int, words: tuple[int, int]
    ) -> None:
        """Write the ``pieces`` of a message into ``flat`` (fp32), rotated back."""
        if bits in CAST_BYTES:
            self._kernels(flat).decode_cast(message, flat, pieces, size=self.block_size, bits=bits)
        else:
            self._kernels(flat).decode(message, flat, pieces, self._coding(bits, flat.device), words=words)

    def rotate_rows(
        self, rows: torch.Tensor, pieces: Pieces, *, bits: int, words: tuple[int, int], inverse: bool = False
    ) -> None:
        """Take fp32 ``rows [n, block_size]`` in place into the domain of the codes at ``bits``, or back."""
        if bits not in CAST_BYTES and self._rotates:
            self._kernels(rows).rotate_rows(rows, pieces, words=words, inverse=inverse)

    def _kernels(self, tensor: torch.Tensor) -> ModuleType:
        backend = self.backend
        if backend == "auto":
            backend = "numba" if tensor.device.type == "cpu" else gpu_backend()
        if backend == "triton":
            return importlib.import_module("cyclebnn_dist.comm.triton_kernels")
        return numba_kernels if backend == "numba" else torch_kernels

    def _coding(self, bits: int, device: torch.device) -> Coding:
        if (bits, device) not in self._codings:
            self._codings[bits, device] = build_coding(
                self.name, bits=bits, block_size=self.block_size, unbiased=self.unbiased, device=device
            )
        return self._codings[bits, device]


@cache
def gpu_backend() -> Literal["torch", "triton"]:
    """``triton`` where it is installed, else ``torch``, with a warning."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        log.warning(
            "triton is not installed: torch operators encode the gradients, which is slower (%s)", error
        )
        return "torch"
    return "triton"
