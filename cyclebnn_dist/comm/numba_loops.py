"""The compiled loops of the codec for a CPU: one thread, one block at a time, vectorized along the block.

They compute bit for bit what ``torch_kernels`` computes: every sum has a fixed order, nothing is contracted. What
makes them fast: blocks of 256, the default, run through code for that constant; a loop reads one array and writes
another one, never the same, so that the compiler may vectorize it; and no loop looks anything up in a table. All is
in one file because numba's cache of a function does not see changes of other files: two ranks could send other bytes.
"""

from __future__ import annotations

import numpy as np

from cyclebnn_dist.comm.coding import BFLOAT16_NAN, GAUSSIAN, MINMAX, NEAREST, STOCHASTIC
from cyclebnn_dist.numba_jit import compiled, inlined

FAST = 256
F0, F1, HALF = np.float32(0), np.float32(1), np.float32(0.5)
MAGNITUDE, INFINITY_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
SIGN = np.int32(-0x80000000)


@inlined
def mix(word):
    word &= 0xFFFFFFFF
    word ^= word >> 16
    word = (word * 0x7FEB352D) & 0xFFFFFFFF
    word ^= word >> 15
    word = (word * 0x846CA68B) & 0xFFFFFFFF
    return word ^ (word >> 16)


@inlined
def block_word(low, high, parameter, block):
    return mix(mix(parameter ^ low) ^ mix(block + high))


@inlined
def draw_signs(word, sign_words, size):
    """Random words whose bit ``16 * turn + i`` of word j is the sign of element ``i * size / 16 + j``."""
    for j in range(size // 16):
        sign_words[j] = np.int32(mix(word + j * 0x9E3779B9))


@inlined
def flip(source, target, sign_words, turn, size):
    """Flip the sign bits of fp32 seen as int32. Shifts by constants vectorize, shifts by numbers that vary do not."""
    s = size // 16
    for j in range(s):
        word = sign_words[j] if turn == 1 else sign_words[j] << 16
        target[j] = source[j] ^ (np.int32(word << 15) & SIGN)
        target[j + s] = source[j + s] ^ (np.int32(word << 14) & SIGN)
        target[j + 2 * s] = source[j + 2 * s] ^ (np.int32(word << 13) & SIGN)
        target[j + 3 * s] = source[j + 3 * s] ^ (np.int32(word << 12) & SIGN)
        target[j + 4 * s] = source[j + 4 * s] ^ (np.int32(word << 11) & SIGN)
        target[j + 5 * s] = source[j + 5 * s] ^ (np.int32(word << 10) & SIGN)
        target[j + 6 * s] = source[j + 6 * s] ^ (np.int32(word << 9) & SIGN)
        target[j + 7 * s] = source[j + 7 * s] ^ (np.int32(word << 8) & SIGN)
        target[j + 8 * s] = source[j + 8 * s] ^ (np.int32(word << 7) & SIGN)
        target[j + 9 * s] = source[j + 9 * s] ^ (np.int32(word << 6) & SIGN)
        target[j + 10 * s] = source[j + 10 * s] ^ (np.int32(word << 5) & SIGN)
        target[j + 11 * s] = source[j + 11 * s] ^ (np.int32(word << 4) & SIGN)
        target[j + 12 * s] = source[j + 12 * s] ^ (np.int32(word << 3) & SIGN)
        target[j + 13 * s] = source[j + 13 * s] ^ (np.int32(word << 2) & SIGN)
        target[j + 14 * s] = source[j + 14 * s] ^ (np.int32(word << 1) & SIGN)
        target[j + 15 * s] = source[j + 15 * s] ^ (np.int32(word) & SIGN)


@inlined
def butterfly(a, b, c, d):
    e, f, g, h = a + c, b + d, a - c, b - d
    return e + f, e - f, g + h, g - h


@inlined
def two_stages(x, y, size):
    """Combine elements ``size / 2``, then ``size / 4`` apart, and write what was combined side by side (Pease 1968)."""
    s = size // 4
    for i in range(s):
        y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3] = butterfly(
            x[i], x[i + s], x[i + 2 * s], x[i + 3 * s]
        )


@inlined
def one_stage(x, y, size):
    half = size // 2
    for i in range(half):
        y[2 * i], y[2 * i + 1] = x[i] + x[i + half], x[i] - x[i + half]


