"""Kernels for binary layers on CPUs: numba, fp32, each in one or two passes over memory where torch's operators take ten.

They run in one thread: beside torch's own threads, which wait for work by spinning, a second one costs more than it brings.

They compute what the torch code beside their callers computes; that code runs everywhere else. Tensors come as matrices in
the order of memory. Compiled code is kept on disk (see ``numba_jit``).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cyclebnn_dist.binary.layouts import is_channels_last
from cyclebnn_dist.numba_jit import compiled

CHUNK = 2048
F0, F1, F2, NONE = np.float32(0), np.float32(1), np.float32(2), np.float32(-1)
UNIT = np.float32(2.0**-24)
NOISE_MASK = np.int32((1 << 24) - 1)

reassociating = partial(compiled, reassociate=True)


def usable(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels are for these tensors: fp32 (or ``dtype``) on the CPU, in a plain or the channels-last layout.

    They are not for a graph that is being compiled.
    """
    if torch.compiler.is_compiling():
        return False
    return all(
        x.device.type == "cpu"
        and x.dtype == dtype
        and x.numel()
        and (x.is_contiguous() or is_channels_last(x))
        for x in tensors
    )


def arrays(*arguments: Any) -> list[Any]:
    """``arguments`` with arrays that share their memory in the place of tensors."""
    return [x.detach().numpy() if isinstance(x, Tensor) else x for x in arguments]


@compiled
def sign_rows(start, stop, x, offset, signs):
    """signs[i, j] = 1 where x[i, j] + offset[i] >= 0, else -1; offsets repeat where there are fewer than rows."""
    for i in range(start, stop):
        edge = -offset[i % offset.size]
        for j in range(x.shape[1]):
            signs[i, j] = F1 if x[i, j] >= edge else NONE


