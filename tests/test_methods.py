"""Published methods against plainly written evaluations of their equations, in double precision."""

import copy
import math
import typing

import pytest
import torch
from equations import polynomial, random_tensor, signs, straight_through
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cyclebnn_dist.binary import METHODS, BinaryConv2d, BinaryLinear, set_progress
from cyclebnn_dist.binary.methods.bnext import BNext
from cyclebnn_dist.binary.methods.ede import ede_at
from cyclebnn_dist.config.recipe import Method

EDGES = [
    -2.0,
    -1.5 - 1e-9,
    -1.5,
    -1.0 - 1e-9,
    -1.0,
    -0.6,
    -0.0,
    0.0,
    0.25,
    1.0,
    1.0 + 1e-9,
    1.5,
    1.5 + 1e-9,
    3.0,
]
PHASED = ["adabin", "adabin_released", "bnext", "irnet", "irnet_released", "recu"]


def binarizer(method, weight, *, channel_dim=1, progress=None):
    result = METHODS[method](weight, channel_dim=channel_dim).to(weight.dtype)
    if progress is not None:
        set_progress(result, progress)
    return result


def ede_sign(x, t, k):
    return straight_through(signs(x), k * torch.tanh(t * x))


def gradients(function, *inputs, seed=9):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    grad = random_tensor(*result.shape, seed=seed).to(result.dtype)
    return result.detach(), torch.autograd.grad(result, inputs, grad)


