"""Binarizers against plainly written evaluations of their equations, in double precision."""

import math

import pytest
import torch
from equations import polynomial, random_tensor, signs, straight_through
from torch import nn

from cyclebnn_dist.binary import METHODS
from cyclebnn_dist.binary.functions import hard_sign, quantize_stochastically, uniform_like
from cyclebnn_dist.binary.methods.cyclebnn import NOISE_SIZE, CycleBNN
from cyclebnn_dist.binary.widths import set_widths

EDGES = [-2.0, -1.0 - 1e-9, -1.0, -0.6, -1e-300, -0.0, 0.0, 1e-300, 0.25, 1.0, 1.0 + 1e-9, 3.0]


def binarizer(method, weight, *, channel_dim=1, **widths):
    result = METHODS[method](weight, channel_dim=channel_dim).to(weight.dtype)
    if widths:
        set_widths(result, **widths)
    return result


def rounded(x, low, high, bits):
    """Nearest of 2**bits evenly spaced levels from low to high."""
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


def gradients(function, *inputs, seed=9):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    return result.detach(), torch.autograd.grad(
        result, inputs, random_tensor(*result.shape, seed=seed).to(result.dtype)
    )


CENTRED = {"adabin", "adabin_released", "irnet", "irnet_released", "recu"}
"""Methods that take the sign of a weight less its filter's mean."""


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_binarizer_ever_gives_zero(method):
    x = torch.tensor([EDGES, EDGES[::-1], [0.0, -0.0] * 6], dtype=torch.float64)
    layer = binarizer(method, x, channel_dim=-1)
    assert torch.equal(layer.binarize_input(x), signs(x))
    weight = layer.binarize_weight(x)
    assert (weight != 0).all()
    if method not in CENTRED:
        assert torch.equal(weight.sign(), signs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sign_of_both_zeros_is_plus_one_in_every_dtype(dtype):
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert torch.equal(hard_sign(zeros), torch.ones(2, dtype=dtype))
    assert torch.equal(hard_sign(zeros, torch.tensor(0.0)), torch.ones(2, dtype=dtype))


def test_bnn_passes_gradients_inside_the_box_and_on_its_edge():
    x = torch.tensor([EDGES], dtype=torch.float64)
    layer = binarizer("bnn", x)
    expected = torch.tensor([[0.0, 0.0] + [1.0] * 8 + [0.0, 0.0]], dtype=torch.float64)
    for rule in (layer.binarize_input, layer.binarize_weight):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(rule(leaf).sum(), leaf)
        assert torch.equal(grad, expected)


def test_bireal_activation_gradient_is_the_published_polynomial():
    x = torch.tensor([EDGES], dtype=torch.float64)
    value, (grad,) = gradients(binarizer("bireal", x).binarize_input, x)
    reference, (expected,) = gradients(lambda x: straight_through(signs(x), polynomial(x)), x)
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(grad, expected)
    at_zero = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(binarizer("bireal", x).binarize_input(at_zero).sum(), at_zero)
    assert grad.item() == 2.0


@pytest.mark.parametrize(("method", "magnitude_aware"), [("bireal", True), ("bireal_released", False)])
def test_bireal_weights_are_scaled_signs_with_the_gradient_of_paper_or_code(method, magnitude_aware):
    weight = torch.cat([random_tensor(5, 12), torch.tensor([EDGES], dtype=torch.float64)])
    value, (grad,) = gradients(binarizer(method, weight).binarize_weight, weight)
    scale = weight.abs().mean(1, keepdim=True)

    def reference(weight):
        inside = weight.clamp(-1, 1)
        return straight_through(scale * signs(weight), (scale if magnitude_aware else 1.0) * inside)

    expected_value, (expected,) = gradients(reference, weight)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad, expected)
    assert all(len(row.unique()) == 2 for row in value)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 32])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (6, 20)])
def test_cyclebnn_weights_follow_the_equation(bits, shape):
    weight = random_tensor(*shape) * 0.05 + 0.01
    layer = binarizer("cyclebnn", weight, forward_bits=bits, backward_bits=32)
    value, (grad,) = gradients(layer.binarize_weight, weight)

    def reference(weight):
        rows = weight.flatten(1)
        standardized = rows / (torch.sqrt(rows.var(1, keepdim=True) + 1e-5) / (2 * math.sqrt(2)))
        low, high = standardized.amin(1, keepdim=True).detach(), standardized.amax(1, keepdim=True).detach()
        quantized = standardized if bits == 32 else rounded(standardized, low, high, bits)
        return straight_through(signs(quantized), standardized).view_as(weight)

    expected_value, (expected,) = gradients(reference, weight)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 32])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 7, 6)])
