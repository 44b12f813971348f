"""The CPU kernels of the codec: numba, one thread each, without the interpreter lock.

They compute bit for bit what ``torch_kernels`` computes: every sum has a fixed order, nothing is contracted.
Compiled code is kept in numba's cache beside this file, or in the user's cache folder where this one is read-only;
where neither can be written, every process compiles for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

log = logging.getLogger(__name__)

F0, F1, HALF = np.float32(0), np.float32(1), np.float32(0.5)
CELLS_PER_UNIT, CELL_OFFSET, LAST_CELL = np.float32(128), np.float32(512), np.float32(1023)
MAGNITUDE, INFINITY_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
BFLOAT16_NAN = 0x7FC0
NEAREST, STOCHASTIC, UPWARD = 0, 1, 2


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.njit`` without the interpreter lock, IEEE arithmetic, cached on disk where that is possible."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        log.info("compiled kernels are not kept on disk: %s", error)
        return numba.njit(**options)(function)


@compiled
def mix(word):
    word &= 0xFFFFFFFF
    word ^= word >> 16
    word = (word * 0x7FEB352D) & 0xFFFFFFFF
    word ^= word >> 15
    word = (word * 0x846CA68B) & 0xFFFFFFFF
    return word ^ (word >> 16)


@compiled
def block_word(low, high, parameter, block):
    return mix(mix(parameter ^ low) ^ mix(block + high))


@compiled
def apply_signs(x_bits, word, turn):
    """Flip the sign bits of ``x_bits`` (int32 view of fp32) at random: element ``i * n + j`` by bit i of word j of n."""
    num_words = max(1, len(x_bits) // 32)
    words = np.empty(num_words, np.int32)
    for j in range(num_words):
        words[j] = np.int32(mix(word + (turn * num_words + j) * 0x9E3779B9))
    for i in range(len(x_bits) // num_words):
        for j in range(num_words):
            x_bits[i * num_words + j] ^= ((words[j] >> np.int32(i)) & np.int32(1)) << np.int32(31)


@compiled
def two_stages(x, y):
    quarter = len(x) // 4
    for i in range(quarter):
        a, b, c, d = x[i], x[i + quarter], x[i + 2 * quarter], x[i + 3 * quarter]
        e, f, g, h = a + c, b + d, a - c, b - d
        y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3] = e + f, e - f, g + h, g - h


@compiled
def hadamard(x, y):
    """Multiply ``x`` by the Hadamard matrix in place, with ``y`` as scratch memory of the same length.

    Each stage combines elements half the length apart and writes the pair side by side, so that all stages read and
    write alike (Pease 1968) and vectorize; two are done in one pass.
    """
    passes = 0
    while (1 << (2 * passes)) < len(x):
        passes += 1
    odd = (1 << (2 * passes)) > len(x)
    into_y = True
    for _ in range(passes - odd):
        if into_y:
            two_stages(x, y)
        else:
            two_stages(y, x)
        into_y = not into_y
    source = x if into_y else y
    if odd:
        target = y if into_y else x
        half = len(x) // 2
        for i in range(half):
            a, b = source[i], source[i + half]
            target[2 * i], target[2 * i + 1] = a + b, a - b
        source = target
        into_y = not into_y
    if not into_y:
        for i in range(len(x)):
            x[i] = y[i]


@compiled
def rotate(x, x_bits, scratch, word):
    """Two turns of random signs and a Hadamard matrix, unscaled: lengths grow by ``len(x)``."""
    apply_signs(x_bits, word, 0)
    hadamard(x, scratch)
    apply_signs(x_bits, word, 1)
    hadamard(x, scratch)


@compiled
def rotate_back(x, x_bits, scratch, word):
    """The transpose of ``rotate``, unscaled."""
    hadamard(x, scratch)
    apply_signs(x_bits, word, 1)
    hadamard(x, scratch)
    apply_signs(x_bits, word, 0)


@compiled
def tree_sum(x):
    """Sum of ``x`` by halves: ``x[i] + x[i + len / 2]`` first. Destroys ``x``; its length is a power of two."""
    half = len(x) // 2
    while half > 0:
        for i in range(half):
            x[i] += x[i + half]
        half //= 2
    return x[0]


@compiled
def round_scale(scale_bits, rounding, word, phase):
    """The upper 16 bits of a positive fp32, rounded to nearest even, at random without bias, or upwards."""
    bits = np.int64(scale_bits)
    if rounding == UPWARD:
        return (bits + 0xFFFF) >> 16
    if rounding == STOCHASTIC:
        return (bits + (mix(word + (0x10000 + phase) * 0x9E3779B9) & 0xFFFF)) >> 16
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@compiled
def pack(codes, bits, out):
    size = len(codes)
    if bits == 8:
        for i in range(size):
            out[i] = codes[i]
        return
    start, shift = 0, np.uint8(0)
    if bits & 4:
        length = size // 2
        for i in range(length):
            out[i] = ((codes[i] >> shift) & np.uint8(15)) | ((codes[i + length] >> shift) << np.uint8(4))
        start, shift = length, np.uint8(4)
    if bits & 2:
        length = size // 4
        part = out[start : start + length]
        for i in range(length):
            low = ((codes[i] >> shift) & np.uint8(3)) | (
                ((codes[i + length] >> shift) & np.uint8(3)) << np.uint8(2)
            )
            high = ((codes[i + 2 * length] >> shift) & np.uint8(3)) | (
                ((codes[i + 3 * length] >> shift) & np.uint8(3)) << np.uint8(2)
            )
            part[i] = low | (high << np.uint8(4))
        start, shift = start + length, shift + np.uint8(2)
    if bits & 1:
        length = size // 8
        part = out[start : start + length]
        for i in range(length):
            part[i] = (codes[i] >> shift) & np.uint8(1)
        for position in range(1, 8):
            for i in range(length):
                part[i] |= ((codes[i + position * length] >> shift) & np.uint8(1)) << np.uint8(position)


@compiled
def unpack(packed, bits, codes):
    size = len(codes)
    if bits == 8:
        for i in range(size):
            codes[i] = packed[i]
        return
    for i in range(size):
        codes[i] = np.uint8(0)
    start, shift = 0, np.uint8(0)
    if bits & 4:
        length = size // 2
        for i in range(length):
            codes[i] = packed[i] & np.uint8(15)
        for i in range(length):
            codes[i + length] = packed[i] >> np.uint8(4)
        start, shift = length, np.uint8(4)
    if bits & 2:
        length = size // 4
        part = packed[start : start + length]
        for position in range(4):
            for i in range(length):
                value = (part[i] >> np.uint8(2 * position)) & np.uint8(3)
                codes[i + position * length] |= value << shift
        start, shift = start + length, shift + np.uint8(2)
    if bits & 1:
        length = size // 8
        part = packed[start : start + length]
        for position in range(8):
            for i in range(length):
                value = (part[i] >> np.uint8(position)) & np.uint8(1)
                codes[i + position * length] |= value << shift


@compiled
def encode(
    flat, out, source, count, parameter, block, scale_at, codes_at,
    size, bits, low, high, phase, rotates, rounding, cells, levels,
):  # fmt: skip
    """Encode pieces of ``flat`` (fp32) into ``out`` (uint8). ``cells`` is empty for uniform levels."""
    x = np.empty(size, np.float32)
    x_bits = x.view(np.int32)
    products = np.empty(size, np.float32)
    chosen = np.empty(size, np.float32)
    cell_of = np.empty(size, np.int32)
    codes = np.empty(size, np.uint8)
    convert = np.empty(1, np.float32)
    convert_bits = convert.view(np.int32)
    lloyd_max = len(cells) > 0
    last_code = np.float32(len(levels) - 1)
    middle = np.float32(len(levels) // 2)
    num_bytes = size * bits // 8
    for n in range(len(source)):
        begin, present = source[n], count[n]
        for i in range(present):
            x[i] = flat[begin + i]
        for i in range(present, size):
            x[i] = F0
        largest = np.int32(0)
        for i in range(size):
            largest = max(largest, x_bits[i] & MAGNITUDE)
        finite = largest < INFINITY_BITS
        exponent = min(max(largest >> np.int32(23), np.int32(1)), np.int32(253))
        convert_bits[0] = (np.int32(254) - exponent) << np.int32(23)
        up = convert[0] if finite else F0
        convert_bits[0] = exponent << np.int32(23)
        down = convert[0]
        if finite:
            for i in range(size):
                x[i] *= up
        else:
            for i in range(size):
                x[i] = F0
        word = block_word(low, high, parameter[n], block[n])
        spread = F1
        if rotates:
            rotate(x, x_bits, products, word)
            spread = np.float32(size) * np.float32(size)
            down /= spread
        if lloyd_max:
            for i in range(size):
                products[i] = x[i] * x[i]
            energy = tree_sum(products)
            inverse = F1 / np.sqrt(energy / np.float32(size)) if energy > F0 else F0
            for i in range(size):
                cell = (x[i] * inverse) * CELLS_PER_UNIT + CELL_OFFSET
                cell = cell if cell > F0 else F0
                cell_of[i] = np.int32(cell if cell < LAST_CELL else LAST_CELL)
            for i in range(size):
                codes[i] = cells[cell_of[i]]
            for i in range(size):
                chosen[i] = levels[codes[i]]
            for i in range(size):
                products[i] = x[i] * chosen[i]
            matched = tree_sum(products)
            if rounding == NEAREST:
                for i in range(size):
                    products[i] = chosen[i] * chosen[i]
                scale = matched / tree_sum(products)
            else:
                scale = energy / matched if matched > F0 else F0
            convert[0] = scale * down
            scale_word = round_scale(convert_bits[0], rounding, word, phase)
        else:
            top = np.int32(0)
            for i in range(size):
                top = max(top, x_bits[i] & MAGNITUDE)
            convert_bits[0] = top
            convert[0] = (convert[0] / last_code) * down
            scale_word = round_scale(convert_bits[0], UPWARD, word, phase)
            convert_bits[0] = np.int32(scale_word << 16)
            step = (convert[0] * up) * spread
            inverse = HALF / step if step > F0 else F0
            for i in range(size):
                code = x[i] * inverse + middle
                code = code if code > F0 else F0
                codes[i] = np.uint8(np.int32(code if code < last_code else last_code))
        if not finite:
            scale_word = np.int64(BFLOAT16_NAN)
        at = scale_at[n]
        out[at] = scale_word & 255
        out[at + 1] = scale_word >> 8
        at = codes_at[n]
        pack(codes, bits, out[at : at + num_bytes])


@compiled
def read_scale(message, at, convert, convert_bits):
    convert_bits[0] = (np.int32(message[at]) << np.int32(16)) | (np.int32(message[at + 1]) << np.int32(24))
    return convert[0]


@compiled
def add(message, rows, scale_at, codes_at, bits, levels):
    """Add decoded pieces of ``message`` to ``rows`` (fp32 ``[n, size]``), without rotating back."""
    size = rows.shape[1]
    codes = np.empty(size, np.uint8)
    convert = np.empty(1, np.float32)
    convert_bits = convert.view(np.int32)
    num_bytes = size * bits // 8
    for n in range(len(rows)):
        scale = read_scale(message, scale_at[n], convert, convert_bits)
        at = codes_at[n]
        unpack(message[at : at + num_bytes], bits, codes)
        row = rows[n]
        for i in range(size):
            row[i] += levels[codes[i]] * scale


@compiled
def decode(
    message, flat, source, count, parameter, block, scale_at, codes_at, size, bits, low, high, rotates, levels,
):  # fmt: skip
    """Decode pieces of ``message`` into ``flat`` (fp32)."""
    x = np.empty(size, np.float32)
    x_bits = x.view(np.int32)
    codes = np.empty(size, np.uint8)
    convert = np.empty(1, np.float32)
    convert_bits = convert.view(np.int32)
    scratch = np.empty(size, np.float32)
    num_bytes = size * bits // 8
    for n in range(len(source)):
        scale = read_scale(message, scale_at[n], convert, convert_bits)
        at = codes_at[n]
        unpack(message[at : at + num_bytes], bits, codes)
        for i in range(size):
            x[i] = levels[codes[i]] * scale
        if rotates:
            rotate_back(x, x_bits, scratch, block_word(low, high, parameter[n], block[n]))
        begin = source[n]
        for i in range(count[n]):
            flat[begin + i] = x[i]


@compiled
def rotate_rows(rows, count, parameter, block, low, high, inverse):
    """Rotate fp32 rows ``[n, size]`` in place into the domain of the codes, or back; back, padding becomes zero."""
    size = rows.shape[1]
    bits = rows.view(np.int32)
    scratch = np.empty(size, np.float32)
    spread = F1 / (np.float32(size) * np.float32(size))
    for n in range(len(rows)):
        word = block_word(low, high, parameter[n], block[n])
        if inverse:
            rotate_back(rows[n], bits[n], scratch, word)
            for i in range(count[n], size):
                rows[n, i] = F0
        else:
            rotate(rows[n], bits[n], scratch, word)
            for i in range(size):
                rows[n, i] *= spread


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