@inlined
def four_stages(x, y, size):
    """Combine elements ``size / 2`` to ``size / 16`` apart, where they are."""
    s = size // 16
    for j in range(s):
        a0, a4, a8, a12 = butterfly(x[j], x[j + 4 * s], x[j + 8 * s], x[j + 12 * s])
        a1, a5, a9, a13 = butterfly(x[j + s], x[j + 5 * s], x[j + 9 * s], x[j + 13 * s])
        a2, a6, a10, a14 = butterfly(x[j + 2 * s], x[j + 6 * s], x[j + 10 * s], x[j + 14 * s])
        a3, a7, a11, a15 = butterfly(x[j + 3 * s], x[j + 7 * s], x[j + 11 * s], x[j + 15 * s])
        y[j], y[j + s], y[j + 2 * s], y[j + 3 * s] = butterfly(a0, a1, a2, a3)
        y[j + 4 * s], y[j + 5 * s], y[j + 6 * s], y[j + 7 * s] = butterfly(a4, a5, a6, a7)
        y[j + 8 * s], y[j + 9 * s], y[j + 10 * s], y[j + 11 * s] = butterfly(a8, a9, a10, a11)
        y[j + 12 * s], y[j + 13 * s], y[j + 14 * s], y[j + 15 * s] = butterfly(a12, a13, a14, a15)


@inlined
def turn(x, y, u, v, back, size):
    """``y`` = Hadamard transform of ``x``, transposed as a matrix of 16 rows (``back``: of 16 columns); u, v: scratch.

    At 256 both are the same, and the transposition is what two passes of ``two_stages`` leave behind.
    """
    if size == FAST:
        two_stages(x, u, size)
        two_stages(u, v, size)
        four_stages(v, y, size)
        return
    for i in range(size):
        u[i] = x[i]
    left = size
    while left > 1:
        if left % 4 == 0:
            two_stages(u, v, size)
            left //= 4
        else:
            one_stage(u, v, size)
            left //= 2
        for i in range(size):
            u[i] = v[i]
    rows = size // 16 if back else 16
    columns = size // rows
    for i in range(columns):
        for j in range(rows):
            y[i * rows + j] = u[j * columns + i]


@inlined
def tree_sum(x, y, lanes, size):
    """Sum of products ``x[i] * y[i]`` by halves: those ``size / 2`` apart first."""
    s = size // 16
    for j in range(s):
        p0, p8 = x[j] * y[j], x[j + 8 * s] * y[j + 8 * s]
        p1, p9 = x[j + s] * y[j + s], x[j + 9 * s] * y[j + 9 * s]
        p2, p10 = x[j + 2 * s] * y[j + 2 * s], x[j + 10 * s] * y[j + 10 * s]
        p3, p11 = x[j + 3 * s] * y[j + 3 * s], x[j + 11 * s] * y[j + 11 * s]
        p4, p12 = x[j + 4 * s] * y[j + 4 * s], x[j + 12 * s] * y[j + 12 * s]
        p5, p13 = x[j + 5 * s] * y[j + 5 * s], x[j + 13 * s] * y[j + 13 * s]
        p6, p14 = x[j + 6 * s] * y[j + 6 * s], x[j + 14 * s] * y[j + 14 * s]
        p7, p15 = x[j + 7 * s] * y[j + 7 * s], x[j + 15 * s] * y[j + 15 * s]
        even = ((p0 + p8) + (p4 + p12)) + ((p2 + p10) + (p6 + p14))
        odd = ((p1 + p9) + (p5 + p13)) + ((p3 + p11) + (p7 + p15))
        lanes[j] = even + odd
    half = s // 2
    while half > 0:
        for j in range(half):
            lanes[j] += lanes[j + half]
        half //= 2
    return lanes[0]


@inlined
def round_scale(scale_bits, rounding, word, phase):
    """The upper 16 bits of a positive fp32, rounded to nearest even, at random without bias, or upwards."""
    bits = np.int64(scale_bits)
    if rounding == STOCHASTIC:
        return (bits + (mix(word + (0x10000 + phase) * 0x9E3779B9) & 0xFFFF)) >> 16
    if rounding == NEAREST:
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (bits + 0xFFFF) >> 16


@inlined
def pack_by_4(codes, out, at, size):
    s = size // 2
    for i in range(s):
        out[at + np.uint64(i)] = (codes[i] & np.uint8(15)) | (codes[i + s] << np.uint8(4))


