"""What the GPU kernels do to one block: randomness, rotation, sums, codes, packing; Triton functions of a block in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from cyclebnn_dist.comm import coding as codings

GAUSSIAN = tl.constexpr(codings.GAUSSIAN)
MINMAX = tl.constexpr(codings.MINMAX)
NEAREST = tl.constexpr(codings.NEAREST)
STOCHASTIC = tl.constexpr(codings.STOCHASTIC)
BFLOAT16_NAN = tl.constexpr(codings.BFLOAT16_NAN)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def mix(word):
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def block_word(low, high, parameter, block):
    first = mix(parameter.to(tl.uint32) ^ low.to(tl.uint32))
    return mix(first ^ mix(block.to(tl.uint32) + high.to(tl.uint32)))


@triton.jit
def flip(x, word, TURN: tl.constexpr, SIZE: tl.constexpr):
    element = tl.arange(0, SIZE)
    column = (element % (SIZE // 16)).to(tl.uint32)
    row = (element // (SIZE // 16)).to(tl.uint32)
    signs = (mix(word + column * 0x9E3779B9) >> (row + 16 * TURN)) << 31
    return (x.to(tl.uint32, bitcast=True) ^ signs).to(tl.float32, bitcast=True)


@triton.jit
def turn(x, BACK: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    for stage in tl.static_range(LOG_SIZE):
        pairs = tl.reshape(x, (1 << stage, 2, SIZE >> (stage + 1)))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (SIZE,))
    if BACK:
        x = tl.reshape(tl.trans(tl.reshape(x, (SIZE // 16, 16))), (SIZE,))
    else:
        x = tl.reshape(tl.trans(tl.reshape(x, (16, SIZE // 16))), (SIZE,))
    return x


@triton.jit
def rotate(x, word, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    x = turn(flip(x, word, 0, SIZE), False, SIZE, LOG_SIZE)
    return turn(flip(x, word, 1, SIZE), False, SIZE, LOG_SIZE)


@triton.jit
def rotate_back(x, word, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    x = flip(turn(x, True, SIZE, LOG_SIZE), word, 1, SIZE)
    return flip(turn(x, True, SIZE, LOG_SIZE), word, 0, SIZE)


@triton.jit
def tree_sum(x, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    for stage in tl.static_range(LOG_SIZE):
        x = tl.sum(tl.reshape(x, (2, SIZE >> (stage + 1))), 0)
    return tl.sum(x, 0)


@triton.jit
def levels_of(codes, grid, BITS: tl.constexpr):
    c = codes.to(tl.float32) + (0.5 - (1 << (BITS - 1)))
    square = c * c
    p = tl.load(grid + 7) * square + tl.load(grid + 6)
    p = p * square + tl.load(grid + 5)
    return c * (p * square + tl.load(grid + 4))


@triton.jit
def codes_of(x, grid, BITS: tl.constexpr):
    clip = tl.load(grid)
    u = tl.minimum(tl.maximum(x, -clip), clip)
    square = u * u
    a = (tl.load(grid + 3) * square + tl.load(grid + 2)) * square + tl.load(grid + 1)
    return (u * a + (1 << (BITS - 1))).to(tl.int32)


@triton.jit
def power_of_two(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_up(scale):
    return (scale.to(tl.uint32, bitcast=True) + 0xFFFF) >> 16


@triton.jit
def half_to_float(half):
    return (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_half(out, half):
    tl.store(out, (half & 0xFF).to(tl.uint8))
    tl.store(out + 1, ((half >> 8) & 0xFF).to(tl.uint8))


@triton.jit
def load_half(message):
    return half_to_float(tl.load(message).to(tl.uint32) | (tl.load(message + 1).to(tl.uint32) << 8))


@triton.jit
def store_part(codes, out, SHIFT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    LENGTH: tl.constexpr = SIZE * WIDTH // 8
    part = tl.reshape((codes >> SHIFT) & ((1 << WIDTH) - 1), (8 // WIDTH, LENGTH))
    merged = tl.sum(part << (WIDTH * tl.arange(0, 8 // WIDTH))[:, None], 0)
    tl.store(out + tl.arange(0, LENGTH), merged.to(tl.uint8))
    return out + LENGTH


@triton.jit
def pack(codes, out, BITS: tl.constexpr, SIZE: tl.constexpr):
    if BITS == 8:
        tl.store(out + tl.arange(0, SIZE), codes.to(tl.uint8))
    else:
        if BITS & 4:
            out = store_part(codes, out, 0, 4, SIZE)
        if BITS & 2:
            out = store_part(codes, out, BITS & 4, 2, SIZE)
        if BITS & 1:
            out = store_part(codes, out, BITS & 6, 1, SIZE)


@triton.jit
def load_part(message, SHIFT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    LENGTH: tl.constexpr = SIZE * WIDTH // 8
    element = tl.arange(0, SIZE)
    byte = tl.load(message + element % LENGTH).to(tl.int32)
    return ((byte >> (element // LENGTH * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT


@triton.jit
def unpack(message, BITS: tl.constexpr, SIZE: tl.constexpr):
    if BITS == 8:
        codes = load_part(message, 0, 8, SIZE)
    else:
        codes = tl.zeros((SIZE,), tl.int32)
        if BITS & 4:
            codes = codes | load_part(message, 0, 4, SIZE)
            message += SIZE // 2
        if BITS & 2:
            codes = codes | load_part(message, BITS & 4, 2, SIZE)
            message += SIZE // 4
        if BITS & 1:
            codes = codes | load_part(message, BITS & 6, 1, SIZE)
    return codes


@triton.jit
def decoded(message, scale_at, codes_at, grid, BITS: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr):
    scales = message + scale_at
    codes = unpack(message + codes_at, BITS, SIZE)
    if KIND == MINMAX:
        x = load_half(scales + 2) + codes.to(tl.float32) * load_half(scales)
    else:
        x = levels_of(codes, grid, BITS) * load_half(scales)
    return x