@compiled
def pack_within(start, stop, x, low, high, bits):
    """Bits of low <= x <= high, for the bytes from ``start`` to ``stop``."""
    x, bits = x[8 * start : 8 * stop], bits[start:stop]
    for i in range(x.size // 8):
        byte = np.uint32(0)
        for j in range(8):
            v = x[8 * i + j]
            byte |= (np.uint32(v >= low) & np.uint32(v <= high)) << np.uint32(j)
        bits[i] = byte
    if x.size % 8:
        byte = np.uint32(0)
        for j in range(x.size % 8):
            v = x[x.size // 8 * 8 + j]
            byte |= np.uint32(v >= low and v <= high) << np.uint32(j)
        bits[x.size // 8] = byte


@compiled
def unpack(start, stop, bits, low, high, y):
    y, bits = y[8 * start : 8 * stop], bits[start:stop]
    for i in range(y.size // 8):
        byte = np.uint32(bits[i])
        for j in range(8):
            y[8 * i + j] = high if (byte >> np.uint32(j)) & np.uint32(1) else low
    for j in range(y.size // 8 * 8, y.size):
        y[j] = high if (bits[j // 8] >> np.uint8(j % 8)) & np.uint8(1) else low


@compiled
def mask(start, stop, bits, x, y):
    """y = x where a bit is set, else 0 times x."""
    x, y, bits = x[8 * start : 8 * stop], y[8 * start : 8 * stop], bits[start:stop]
    for i in range(y.size // 8):
        byte = np.uint32(bits[i])
        for j in range(8):
            y[8 * i + j] = x[8 * i + j] * np.float32(np.int32((byte >> np.uint32(j)) & np.uint32(1)))
    for j in range(y.size // 8 * 8, y.size):
        y[j] = x[j] * np.float32((bits[j // 8] >> np.uint8(j % 8)) & np.uint8(1))


@compiled
def surrogate_times(start, stop, x, grad, polynomial, result):
    """grad where |x| <= 1, else 0 times grad; or max(0, 2 - 2|x|) times grad. Elements from ``start`` to ``stop``."""
    x, grad, result = x[start:stop], grad[start:stop], result[start:stop]
    if polynomial:
        for j in range(x.size):
            result[j] = max(F2 - F2 * abs(x[j]), F0) * grad[j]
    else:
        for j in range(x.size):
            result[j] = np.float32(abs(x[j]) <= F1) * grad[j]


@reassociating
def sums(x, origin):
    """Of x - origin, and of its squares."""
    total, squares = F0, F0
    for j in range(x.size):
        value = x[j] - origin
        total += value
        squares += value * value
    return np.float64(total), np.float64(squares)


@compiled
def extremes(x_bits):
    """Lowest and highest of fp32 numbers as integers of the same order, which compare faster."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(x_bits.size):
        key = ordered(x_bits[j])
        low, high = min(low, key), max(high, key)
    return low, high


@compiled
def ordered(bits):
    """The bits of an fp32 number as an integer of the same order, and back again."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def row_statistics(start, stop, x, x_bits, epsilon, statistics, statistics_bits):
    """statistics [4, rows]: mean, root of the unbiased variance plus epsilon, lowest and highest value of each row."""
    numel = x.shape[1]
    for i in range(start, stop):
        total, squares, low, high = 0.0, 0.0, np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        # Near the mean, so that squares do not drown the variance.
        origin = x[i, 0]
        for begin in range(0, numel, CHUNK):
            more, more_squares = sums(x[i, begin : begin + CHUNK], origin)
            total += more
            squares += more_squares
            least, most = extremes(x_bits[i, begin : begin + CHUNK])
            low, high = min(low, least), max(high, most)
        variance = (squares - total * total / numel) / max(1, numel - 1)
        statistics[0, i] = np.float32(origin + total / numel)
        if math.isnan(variance):
            statistics[1:, i] = np.nan
        else:
            statistics[1, i] = np.float32(math.sqrt(max(0.0, variance) + epsilon))
            statistics_bits[2, i] = ordered(low)
            statistics_bits[3, i] = ordered(high)


@compiled
def standardized_gradient(
    start, stop, x, grad, mean, deviation, low, step, gain, polynomial, quantized, result
):
    """The gradient of ``StandardizedSign``, row by row; low and step are one number each or one a row."""
    numel = x.shape[1]
    for i in range(start, stop):
        factor = gain / deviation[i]
        row_low, row_step = low[i % low.size], step[i % step.size]
        scale, shift = factor / row_step, row_low / row_step
        inner = 0.0
        for begin in range(0, numel, CHUNK):
            end = min(numel, begin + CHUNK)
            out = result[i, begin:end]
            if polynomial:
                surrogate_gradient(
                    x[i, begin:end],
                    grad[i, begin:end],
                    scale,
                    shift,
                    row_low,
                    row_step,
                    factor,
                    quantized,
                    out,
                )
            else:
                for j in range(end - begin):
                    out[j] = grad[i, begin + j]
            inner += inner_product(out, x[i, begin:end])
        pull = np.float32(inner * factor / ((numel - 1) * np.float64(deviation[i]) ** 2)) if numel > 1 else F0
        constant = mean[i] * pull
        for j in range(numel):
            result[i, j] = result[i, j] * factor - x[i, j] * pull + constant


@compiled
def surrogate_gradient(x, grad, scale, shift, low, step, factor, quantized, out):
    if quantized:
        for j in range(x.size):
            value = np.rint(x[j] * scale - shift) * step + low
            out[j] = max(F2 - F2 * abs(value), F0) * grad[j]
    else:
        for j in range(x.size):
            out[j] = max(F2 - F2 * abs(x[j] * factor), F0) * grad[j]


@reassociating
def inner_product(x, y):
    total = F0
    for j in range(x.size):
        total += x[j] * y[j]
    return np.float64(total)


@compiled
def row_products(start, stop, x, y, products):
    """The inner product of each row of x with that of y, in fp64."""
    for i in range(start, stop):
        total = 0.0
        for begin in range(0, x.shape[1], CHUNK):
            total += inner_product(x[i, begin : begin + CHUNK], y[i, begin : begin + CHUNK])
        products[i] = total


@compiled
def quantize_scaled(start, stop, grad, scale, low, step, key, noise, result):
    """result = floor((grad scale - low) / step + uniform) step + low, rows of grad times scale[row % channels].

    The uniform number of an element is that of ``functions.uniform_like``.
    """
    numel, width = grad.shape[1], noise.size
    for i in range(start, stop):
        row_scale = scale[i % scale.size]
        place = i * numel
        done = 0
        while done < numel:
            row, column = (place + done) // width, (place + done) % width
            count = min(numel - done, width - column)
            rotation = np.int32(np.int64(row) * np.int64(key[0]) + np.int64(key[1]))
            quantize_piece(
                grad[i, done : done + count],
                row_scale,
                low,
                step,
                noise[column : column + count],
                rotation,
                result[i, done : done + count],
            )
            done += count


@compiled
def quantize_piece(grad, scale, low, step, noise, rotation, result):
    for j in range(grad.size):
        uniform = np.float32(np.int32(np.int32(noise[j] + rotation) & NOISE_MASK)) * UNIT
        value = (grad[j] * scale - low) / step + uniform
        result[j] = np.floor(value) * step + low