@inlined
def pack_by_2(codes, shift, out, at, size):
    s, two = size // 4, np.uint8(3)
    for i in range(s):
        out[at + np.uint64(i)] = (
            ((codes[i] >> shift) & two)
            | (((codes[i + s] >> shift) & two) << 2)
            | (((codes[i + 2 * s] >> shift) & two) << 4)
            | (((codes[i + 3 * s] >> shift) & two) << 6)
        )


@inlined
def pack_by_1(codes, shift, out, at, size):
    s, one = size // 8, np.uint8(1)
    for i in range(s):
        low = (
            ((codes[i] >> shift) & one)
            | (((codes[i + s] >> shift) & one) << 1)
            | (((codes[i + 2 * s] >> shift) & one) << 2)
            | (((codes[i + 3 * s] >> shift) & one) << 3)
        )
        high = (
            ((codes[i + 4 * s] >> shift) & one)
            | (((codes[i + 5 * s] >> shift) & one) << 1)
            | (((codes[i + 6 * s] >> shift) & one) << 2)
            | (((codes[i + 7 * s] >> shift) & one) << 3)
        )
        out[at + np.uint64(i)] = low | (high << 4)


@inlined
def pack(codes, bits, out, at, size):
    """The bytes of ``packing.pack``; every width has code of its own, whose shifts are constants."""
    quarter, half = at + np.uint64(size // 4), at + np.uint64(size // 2)
    if bits == 1:
        pack_by_1(codes, 0, out, at, size)
    elif bits == 2:
        pack_by_2(codes, 0, out, at, size)
    elif bits == 3:
        pack_by_2(codes, 0, out, at, size)
        pack_by_1(codes, 2, out, quarter, size)
    elif bits == 4:
        pack_by_4(codes, out, at, size)
    elif bits == 5:
        pack_by_4(codes, out, at, size)
        pack_by_1(codes, 4, out, half, size)
    elif bits == 6:
        pack_by_4(codes, out, at, size)
        pack_by_2(codes, 4, out, half, size)
    elif bits == 7:
        pack_by_4(codes, out, at, size)
        pack_by_2(codes, 4, out, half, size)
        pack_by_1(codes, 6, out, half + np.uint64(size // 4), size)
    else:
        for i in range(size):
            out[at + np.uint64(i)] = codes[i]


@inlined
def unpack_by_4(packed, at, codes, size):
    s = size // 2
    for i in range(s):
        codes[i] = packed[at + np.uint64(i)] & np.uint8(15)
        codes[i + s] = packed[at + np.uint64(i)] >> 4


@inlined
def unpack_by_2(packed, at, codes, shift, size):
    s, two = size // 4, np.uint8(3)
    for i in range(s):
        byte = packed[at + np.uint64(i)]
        a, b, c, d = byte & two, (byte >> 2) & two, (byte >> 4) & two, byte >> 6
        if shift > 0:
            codes[i] |= a << shift
            codes[i + s] |= b << shift
            codes[i + 2 * s] |= c << shift
            codes[i + 3 * s] |= d << shift
        else:
            codes[i], codes[i + s], codes[i + 2 * s], codes[i + 3 * s] = a, b, c, d


@inlined
def unpack_by_1(packed, at, codes, shift, size):
    s, one = size // 8, np.uint8(1)
    for i in range(s):
        byte = packed[at + np.uint64(i)]
        a, b, c, d = byte & one, (byte >> 1) & one, (byte >> 2) & one, (byte >> 3) & one
        e, f, g, h = (byte >> 4) & one, (byte >> 5) & one, (byte >> 6) & one, byte >> 7
        if shift > 0:
            codes[i] |= a << shift
            codes[i + s] |= b << shift
            codes[i + 2 * s] |= c << shift
            codes[i + 3 * s] |= d << shift
            codes[i + 4 * s] |= e << shift
            codes[i + 5 * s] |= f << shift
            codes[i + 6 * s] |= g << shift
            codes[i + 7 * s] |= h << shift
        else:
            codes[i], codes[i + s], codes[i + 2 * s], codes[i + 3 * s] = a, b, c, d
            codes[i + 4 * s], codes[i + 5 * s], codes[i + 6 * s], codes[i + 7 * s] = e, f, g, h


@inlined
def unpack(packed, at, bits, codes, size):
    quarter, half = at + np.uint64(size // 4), at + np.uint64(size // 2)
    if bits == 1:
        unpack_by_1(packed, at, codes, 0, size)
    elif bits == 2:
        unpack_by_2(packed, at, codes, 0, size)
    elif bits == 3:
        unpack_by_2(packed, at, codes, 0, size)
        unpack_by_1(packed, quarter, codes, 2, size)
    elif bits == 4:
        unpack_by_4(packed, at, codes, size)
    elif bits == 5:
        unpack_by_4(packed, at, codes, size)
        unpack_by_1(packed, half, codes, 4, size)
    elif bits == 6:
        unpack_by_4(packed, at, codes, size)
        unpack_by_2(packed, half, codes, 4, size)
    elif bits == 7:
        unpack_by_4(packed, at, codes, size)
        unpack_by_2(packed, half, codes, 4, size)
        unpack_by_1(packed, half + np.uint64(size // 4), codes, 6, size)
    else:
        for i in range(size):
            codes[i] = packed[at + np.uint64(i)]


@inlined
def levels_of(codes, grid, middle, scale, y, size):
    p0, p1, p2, p3 = grid[4], grid[5], grid[6], grid[7]
    for i in range(size):
        c = np.float32(codes[i]) + middle
        square = c * c
        y[i] = (c * (((p3 * square + p2) * square + p1) * square + p0)) * scale


@inlined
def _encode(
    flat, out, source, count, parameter, block, scale_at, codes_at,
    bits, kind, rounding, low, high, phase, rotates, grid, size,
):  # fmt: skip
    x, y = np.empty(size, np.float32), np.empty(size, np.float32)
    u, v = np.empty(size, np.float32), np.empty(size, np.float32)
    a, b = np.empty(size, np.float32), np.empty(size, np.float32)
    x_bits, y_bits, a_bits, b_bits = x.view(np.int32), y.view(np.int32), a.view(np.int32), b.view(np.int32)
    codes, sign_words = np.empty(size, np.uint8), np.empty(size // 16, np.int32)
    convert = np.empty(1, np.float32)
    convert_bits = convert.view(np.int32)
    flat_bits = flat.view(np.int32)
    clip, a0, a1, a2 = grid[0], grid[1], grid[2], grid[3]
    half_count, last_code = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
    middle = HALF - half_count
    for n in range(len(source)):
        present = count[n]
        begin = np.uint64(source[n])
        largest = np.int32(0)
        if present == size:
            for i in range(size):
                largest = max(largest, flat_bits[begin + np.uint64(i)] & MAGNITUDE)
        else:
            for i in range(present):
                largest = max(largest, flat_bits[begin + np.uint64(i)] & MAGNITUDE)
        finite = largest < INFINITY_BITS
        exponent = min(max(largest >> np.int32(23), np.int32(1)), np.int32(253))
        convert_bits[0] = (np.int32(254) - exponent) << np.int32(23)
        up = convert[0]
        convert_bits[0] = exponent << np.int32(23)
        down = convert[0]
        if finite and present == size:
            for i in range(size):
                x[i] = flat[begin + np.uint64(i)] * up
        else:
            padding = flat[begin] * up if finite and kind == MINMAX else F0
            for i in range(size):
                x[i] = flat[begin + np.uint64(i)] * up if finite and i < present else padding
        word = block_word(low, high, parameter[n], block[n])
        spread = F1
        if rotates:
            draw_signs(word, sign_words, size)
            flip(x_bits, y_bits, sign_words, 0, size)
            turn(y, a, u, v, False, size)
            flip(a_bits, b_bits, sign_words, 1, size)
            turn(b, x, u, v, False, size)
            spread = np.float32(size) * np.float32(size)
            down /= spread
        if kind == GAUSSIAN:
            energy = tree_sum(x, x, u, size)
            inverse = F1 / np.sqrt(energy / np.float32(size)) if energy > F0 else F0
            for i in range(size):
                number = max(-clip, min(clip, x[i] * inverse))
                square = number * number
                codes[i] = np.uint8(np.int32(number * ((a2 * square + a1) * square + a0) + half_count))
            levels_of(codes, grid, middle, F1, a, size)
            matched = tree_sum(x, a, u, size)
            if rounding == NEAREST:
                scale = matched / tree_sum(a, a, v, size)
            else:
                scale = energy / matched if matched > F0 else F0
            convert[0] = scale * down
            scale_word = round_scale(convert_bits[0], rounding, word, phase)
        elif kind == MINMAX:
            scale_word = encode_minmax(
                x, x_bits, up, down, codes, last_code, convert, convert_bits, finite, out, scale_at[n], size
            )
        else:
            top = np.int32(0)
            for i in range(size):
                top = max(top, x_bits[i] & MAGNITUDE)
            convert_bits[0] = top
            convert[0] = (convert[0] / last_code) * down
            scale_word = (np.int64(convert_bits[0]) + 0xFFFF) >> 16
            convert_bits[0] = np.int32(scale_word << 16)
            step = (convert[0] * up) * spread
            inverse = HALF / step if step > F0 else F0
            for i in range(size):
                number = max(-clip, min(clip, x[i] * inverse))
                codes[i] = np.uint8(np.int32(number + half_count))
        if not finite:
            scale_word = np.int64(BFLOAT16_NAN)
        at = scale_at[n]
        out[at] = scale_word & 255
        out[at + 1] = scale_word >> 8
        pack(codes, bits, out, np.uint64(codes_at[n]), size)


@inlined
def encode_minmax(
    x, x_bits, up, down, codes, last_code, convert, convert_bits, finite, out, at, size
):  # fmt: skip
    """Codes of ``x``; writes the least value, returns the upper half of the step, both rounded to widen the range."""
    least, most = np.int32(0x7FFFFFFF), SIGN
    for i in range(size):
        key = x_bits[i] ^ ((x_bits[i] >> np.int32(31)) & MAGNITUDE)
        least, most = min(least, key), max(most, key)
    convert_bits[0] = most ^ ((most >> np.int32(31)) & MAGNITUDE)
    highest = convert[0]
    convert_bits[0] = least ^ ((least >> np.int32(31)) & MAGNITUDE)
    convert[0] = (convert[0] + F0) * down
    bits = np.int64(convert_bits[0])
    least_word = ((bits + (0xFFFF if bits < 0 else 0)) >> 16) & 0xFFFF
    out[at + 2] = least_word & 255
    out[at + 3] = least_word >> 8
    convert_bits[0] = np.int32(least_word << 16)
    lowest = convert[0] * up
    convert[0] = ((highest - lowest) / last_code) * down
    step_word = (np.int64(convert_bits[0]) + 0xFFFF) >> 16
    convert_bits[0] = np.int32(step_word << 16)
    step = convert[0] * up
    inverse = F1 / step if step > F0 else F0
    for i in range(size):
        number = max(F0, min(last_code, (x[i] - lowest) * inverse))
        codes[i] = np.uint8(np.int32(number + HALF))
    return step_word


@compiled
def encode_256(
    flat, out, source, count, parameter, block, scale_at, codes_at,
    bits, kind, rounding, low, high, phase, rotates, grid,
):  # fmt: skip
    """``encode`` for blocks of 256."""
    _encode(
        flat, out, source, count, parameter, block, scale_at, codes_at,
        bits, kind, rounding, low, high, phase, rotates, grid, FAST,
    )  # fmt: skip


@compiled
def encode(
    flat, out, source, count, parameter, block, scale_at, codes_at,
    bits, kind, rounding, low, high, phase, rotates, grid, size,
):  # fmt: skip
    """Encode pieces of ``flat`` (fp32) into ``out`` (uint8)."""
    _encode(
        flat, out, source, count, parameter, block, scale_at, codes_at,
        bits, kind, rounding, low, high, phase, rotates, grid, size,
    )  # fmt: skip


@inlined
def read_half(message, at, convert, convert_bits):
    convert_bits[0] = (np.int32(message[at]) << np.int32(16)) | (np.int32(message[at + 1]) << np.int32(24))
    return convert[0]


@inlined
def decode_block(message, scale_at, codes_at, bits, kind, grid, codes, convert, convert_bits, y, size):
    scale = read_half(message, scale_at, convert, convert_bits)
    unpack(message, np.uint64(codes_at), bits, codes, size)
    if kind == MINMAX:
        least = read_half(message, scale_at + 2, convert, convert_bits)
        for i in range(size):
            y[i] = least + np.float32(codes[i]) * scale
    else:
        levels_of(codes, grid, HALF - np.float32(1 << (bits - 1)), scale, y, size)


@inlined
def _add(message, rows, count, scale_at, codes_at, bits, kind, grid, size):
    x, codes, convert = np.empty(size, np.float32), np.empty(size, np.uint8), np.empty(1, np.float32)
    convert_bits = convert.view(np.int32)
    for n in range(len(rows)):
        decode_block(
            message, scale_at[n], codes_at[n], bits, kind, grid, codes, convert, convert_bits, x, size
        )
        if kind != MINMAX or count[n] == size:
            for i in range(size):
                rows[n, i] += x[i]
        else:
            for i in range(count[n]):
                rows[n, i] += x[i]


@compiled
def add_256(message, rows, count, scale_at, codes_at, bits, kind, grid):
    """``add`` for blocks of 256."""
    _add(message, rows, count, scale_at, codes_at, bits, kind, grid, FAST)


@compiled
def add(message, rows, count, scale_at, codes_at, bits, kind, grid):
    """Add decoded pieces of ``message`` to ``rows`` (fp32 ``[n, size]``), without rotating back."""
    _add(message, rows, count, scale_at, codes_at, bits, kind, grid, rows.shape[1])


@inlined
def _decode(
    message, flat, source, count, parameter, block, scale_at, codes_at,
    bits, kind, low, high, rotates, grid, size,
):  # fmt: skip
    x, y = np.empty(size, np.float32), np.empty(size, np.float32)
    u, v = np.empty(size, np.float32), np.empty(size, np.float32)
    x_bits, y_bits, flat_bits = x.view(np.int32), y.view(np.int32), flat.view(np.int32)
    codes, sign_words = np.empty(size, np.uint8), np.empty(size // 16, np.int32)
    convert = np.empty(1, np.float32)
    convert_bits = convert.view(np.int32)
    for n in range(len(source)):
        decode_block(
            message, scale_at[n], codes_at[n], bits, kind, grid, codes, convert, convert_bits, x, size
        )
        if rotates:
            draw_signs(block_word(low, high, parameter[n], block[n]), sign_words, size)
            turn(x, y, u, v, True, size)
            flip(y_bits, x_bits, sign_words, 1, size)
            turn(x, y, u, v, True, size)
            flip(y_bits, x_bits, sign_words, 0, size)
        begin = np.uint64(source[n])
        if count[n] == size:
            for i in range(size):
                flat_bits[begin + np.uint64(i)] = x_bits[i]
        else:
            for i in range(count[n]):
                flat_bits[begin + np.uint64(i)] = x_bits[i]


@compiled
def decode_256(
    message, flat, source, count, parameter, block, scale_at, codes_at,
    bits, kind, low, high, rotates, grid,
):  # fmt: skip
    """``decode`` for blocks of 256."""
    _decode(
        message, flat, source, count, parameter, block, scale_at, codes_at,
        bits, kind, low, high, rotates, grid, FAST,
    )  # fmt: skip


@compiled
def decode(
    message, flat, source, count, parameter, block, scale_at, codes_at,
    bits, kind, low, high, rotates, grid, size,
):  # fmt: skip
    """Decode pieces of ``message`` into ``flat`` (fp32)."""
    _decode(
        message, flat, source, count, parameter, block, scale_at, codes_at,
        bits, kind, low, high, rotates, grid, size,
    )  # fmt: skip


@inlined
def _rotate_rows(rows, count, parameter, block, low, high, inverse, size):
    x, y = np.empty(size, np.float32), np.empty(size, np.float32)
    u, v = np.empty(size, np.float32), np.empty(size, np.float32)
    x_bits, y_bits, bits = x.view(np.int32), y.view(np.int32), rows.view(np.int32)
    sign_words = np.empty(size // 16, np.int32)
    spread = F1 / (np.float32(size) * np.float32(size))
    for n in range(len(rows)):
        draw_signs(block_word(low, high, parameter[n], block[n]), sign_words, size)
        if inverse:
            turn(rows[n], y, u, v, True, size)
            flip(y_bits, x_bits, sign_words, 1, size)
            turn(x, y, u, v, True, size)
            flip(y_bits, bits[n], sign_words, 0, size)
            for i in range(count[n], size):
                rows[n, i] = F0
        else:
            flip(bits[n], x_bits, sign_words, 0, size)
            turn(x, y, u, v, False, size)
            flip(y_bits, x_bits, sign_words, 1, size)
            turn(x, y, u, v, False, size)
            for i in range(size):
                rows[n, i] = y[i] * spread


@compiled
def rotate_rows_256(rows, count, parameter, block, low, high, inverse):
    """``rotate_rows`` for blocks of 256."""
    _rotate_rows(rows, count, parameter, block, low, high, inverse, FAST)


@compiled
def rotate_rows(rows, count, parameter, block, low, high, inverse):
    """Rotate fp32 rows ``[n, size]`` in place into the domain of the codes, or back; back, padding becomes zero."""
    _rotate_rows(rows, count, parameter, block, low, high, inverse, rows.shape[1])