def assert_equal_to(reference, function, *inputs):
    """Values and gradients of ``function`` are those of ``reference``."""
    value, grads = gradients(function, *inputs)
    expected, expected_grads = gradients(reference, *inputs)
    torch.testing.assert_close(value, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def rows(weight):
    return weight.flatten(1)


def filters_with_edges():
    """Ordinary filters, one on every edge, and one of both zeros."""
    width = len(EDGES)
    special = torch.tensor([EDGES, EDGES[::-1], [0.0, -0.0] * (width // 2)], dtype=torch.float64)
    return torch.cat([random_tensor(4, width) * 0.7, special])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_two_values_a_filter_and_a_layer_in_evaluation(method):
    """A network is binary only if what it is evaluated with is: exactly two values, whatever training was at."""
    weight = random_tensor(6, 5, 3, 3) * 0.3
    layer = binarizer(method, weight, progress=0.1).eval()
    for row in rows(layer.binarize_weight(weight)):
        assert len(row.unique()) == 2
    x = random_tensor(3, 5, 4, 4)
    values = layer.binarize_input(x)
    assert len(values.unique()) == 2
    # -0.0 and 0.0 are on the upper side.
    zeros = layer.binarize_input(torch.tensor([0.0, -0.0], dtype=torch.float64).expand(2, 5, 2)[..., None])
    assert (zeros == values.max()).all()


@pytest.mark.parametrize("method", PHASED)
def test_evaluation_is_that_of_the_end_of_the_run(method):
    weight, x = random_tensor(6, 20) * 0.3, random_tensor(3, 20)
    layer = binarizer(method, weight, channel_dim=-1).eval()
    expected = layer.binarize_weight(weight), layer.binarize_input(x)
    set_progress(layer, 0.1)
    assert torch.equal(layer.binarize_weight(weight), expected[0])
    assert torch.equal(layer.binarize_input(x), expected[1])


@pytest.mark.parametrize("method", PHASED)
def test_progress_is_set_on_every_layer_and_not_saved(method):
    """It is a function of the step: a resumed run sets it, and an averaged copy of the model has its own."""
    model = nn.Sequential(
        BinaryConv2d.from_real(nn.Conv2d(3, 4, 3), method=method),
        nn.Flatten(),
        BinaryLinear.from_real(nn.Linear(16, 2), method=method),
        BinaryLinear.from_real(nn.Linear(2, 2), method="bnn"),
    )
    average = copy.deepcopy(model)
    set_progress(model, 0.2)
    expected = torch.tensor(METHODS[method].phase_at(0.2))
    for layer in (model[0], model[2]):
        torch.testing.assert_close(layer.binarizer.phase, expected)
    torch.testing.assert_close(average[0].binarizer.phase, torch.tensor(METHODS[method].phase_at(1.0)))
    assert not [key for key in model.state_dict() if "phase" in key]


@pytest.mark.parametrize("method", PHASED)
def test_a_compiled_model_is_not_compiled_again_as_the_run_goes_on(method):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), BinaryConv2d.from_real(nn.Conv2d(4, 4, 3), method=method), nn.Flatten()
        )

    model, plain = build(), build()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    images = torch.randn(2, 3, 7, 7)
    for progress in (0.0, 0.2, 0.5, 1.0):
        for each, run in ((model, compiled), (plain, plain)):
            each.zero_grad()
            set_progress(each, progress)
            run(images).square().sum().backward()
        torch.testing.assert_close(model[1].weight.grad, plain[1].weight.grad)
    # BNext's weights become signs once in a run, and their product then needs other code.
    assert counter.frame_count == (2 if method == "bnext" else 1)


def test_a_compiled_model_is_compiled_once_more_when_weights_cease_to_be_real():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BinaryConv2d.from_real(nn.Conv2d(4, 4, 3), method="reactnet"))
    plain, images = copy.deepcopy(model), torch.randn(2, 3, 7, 7)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for real in (True, True, False, False):
        for each, run in ((model, compiled), (plain, plain)):
            each.zero_grad()
            set_progress(each, 0.0, real_weights=real)
            run(images).square().sum().backward()
        torch.testing.assert_close(model[1].weight.grad, plain[1].weight.grad)
    assert counter.frame_count == 2


@pytest.mark.parametrize("lowest", [0.1, 0.001])
def test_ede_sharpens_from_its_lowest_to_ten(lowest):
    assert ede_at(0.0, lowest_t=lowest) == pytest.approx((lowest, 1 / lowest))
    assert ede_at(1.0, lowest_t=lowest) == pytest.approx((10.0, 1.0))
    t, k = ede_at(0.3, lowest_t=lowest)
    assert math.log10(t) == pytest.approx(math.log10(lowest) + 0.3 * math.log10(10 / lowest))
    assert k == pytest.approx(max(1 / t, 1.0))


@pytest.mark.parametrize(("method", "lowest"), [("irnet", 0.1), ("irnet_released", 0.001)])
@pytest.mark.parametrize("progress", [0.0, 0.37, 1.0])
def test_irnet_follows_the_equation(method, lowest, progress):
    t = lowest * (10 / lowest) ** progress
    k = max(1 / t, 1)

    def weights(weight):
        centred = rows(weight) - rows(weight).mean(1, keepdim=True)
        deviation = centred.std(1, keepdim=True)
        standardized = centred / torch.where(deviation > 0, deviation, 1.0)
        exponent = standardized.detach().abs().mean(1, keepdim=True).log2().round()
        scale = torch.where(exponent.isinf(), 1.0, 2.0**exponent)
        return (ede_sign(standardized, t, k) * scale).view_as(weight)

    layer = binarizer(method, random_tensor(2, 3), progress=progress)
    for weight in (random_tensor(5, 3, 3, 3) * 0.05 + 0.01, filters_with_edges()[:-1]):
        assert_equal_to(weights, layer.binarize_weight, weight)
    assert_equal_to(lambda x: ede_sign(x, t, k), layer.binarize_input, filters_with_edges())


@pytest.mark.parametrize("method", ["irnet", "adabin", "recu", "xnor", "bireal"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_constant_filters_stay_finite(method, value):
    weight = torch.full((2, 3, 3, 3), value)
    layer = binarizer(method, weight, progress=0.5)
    result, (grad,) = gradients(layer.binarize_weight, weight)
    assert result.isfinite().all()
    assert grad.isfinite().all()
    assert grad.abs().max() < 1e4
    assert (result != 0).all()


@pytest.mark.parametrize("progress", [0.0, 0.37, 1.0])
def test_recu_follows_the_equation(progress):
    tau = 0.85 + 0.14 * (math.e**progress - 1) / (math.e - 1)

    def weights(weight):
        centred = rows(weight) - rows(weight).mean(1, keepdim=True)
        standardized = centred / (torch.sqrt(centred.var(1, keepdim=True) + 1e-5) / (2 * math.sqrt(2)))
        bound = -standardized.detach().abs().mean() * math.log(2 - 2 * tau)
        clamped = standardized.clamp(-bound, bound)
        return straight_through(signs(standardized), clamped).view_as(weight)

    def inputs(x):
        standardized = rows(x) / torch.sqrt(rows(x).var(1, keepdim=True) + 1e-5)
        return straight_through(signs(standardized), polynomial(standardized)).view_as(x)

    layer = binarizer("recu", random_tensor(2, 3), progress=progress)
    for weight in (random_tensor(5, 3, 3, 3) * 0.05 + 0.01, filters_with_edges()):
        assert_equal_to(weights, layer.binarize_weight, weight)
    for x in (random_tensor(4, 3, 5, 5) * 2 + 0.3, filters_with_edges()):
        assert_equal_to(inputs, layer.binarize_input, x)


def test_recu_revives_fewer_weights_the_later_it_is():
    """Its clamp takes the gradient of the tails away, and less of them as tau rises."""
    weight = random_tensor(8, 300)
    upstream = signs(random_tensor(8, 300, seed=3))
    dead = []
    for progress in (0.0, 0.5, 1.0):
        layer = binarizer("recu", weight, progress=progress)
        leaf = weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer.binarize_weight(leaf), leaf, upstream)
        dead.append(int((grad.abs() < 1.0).sum()))
    assert dead[0] > dead[1] > dead[2] > 0


def test_recu_learns_the_scale_of_its_output():
    weight, y = random_tensor(4, 9), random_tensor(3, 4, 5, 5)
    layer = binarizer("recu", weight)
    alpha = layer.alpha.detach() * 9**-0.5
    torch.testing.assert_close(alpha, weight.abs().mean(1))
    value, (grad,) = gradients(layer.scale_output, y)
    torch.testing.assert_close(value, y * alpha.view(-1, 1, 1))
    torch.testing.assert_close(grad, random_tensor(*y.shape, seed=9) * alpha.view(-1, 1, 1))


@pytest.mark.parametrize(("method", "magnitude_aware"), [("reactnet", True), ("reactnet_released", False)])
def test_reactnet_weights_have_the_gradient_of_paper_or_code(method, magnitude_aware):
    def weights(weight):
        scale = rows(weight).abs().mean(1, keepdim=True).detach()
        scale = torch.where(scale > 0, scale, 1.0)
        return straight_through(
            scale * signs(weight), (scale if magnitude_aware else 1.0) * weight.clamp(-1, 1)
        )

    weight = filters_with_edges()
    assert_equal_to(weights, binarizer(method, weight).binarize_weight, weight)


@pytest.mark.parametrize(("channel_dim", "shape"), [(1, (3, 5, 4, 4)), (-1, (3, 4, 5)), (-1, (7, 5))])
def test_reactnet_learns_a_threshold_for_each_channel(channel_dim, shape):
    layer = binarizer("reactnet", random_tensor(2, 5), channel_dim=channel_dim)
    assert torch.equal(layer.bias.detach(), torch.zeros(5))
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-1.0, 0.5, 0.0, 2.0, 0.1]))
    x = random_tensor(*shape)
    x.view(-1)[:2] = torch.tensor([1.0, -0.5])
    x.requires_grad_()
    value = layer.binarize_input(x)
    grad = random_tensor(*shape, seed=3)
    found = torch.autograd.grad(value, (x, layer.bias), grad)
    bias = layer.bias.detach().clone().requires_grad_()
    shifted = x + (bias.view(5, 1, 1) if channel_dim == 1 else bias)
    reference = straight_through(signs(shifted), polynomial(shifted))
    torch.testing.assert_close(value, reference)
    for one, other in zip(found, torch.autograd.grad(reference, (x, bias), grad), strict=True):
        torch.testing.assert_close(one, other)


