"""Bits that stand for tensors in the backward pass: every element comes back, in every layout and dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclebnn_dist.binary import bits, cpu_kernels
from cyclebnn_dist.binary.bits import form_of, mask_by_bits, pack_bits, pack_signs, pack_within, unpack_bits
from cyclebnn_dist.binary.layouts import is_channels_last

LAYOUTS = {
    "plain": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["kernels", "operators"])
def either_way(request, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors, **kwargs: False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 4, 4), (3, 1, 1, 1), (4, 2, 1, 3)])
def test_signs_come_back_as_they_were(shape, layout, dtype):
    x = LAYOUTS[layout](torch.randn(shape)).to(dtype)
    x[0, 0, 0, 0] = -0.0
    signs = torch.where(x >= 0.0, 1.0, -1.0).to(dtype)
    packed = pack_signs(x)
    assert packed.numel() == math.ceil(x.numel() / 8)
    back = unpack_bits(packed, *form_of(x), -1.0, 1.0, dtype)
    assert torch.equal(back, signs)
    assert is_channels_last(back) == is_channels_last(x)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_box_lets_through_what_is_within_it_edges_included(layout, dtype):
    x = LAYOUTS[layout](
        torch.tensor([-1.5, -1.0, -0.5, 0.0, 1.0, 1.01, 3.0, math.nan, math.inf] * 4)[:32].view(2, 2, 4, 2)
    )
    x, grad = x.to(dtype), LAYOUTS[layout](torch.randn(2, 2, 4, 2)).to(dtype)
    expected = torch.where(x.abs() <= 1.0, grad, 0.0)
    assert torch.equal(mask_by_bits(grad, pack_within(x, -1.0, 1.0), is_channels_last(x)), expected)


def test_a_gradient_in_another_layout_meets_its_own_mask():
    """The backward pass of a convolution may give plain gradients for a channels-last input."""
    x = torch.randn(2, 8, 4, 3).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 8, 4, 3)
    result = mask_by_bits(grad, pack_within(x, -1.0, 1.0), True)
    assert torch.equal(result, grad * (x.abs() <= 1.0))


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(0, 200), seed=st.integers(0, 1 << 30))
def test_kernels_and_operators_pack_the_same_bytes(numel, seed):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    chosen = (x >= -0.4) & (x <= 1.1)
    packed = pack_within(x, -0.4, 1.1)
    assert torch.equal(packed, pack_bits(chosen))
    back = unpack_bits(packed, [numel], False, 0.0, 1.0, torch.float32)
    assert torch.equal(back, chosen.float())
    plain = [
        sum(int(bit) << place for place, bit in enumerate(chosen[i : i + 8])) for i in range(0, numel, 8)
    ]
    assert packed.tolist() == plain


def test_operators_are_whole_for_the_compiler():
    """Fake kernels that gave other shapes or layouts than the real ones would corrupt a compiled graph's memory."""
    x = torch.randn(2, 3, 5, 7)
    last = x.contiguous(memory_format=torch.channels_last)
    for value in (x, last):
        layout = form_of(value)
        packed = pack_signs(value)
        torch.library.opcheck(bits.pack_bits, (value > 0.0,))
        torch.library.opcheck(bits.pack_within, (value, -1.0, 1.0))
        arguments = (packed, list(layout.shape), layout.channels_last, -1.0, 1.0, torch.float32)
        torch.library.opcheck(bits.unpack_bits, arguments)
        torch.library.opcheck(bits.mask_by_bits, (value, packed, layout.channels_last))
