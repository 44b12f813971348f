"""The casts to bf16 and fp32 on a CPU: compiled loops over pieces."""

from __future__ import annotations

import numpy as np

from cyclebnn_dist.comm.coding import BFLOAT16_NAN
from cyclebnn_dist.numba_jit import compiled


@compiled
def encode_cast(flat, out, source, count, codes_at, bits):
    """Cast pieces of ``flat`` (fp32) to fp32 or bf16 bytes in ``out`` (uint8), where they lie aligned."""
    words = flat.view(np.uint32)
    if bits == 32:
        whole = out.view(np.uint32)
        for n in range(len(source)):
            begin, at = source[n], codes_at[n] // 4
            for i in range(count[n]):
                whole[at + i] = words[begin + i]
        return
    halves = out.view(np.uint16)
    for n in range(len(source)):
        begin, at = source[n], codes_at[n] // 2
        for i in range(count[n]):
            word = words[begin + i]
            rounded = (np.int64(word) + 0x7FFF + ((word >> 16) & 1)) >> 16
            is_nan = (word & 0x7FFFFFFF) > 0x7F800000
            halves[at + i] = np.uint16(BFLOAT16_NAN if is_nan else rounded)


@compiled
def add_cast(message, rows, count, codes_at, bits):
    """Add cast pieces of ``message`` to ``rows`` (fp32 ``[n, size]``)."""
    if bits == 32:
        whole = message.view(np.float32)
        for n in range(len(rows)):
            row, at = rows[n], codes_at[n] // 4
            for i in range(count[n]):
                row[i] += whole[at + i]
        return
    halves = message.view(np.uint16)
    convert = np.empty(rows.shape[1], np.float32)
    convert_bits = convert.view(np.uint32)
    for n in range(len(rows)):
        row, at = rows[n], codes_at[n] // 2
        for i in range(count[n]):
            convert_bits[i] = np.uint32(halves[at + i]) << np.uint32(16)
        for i in range(count[n]):
            row[i] += convert[i]


@compiled
def decode_cast(message, flat, source, count, codes_at, bits):
    """Write cast pieces of ``message`` into ``flat`` (fp32)."""
    words = flat.view(np.uint32)
    if bits == 32:
        whole = message.view(np.uint32)
        for n in range(len(source)):
            begin, at = source[n], codes_at[n] // 4
            for i in range(count[n]):
                words[begin + i] = whole[at + i]
        return
    halves = message.view(np.uint16)
    for n in range(len(source)):
        begin, at = source[n], codes_at[n] // 2
        for i in range(count[n]):
            words[begin + i] = np.uint32(halves[at + i]) << np.uint32(16)