def test_cyclebnn_activations_follow_the_equation(bits, shape):
    x = random_tensor(*shape) * torch.tensor([0.2, 1.0, 3.0, 0.7]).view(4, *[1] * (len(shape) - 1)) + 0.1
    layer = binarizer("cyclebnn", random_tensor(2, 3), forward_bits=bits, backward_bits=32)
    value, (grad,) = gradients(layer.binarize_input, x)

    def reference(x):
        rows = x.flatten(1)
        standardized = (rows / torch.sqrt(rows.var(1, keepdim=True) + 1e-5)).view_as(x)
        low, high = standardized.min().detach(), standardized.max().detach()
        quantized = standardized
        if bits != 32:
            quantized = straight_through(rounded(standardized, low, high, bits), standardized)
        return straight_through(signs(quantized), polynomial(quantized))

    expected_value, (expected,) = gradients(reference, x)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad, expected)


def test_few_bits_flip_more_signs_of_small_weights():
    weight = random_tensor(64, 576)
    flipped = {}
    for bits in (2, 4, 8):
        layer = binarizer("cyclebnn", weight, forward_bits=bits, backward_bits=32)
        flipped[bits] = (layer.binarize_weight(weight) != signs(weight)).double().mean().item()
    assert flipped[2] > flipped[4] > flipped[8] > 0


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_one_sided_filters_and_images_keep_their_sign(shift):
    x = random_tensor(3, 4, 4, 4) + shift
    layer = binarizer("cyclebnn", x, forward_bits=2, backward_bits=32)
    assert torch.equal(layer.binarize_weight(x), signs(x))
    assert torch.equal(layer.binarize_input(x), signs(x))


@pytest.mark.parametrize("value", [0.0, 2.0, -2.0])
def test_constant_filters_and_images_stay_finite(value):
    x = torch.full((2, 3, 4, 4), value, dtype=torch.float64)
    layer = binarizer("cyclebnn", x, forward_bits=3, backward_bits=8)
    for rule in (layer.binarize_weight, layer.binarize_input):
        result, (grad,) = gradients(rule, x)
        assert torch.equal(result, signs(x))
        assert grad.isfinite().all()


def test_cyclebnn_evaluation_of_an_image_does_not_depend_on_its_batch():
    layer = binarizer("cyclebnn", random_tensor(2, 3), forward_bits=2, backward_bits=32)
    for seed in range(3):
        layer.binarize_input(random_tensor(8, 3, 6, 6, seed=seed))
    layer.eval()
    images = random_tensor(8, 3, 6, 6, seed=7)
    alone = torch.cat([layer.binarize_input(image[None]) for image in images])
    assert torch.equal(layer.binarize_input(images), alone)


def test_cyclebnn_evaluates_what_it_trained_where_the_images_are_the_same():
    """Its range is remembered without bias: one batch is enough, and the fourth does not count as four tenths."""
    images = random_tensor(8, 3, 6, 6)
    for num_batches in (1, 4):
        layer = binarizer("cyclebnn", random_tensor(2, 3), forward_bits=3, backward_bits=32)
        for _ in range(num_batches):
            trained = layer.binarize_input(images)
        before = layer.input_range.clone()
        assert torch.equal(layer.eval().binarize_input(images), trained)
        assert torch.equal(layer.input_range, before)


def test_the_released_evaluation_leaves_out_the_standardization():
    images = random_tensor(8, 3, 6, 6) * 0.05
    layer = binarizer("cyclebnn_released", random_tensor(2, 3), forward_bits=3, backward_bits=32)
    layer.binarize_input(images)
    low, high = layer.input_range[:2]
    expected = signs(rounded(images.clamp(low, high), low, high, 3))
    assert torch.equal(layer.eval().binarize_input(images), expected)
    assert not torch.equal(binarizer("cyclebnn", images).eval().binarize_input(images), expected)


def test_cyclebnn_output_scale_learns_from_the_exact_gradient():
    weight, y = random_tensor(4, 9), random_tensor(3, 4, 5, 5)
    layer = binarizer("cyclebnn", weight, forward_bits=4, backward_bits=32)
    grad = random_tensor(3, 4, 5, 5, seed=3)
    leaf = y.clone().requires_grad_()
    output = layer.scale_output(leaf)
    y_grad, alpha_grad = torch.autograd.grad(output, (leaf, layer.alpha), grad)
    scale = (layer.alpha * 9**-0.5).view(-1, 1, 1)
    torch.testing.assert_close(scale.flatten(), weight.abs().mean(1))
    torch.testing.assert_close(output, y * scale)
    torch.testing.assert_close(y_grad, grad * scale)
    torch.testing.assert_close(alpha_grad, (grad * y).sum((0, 2, 3)) * 9**-0.5)


