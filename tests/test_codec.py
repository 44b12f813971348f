"""Without these, gradients could arrive biased, noisier than promised, or decoded differently by different machines."""

import dataclasses
import json
import logging
import sys
from functools import cache

import pytest
import torch
from exchanges import GOLDEN, assert_same, exchange, golden, message_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cyclebnn_dist.binary import BinaryConv2d
from cyclebnn_dist.comm import BlockKey, Codec
from cyclebnn_dist.comm.codec import gpu_backend
from cyclebnn_dist.comm.levels import (
    GAUSSIAN_DISTORTION,
    codes_of,
    gaussian_grid,
    levels_of,
    uniform_grid,
)
from cyclebnn_dist.comm.packing import pack, unpack
from cyclebnn_dist.comm.randomness import step_words

SIZE = 256
NUM_BLOCKS = 1024
ABSMAX_256 = {6: 7.86e-4, 7: 1.94e-4, 8: 4.80e-5}
widths = pytest.mark.parametrize("bits", range(1, 9))
NAMES = ["hadamard", "absmax", "minmax"]


def round_trip(codec, x, bits, *, seed=3, step=5):
    """Encode and decode all blocks of the flat ``x`` through the message interface."""
    pieces, message = message_of(
        [codec.block_size] * (len(x) // codec.block_size),
        bits=bits,
        size=codec.block_size,
        scale_bytes=codec.scale_bytes(bits),
    )
    words, decoded = step_words(seed, step), torch.full_like(x, 7.0)
    codec.encode_pieces(x, pieces, message, bits=bits, words=words, phase=1)
    codec.decode_pieces(message, pieces, decoded, bits=bits, words=words)
    return decoded


def relative_error(decoded, x):
    return float((decoded - x).double().square().sum() / x.double().square().sum())


@cache
def binary_network_gradient():
    """Gradient of the inner convolutions of a small binary network after a few steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128)]
        for _ in range(2):
            inner = nn.Conv2d(128, 128, 3, padding=1, bias=False)
            layers += [BinaryConv2d.from_real(inner, method="bnn"), nn.BatchNorm2d(128)]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
        prototypes = torch.randn(10, 3, 8, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(30):
            labels = torch.randint(10, (4,))
            images = prototypes[labels] + 0.5 * torch.randn(4, 3, 8, 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        gradient = torch.cat([model[2].weight.grad.view(-1), model[4].weight.grad.view(-1)])
    return gradient[: NUM_BLOCKS * SIZE]


def sample(distribution):
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(NUM_BLOCKS * SIZE, generator=generator)
    uniform = torch.rand(NUM_BLOCKS * SIZE, generator=generator).clamp(1e-6, 1 - 1e-6)
    if distribution == "gaussian":
        return gaussian
    if distribution == "laplace":
        return -(uniform - 0.5).sign() * torch.log1p(-2 * (uniform - 0.5).abs())
    if distribution == "student-t4":
        squares = torch.randn(4, NUM_BLOCKS * SIZE, generator=generator).square().mean(dim=0)
        return gaussian / squares.sqrt()
    if distribution == "sparse":
        return gaussian * (uniform < 0.1)
    if distribution == "binary network":
        return binary_network_gradient()
    assert distribution == "outlier"
    gaussian[::SIZE] = 1e4
    return gaussian


distributions = pytest.mark.parametrize(
    "distribution", ["gaussian", "laplace", "student-t4", "sparse", "binary network", "outlier"]
)


@widths
@given(st.data())
@settings(max_examples=20, deadline=None)
def test_packing_is_dense_and_loses_nothing(bits, data):
    rows, groups = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9))
    values = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=rows * groups * 8, max_size=rows * groups * 8)
    )
    codes = torch.tensor(values, dtype=torch.uint8).reshape(rows, groups * 8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, groups * bits)
    assert torch.equal(unpack(packed, bits), codes)


@distributions
@pytest.mark.parametrize("bits", range(1, 6))
def test_the_error_up_to_5_bits_is_the_lloyd_max_one_whatever_the_gradient_looks_like(bits, distribution):
    x, distortion = sample(distribution), GAUSSIAN_DISTORTION[bits]
    least_squares = relative_error(round_trip(Codec(unbiased=False), x, bits), x)
    unbiased = relative_error(round_trip(Codec(unbiased=True), x, bits), x)
    assert least_squares <= 1.1 * distortion
    assert unbiased <= 1.1 * distortion / (1 - distortion)


@distributions
@pytest.mark.parametrize("bits", [6, 7, 8])
def test_the_error_from_6_bits_is_that_of_uniform_levels_on_gaussian_data(bits, distribution):
    x = sample(distribution)
    assert relative_error(round_trip(Codec(), x, bits), x) <= 1.1 * ABSMAX_256[bits]


@pytest.mark.parametrize("tail", [1, 2, 3, 8, 50, 255])
@widths
def test_a_block_that_is_mostly_padding_is_no_noisier_than_a_full_one(bits, tail):
    x = sample("gaussian").reshape(NUM_BLOCKS, SIZE)[:, :tail].contiguous().view(-1)
    pieces, message = message_of([tail] * NUM_BLOCKS, bits=bits, size=SIZE)
    pieces = dataclasses.replace(pieces, source=torch.arange(NUM_BLOCKS) * tail)
    distortion = {b: d / (1 - d) for b, d in GAUSSIAN_DISTORTION.items()} | ABSMAX_256
    for unbiased in (True, False):
        codec, decoded = Codec(unbiased=unbiased), torch.zeros(NUM_BLOCKS * tail)
        codec.encode_pieces(x, pieces, message, bits=bits, words=(1, 2), phase=1)
        codec.decode_pieces(message, pieces, decoded, bits=bits, words=(1, 2))
        bound = distortion[bits] if unbiased or bits > 5 else GAUSSIAN_DISTORTION[bits]
        assert relative_error(decoded, x) <= 1.1 * bound


@given(
    numel=st.integers(0, 3 * SIZE), bits=st.sampled_from([*range(1, 9), 16, 32]), name=st.sampled_from(NAMES)
)
@settings(max_examples=60, deadline=None)
def test_any_number_of_elements_comes_back(numel, bits, name):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    codec = Codec(name, unbiased=False)
    counts = [min(SIZE, numel - start) for start in range(0, numel, SIZE)]
    pieces, message = message_of(counts, bits=bits, size=SIZE, scale_bytes=codec.scale_bytes(bits))
    decoded = torch.full((numel + 5,), 7.0)
    codec.encode_pieces(x, pieces, message, bits=bits, words=(1, 2), phase=1)
    codec.decode_pieces(message, pieces, decoded, bits=bits, words=(1, 2))
    assert bool((decoded[numel:] == 7).all())
    if numel and (name == "hadamard" or bits >= 4):
        assert relative_error(decoded[:numel], x) <= (0.8 if bits == 1 else 0.3 if bits < 4 else 0.05)


@pytest.mark.parametrize("kind", ["gaussian", "single", "sparse"])
@widths
def test_the_unbiased_scale_loses_nothing_on_average(bits, kind):
    block = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    if kind == "single":
        block = torch.zeros(SIZE)
        block[17] = 1.2345
    if kind == "sparse":
        block = block * (torch.arange(SIZE) % 10 == 0)
    repeats = 10_000
    decoded = round_trip(Codec(unbiased=True), block.repeat(repeats), bits).reshape(repeats, SIZE).double()
    along = (decoded @ block.double()) / block.double().square().sum()
    resolution = float(along.std()) / repeats**0.5
    # From 6 bits no scale corrects the mean: a bias of a thousandth, a quarter of what bf16 may round by, is allowed.
    allowed = 0.0 if bits <= 5 else 1e-3
    assert abs(float(along.mean()) - 1) <= 4.5 * resolution + allowed
    mean_error = relative_error(decoded.mean(dim=0), block)
    assert (
        mean_error <= 1.5 * relative_error(decoded, block.double().repeat(repeats, 1)) / repeats + allowed**2
    )


@widths
def test_the_least_squares_scale_never_adds_energy(bits):
    x = sample("student-t4")
    decoded = round_trip(Codec(unbiased=False), x, bits)
    blocks, back = x.view(-1, SIZE), decoded.view(-1, SIZE)
    assert bool(((back - blocks).square().sum(dim=1) <= 1.01 * blocks.square().sum(dim=1)).all())


@given(
    bits=st.sampled_from([*range(1, 9), 16, 32]),
    place=st.integers(0, SIZE - 1),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    name=st.sampled_from(NAMES),
)
@settings(max_examples=60, deadline=None)
def test_a_value_that_is_not_finite_is_never_hidden(bits, place, value, name):
    x = torch.randn(3 * SIZE, generator=torch.Generator().manual_seed(place))
    x[SIZE + place] = value
    decoded = round_trip(Codec(name), x, bits).reshape(3, SIZE)
    assert bool(torch.isfinite(decoded[[0, 2]]).all())
    if bits <= 8:
        assert bool(decoded[1].isnan().all())
    else:
        assert not torch.isfinite(decoded[1, place])


@given(bits=st.integers(1, 8), exponent=st.integers(-98, 98), name=st.sampled_from(NAMES))
@settings(max_examples=60, deadline=None)
def test_magnitude_does_not_matter(bits, exponent, name):
    x = torch.randn(2 * SIZE, generator=torch.Generator().manual_seed(exponent + 100))
    factor = 2.0**exponent
    codec = Codec(name, unbiased=False)
    assert torch.equal(round_trip(codec, x * factor, bits), round_trip(codec, x, bits) * factor)


@widths
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_equal_and_zero_blocks_survive(bits, magnitude, name):
    x = torch.cat([torch.full((SIZE,), magnitude), torch.zeros(SIZE)])
    decoded = round_trip(Codec(name, unbiased=False), x, bits)
    assert bool((decoded[SIZE:] == 0).all())
    assert relative_error(decoded[:SIZE] / magnitude, x[:SIZE] / magnitude) <= 0.5


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 1024])
@pytest.mark.parametrize("bits", [*range(1, 9), 16, 32])
@pytest.mark.parametrize("name", NAMES)
def test_both_backends_compute_the_same_to_the_last_bit(bits, name, size):
    for unbiased in (True, False):
        settings = {"name": name, "unbiased": unbiased, "bits": bits, "size": size, "full": 40}
        assert_same(exchange("numba", **settings), exchange("torch", **settings))


def test_blocks_by_themselves_and_in_messages_have_the_same_bytes():
    x = sample("student-t4")[: 8 * SIZE]
    pieces, message = message_of([SIZE] * 8, bits=3, size=SIZE)
    codec = Codec()
    codec.encode_pieces(x, pieces, message, bits=3, words=step_words(4, 9), phase=1)
    key = BlockKey(seed=4, step=9, parameter=pieces.parameter, block=pieces.block)
    scales, codes = codec.encode(x.view(8, SIZE), 3, key)
    assert torch.equal(message, torch.cat([scales.view(torch.uint8).view(-1), codes.reshape(-1)]))
    decoded = torch.empty(8 * SIZE)
    codec.decode_pieces(message, pieces, decoded, bits=3, words=step_words(4, 9))
    assert torch.equal(codec.decode(scales, codes, 3, key).view(-1), decoded)


def test_decoded_blocks_may_be_added_before_they_are_rotated_back():
    first, second = sample("laplace")[: 4 * SIZE], sample("gaussian")[: 4 * SIZE]
    codec, words = Codec(), step_words(0, 0)
    pieces, message = message_of([SIZE] * 4, bits=4, size=SIZE)
    rows, expected = torch.zeros(4, SIZE), torch.zeros(4 * SIZE)
    for x in (first, second):
        codec.encode_pieces(x, pieces, message, bits=4, words=words, phase=1)
        codec.add_pieces(message, pieces, rows, bits=4)
        decoded = torch.empty(4 * SIZE)
        codec.decode_pieces(message, pieces, decoded, bits=4, words=words)
        expected += decoded
    codec.rotate_rows(rows, pieces, bits=4, words=words, inverse=True)
    torch.testing.assert_close(rows.view(-1), expected, rtol=1e-5, atol=1e-5)


def test_every_part_of_the_key_changes_the_signs():
    x = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(0))

    def codes(seed=1, step=1, parameter=1, block=1):
        key = BlockKey(seed, step, torch.tensor([parameter]), torch.tensor([block]))
        return Codec().encode(x, 4, key)[1]

    for other in ({"seed": 2}, {"step": 2}, {"parameter": 2}, {"block": 2}):
        assert not torch.equal(codes(), codes(**other))
    assert torch.equal(codes(), codes())


@pytest.mark.parametrize("bits", range(1, 6))
def test_the_grid_is_the_lloyd_max_one_but_for_half_a_percent_of_its_error(bits):
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    levels = levels_of(codes_of(x.float(), gaussian_grid(bits), bits), gaussian_grid(bits), bits).double()
    error = float(((x - levels).square() * density).sum() / density.sum())
    assert error == pytest.approx(GAUSSIAN_DISTORTION[bits], rel=0.006)
    assert error >= GAUSSIAN_DISTORTION[bits] * 0.9995  # Lloyd-Max is optimal
    assert bool((levels * x > 0)[x.abs() > 1e-6].all())


@widths
def test_every_level_is_the_level_of_its_own_code(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    # A uniform level is two units of a step.
    grids = [(uniform_grid(bits), 2)] + ([(gaussian_grid(bits), 1)] if bits <= 5 else [])
    for grid, units in grids:
        levels = levels_of(codes, grid, bits)
        assert bool((levels.diff() > 0).all())
        assert torch.equal(levels, -levels.flip(0))
        assert torch.equal(codes_of(levels / units, grid, bits), codes)


@pytest.mark.parametrize(
    ("name", "bits"), [(name, bits) for name in ("absmax", "minmax") for bits in range(1, 9)]
)
def test_the_plain_codecs_round_to_the_nearest_of_uniform_levels(name, bits):
    x = sample("laplace").view(NUM_BLOCKS, SIZE)[:64]
    decoded = round_trip(Codec(name), x.reshape(-1), bits).view(64, SIZE)
    high = x.abs().amax(dim=1) if name == "absmax" else x.amax(dim=1)
    low = -high if name == "absmax" else x.amin(dim=1)
    step = (high - low) / (2**bits - 1)
    # bf16 widens a step by up to 1/128 of it, and the least value by up to 1/128 of itself.
    widened = step * (1 + 1 / 128) + (low.abs() / 128 / (2**bits - 1) if name == "minmax" else 0)
    assert bool(((decoded - x).abs() <= widened[:, None] * (0.5 + 1e-4)).all())
    assert all(len(block.unique()) <= 2**bits for block in decoded)
    assert relative_error(decoded, x) >= 0.3 * float((step**2 / 12).mean() / x.square().mean())


def test_minmax_keeps_a_block_that_is_far_from_zero():
    x = 1000 + torch.rand(SIZE, generator=torch.Generator().manual_seed(0))
    assert float((round_trip(Codec("minmax"), x, 8) - x).abs().max()) <= 8 / 255


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_bytes_are_those_of_every_earlier_version(backend):
    """Messages that change need a new FORMAT_VERSION, or ranks of two versions would take them for each other's."""
    assert golden(backend) == json.loads(GOLDEN.read_text())


def test_a_gpu_without_triton_is_served_by_torch_and_told_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu_backend.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [gpu_backend(), gpu_backend()] == ["torch", "torch"]
    finally:
        gpu_backend.cache_clear()
    assert [record.message.split(":")[0] for record in caplog.records] == ["triton is not installed"]