def test_grouped_convolution_has_a_threshold_for_each_of_its_channels():
    layer = BinaryConv2d.from_real(nn.Conv2d(6, 4, 3, groups=2), method="reactnet")
    assert layer.binarizer.bias.shape == (6,)
    assert layer(torch.randn(2, 6, 5, 5)).shape == (2, 4, 3, 3)


def test_xnor_weights_follow_the_equation():
    weight = filters_with_edges()
    numel = weight.shape[1]
    value, (grad,) = gradients(binarizer("xnor", weight).binarize_weight, weight)
    scale = weight.abs().mean(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    torch.testing.assert_close(value, scale * signs(weight))
    upstream = random_tensor(*weight.shape, seed=9)
    torch.testing.assert_close(grad, upstream * (1 / numel + scale * (weight.abs() <= 1)))


@pytest.mark.parametrize(
    "geometry", [{"padding": 1, "stride": 2}, {"groups": 2}, {"dilation": 2, "bias": False}]
)
def test_xnor_scales_its_output_by_the_magnitude_of_each_window(geometry):
    torch.manual_seed(0)
    real = nn.Conv2d(4, 6, 3, **geometry).double()
    x = random_tensor(2, 4, 7, 7)
    groups = real.groups
    layer = BinaryConv2d.from_real(copy.deepcopy(real), method="xnor")
    scale = real.weight.abs().mean((1, 2, 3), keepdim=True)
    arguments = (None, real.stride, real.padding, real.dilation)
    product = nn.functional.conv2d(signs(x), signs(real.weight), *arguments, groups) * scale.view(1, -1, 1, 1)
    parts = []
    for part in x.chunk(groups, dim=1):
        window = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
        k = nn.functional.conv2d(part.abs().mean(1, keepdim=True), window, *arguments)
        parts.append(k.expand(-1, 6 // groups, -1, -1))
    expected = product * torch.cat(parts, 1)
    if real.bias is not None:
        expected = expected + real.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected)


def test_xnor_scales_a_linear_layer_by_the_magnitude_of_each_row():
    real = nn.Linear(6, 4).double()
    x = random_tensor(2, 3, 6)
    expected = nn.functional.linear(signs(x), real.weight.abs().mean(1, keepdim=True) * signs(real.weight))
    expected = expected * x.abs().mean(-1, keepdim=True) + real.bias
    torch.testing.assert_close(BinaryLinear.from_real(copy.deepcopy(real), method="xnor")(x), expected)


@pytest.mark.parametrize("progress", [0.0, 0.37, 1.0])
def test_adabin_weights_follow_the_equation(progress):
    t = 0.001 * 10000**progress
    k = max(1 / t, 1)

    def weights(weight):
        mean = rows(weight).mean(1, keepdim=True)
        deviation = (rows(weight) - mean).square().mean(1, keepdim=True).sqrt()
        return (deviation * ede_sign((rows(weight) - mean) / deviation, t, k) + mean).view_as(weight)

    layer = binarizer("adabin", random_tensor(2, 3), progress=progress)
    for weight in (random_tensor(5, 3, 3, 3) * 0.05 + 0.01, filters_with_edges()[:-1]):
        assert_equal_to(weights, layer.binarize_weight, weight)


@pytest.mark.parametrize(("method", "centre_scaled"), [("adabin", False), ("adabin_released", True)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.7, -0.2), (-1.3, 0.4)])
def test_adabin_inputs_follow_the_equation(method, centre_scaled, alpha, beta):
    def inputs(x, alpha, beta):
        u = (x - beta) / alpha
        sign = straight_through(signs(u), polynomial(u))
        return alpha * (sign + beta) if centre_scaled else alpha * sign + beta

    layer = binarizer(method, random_tensor(2, 3))
    assert (layer.alpha.item(), layer.beta.item()) == (1.0, 0.0)

    def own(x, alpha, beta):
        return torch.func.functional_call(layer, {"alpha": alpha, "beta": beta}, (x,))

    layer.forward = layer.binarize_input
    scalars = (torch.tensor([alpha], dtype=torch.float64), torch.tensor([beta], dtype=torch.float64))
    assert_equal_to(inputs, own, random_tensor(4, 3, 5, 5), *scalars)
    assert_equal_to(inputs, own, filters_with_edges(), *scalars)


def test_bnext_gradient_passes_up_to_one_and_a_half():
    x = torch.tensor([EDGES], dtype=torch.float64)
    layer = binarizer("bnext", x)
    leaf = x.clone().requires_grad_()
    value = layer.binarize_input(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.equal(value.detach(), signs(x))
    assert torch.equal(grad, (x.abs() <= 1.5).double())


def test_bnext_temperature_falls_as_published_and_reaches_the_sign():
    """0.9 an epoch of 512, so exactly binary from epoch 153 on."""
    (start,), (later,) = BNext.phase_at(0.0), BNext.phase_at(10 / 512)
    assert start == 1.0
    assert later == pytest.approx(0.9**10)
    assert BNext.phase_at(152 / 512)[0] == pytest.approx(0.9**152)
    assert BNext.phase_at(153 / 512) == (0.0,)
    assert BNext.phase_at(1.0) == (0.0,)


@pytest.mark.parametrize("epoch", [0, 20, 153, 512])
def test_bnext_weights_follow_the_equation(epoch):
    weight = filters_with_edges()
    layer = binarizer("bnext", weight, progress=epoch / 512)
    temperature = 0.9**epoch
    leaf = weight.clone().requires_grad_()
    value = layer.binarize_weight(leaf)
    clamped = weight.clamp(-1.5, 1.5)
    expected = signs(clamped) if temperature < 1e-7 else (clamped / temperature).clamp(-1, 1)
    torch.testing.assert_close(value.detach(), expected)
    assert torch.equal(leaf.detach(), clamped)
    grad = random_tensor(*weight.shape, seed=3)
    assert torch.equal(torch.autograd.grad(value, leaf, grad)[0], grad)


def test_bnext_evaluation_leaves_latent_weights_alone():
    weight = nn.Parameter(torch.tensor([[2.0, -3.0, 0.1]]))
    binarizer("bnext", weight).eval().binarize_weight(weight)
    assert weight.tolist() == [[2.0, -3.0, pytest.approx(0.1)]]


def test_recipes_know_every_method_by_name():
    assert set(typing.get_args(Method)) == {*METHODS, "none"}