def test_output_gradient_is_quantized_after_the_scale():
    layer = binarizer("cyclebnn", random_tensor(4, 9), forward_bits=4, backward_bits=3, step=5)
    y = random_tensor(3, 4, 5, 5).requires_grad_()
    grad = random_tensor(3, 4, 5, 5, seed=3)
    (y_grad,) = torch.autograd.grad(layer.scale_output(y), y, grad)
    exact = grad * (layer.alpha.detach() * 9**-0.5).view(-1, 1, 1)
    assert len(y_grad.unique()) <= 2**3
    step = (exact.max() - exact.min()) / 7
    assert ((y_grad - exact).abs() < step * 1.001).all()


def quantize(x, *, bits=3, step=0, seed=0, index=0):
    layers = nn.ModuleList(binarizer("cyclebnn", torch.ones(1, 1)) for _ in range(index + 1))
    set_widths(layers, forward_bits=2, backward_bits=bits, step=step, seed=seed)
    layer = layers[index]
    return quantize_stochastically(x, layer.widths[1], key=layer.widths[2:], noise=layer.noise)


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantized_gradients_lie_on_the_levels_next_to_the_exact_ones(bits, dtype):
    x = random_tensor(7, 911).to(dtype)
    quantized = quantize(x, bits=bits)
    step = (x.max() - x.min()) / (2**bits - 1)
    levels = (quantized - x.min()) / step
    assert quantized.dtype == dtype
    assert ((levels - levels.round()).abs() < 0.1 * 2 ** (bits - 8) + 1e-3).all()
    assert levels.round().min() >= 0
    assert levels.round().max() <= 2**bits - 1
    assert ((quantized - x).abs() <= step * 1.01).all()


def test_stochastic_rounding_is_unbiased_and_independent_across_steps():
    """Otherwise training at few backward bits would drift."""
    x = random_tensor(40).float()
    steps = torch.stack([quantize(x, bits=2, step=step) for step in range(2000)])
    width = (x.max() - x.min()) / 3
    torch.testing.assert_close(steps.mean(0), x, rtol=0, atol=4 * 0.5 * width.item() / 2000**0.5)
    errors = steps - x
    assert (errors[1:] * errors[:-1]).mean().abs() < 0.01 * width**2
    assert (errors[:, 1:] * errors[:, :-1]).mean().abs() < 0.01 * width**2


def test_noise_is_uniform_and_differs_between_rows_of_its_table():
    layer = binarizer("cyclebnn", torch.ones(1, 1), forward_bits=2, backward_bits=2, step=3)
    uniform = uniform_like(torch.empty(3 * NOISE_SIZE + 5), key=layer.widths[2:], noise=layer.noise)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01
    rows = uniform[: 3 * NOISE_SIZE].view(3, -1)
    assert not torch.equal(rows[0], rows[1])
    assert abs(((rows[0] - 0.5) * (rows[1] - 0.5)).mean()) < 0.2


def test_rounding_is_a_pure_function_of_seed_step_layer_and_place():
    """A resumed run must round as the undisturbed one did, whatever else drew random numbers."""
    x = random_tensor(3, 1000).float()
    first = quantize(x, step=7)
    torch.rand(11)
    assert torch.equal(quantize(x, step=7), first)
    for other in ({"step": 8}, {"step": 7, "seed": 1}, {"step": 7, "index": 1}):
        assert not torch.equal(quantize(x, **other), first)


def test_rounding_keeps_the_memory_layout_and_non_finite_values():
    x = random_tensor(2, 3, 4, 5).float().contiguous(memory_format=torch.channels_last)
    quantized = quantize(x)
    assert quantized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantize(torch.full((4,), 0.3)), torch.full((4,), 0.3))
    assert not quantize(torch.tensor([1.0, float("inf"), float("nan")])).isfinite().all()
    assert quantize(random_tensor(9).bfloat16()).dtype == torch.bfloat16


def test_cyclebnn_reads_the_scale_of_pretrained_weights():
    weight = random_tensor(4, 3, 3, 3)
    layer = CycleBNN(weight, channel_dim=1)
    torch.testing.assert_close(layer.alpha.double() * layer.gain, weight.abs().mean((1, 2, 3)))
    assert (CycleBNN(torch.zeros(2, 3), channel_dim=-1).alpha == 1).all()


def test_memory_layout_changes_no_result():
    x, weight = random_tensor(4, 3, 5, 5), random_tensor(6, 3, 3, 3) * 0.1
    layer = binarizer("cyclebnn", weight, forward_bits=3, backward_bits=32)
    for rule, tensor in ((layer.binarize_input, x), (layer.binarize_weight, weight)):
        value, (grad,) = gradients(rule, tensor)
        leaf = tensor.contiguous(memory_format=torch.channels_last).requires_grad_()
        other = rule(leaf)
        assert torch.equal(other.detach(), value)
        (other_grad,) = torch.autograd.grad(other, leaf, random_tensor(*tensor.shape, seed=9))
        torch.testing.assert_close(other_grad, grad)
