"""The numbers about binary layers, against counts and gradients taken directly; without them a user would be misled."""

import copy

import pytest
import torch
from equations import polynomial, random_tensor
from torch import nn

from cyclebnn_dist.binary import (
    METHODS,
    BinaryConv2d,
    BinaryLinear,
    Health,
    check_two_valued,
    set_progress,
    set_widths,
)
from cyclebnn_dist.binary.binarizer import Binarizer
from cyclebnn_dist.binary.bits import pack_bits
from cyclebnn_dist.binary.health import PATIENCE
from cyclebnn_dist.binary.signs import binary_signs, count_differences

INPUTS = random_tensor(4, 3, 5, 5) * 1.5 + 0.2
INPUTS.view(-1)[:8] = torch.tensor([1.0, -1.0, 0.0, -0.0, 1.5, -1.5, 1.0 + 1e-9, -1.5 - 1e-9])
WEIGHT = random_tensor(6, 3, 3, 3)
WEIGHT.view(-1)[:4] = torch.tensor([1.0, -1.0, 0.0, 1.0 + 1e-9])


def share_without_gradient(function, x, *, below=0.0):
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return (grad <= below).double().mean().item()


def clipped(bound):
    return lambda x: x.clamp(-bound, bound)


def standardized(x):
    rows = x.flatten(1)
    return (rows / torch.sqrt(rows.var(1, keepdim=True) + 1e-5)).view_as(x)


def rounded(x, bits):
    step = (x.max() - x.min()) / (2**bits - 1)
    return ((x - x.min()) / step).round() * step + x.min()


INPUT_RULES = {
    "bnn": (clipped(1.0), INPUTS),
    "xnor": (clipped(1.0), INPUTS),
    "bireal": (polynomial, INPUTS),
    "bireal_released": (polynomial, INPUTS),
    "reactnet": (polynomial, INPUTS + torch.tensor([0.3, -0.5, 2.0]).view(3, 1, 1)),
    "reactnet_released": (polynomial, INPUTS + torch.tensor([0.3, -0.5, 2.0]).view(3, 1, 1)),
    "recu": (polynomial, standardized(INPUTS)),
    "adabin": (polynomial, (INPUTS - 0.25) / -0.5),
    "adabin_released": (polynomial, (INPUTS - 0.25) / -0.5),
    "bnext": (clipped(1.5), INPUTS),
    "cyclebnn": (polynomial, rounded(standardized(INPUTS), 3)),
    "cyclebnn_released": (polynomial, rounded(standardized(INPUTS), 3)),
}
"""The function whose derivative stands for that of the sign, and the values it is taken at."""

LOWEST_T = {"irnet": 0.1, "irnet_released": 0.001, "adabin": 0.001, "adabin_released": 0.001}


def binarizer(method, *, progress=1.0):
    """One of three channels, with its thresholds where a run may have brought them."""
    layer = METHODS[method](WEIGHT, channel_dim=1).double()
    set_widths(layer, forward_bits=3, backward_bits=8)
    set_progress(layer, progress)
    with torch.no_grad():
        if method.startswith("reactnet"):
            layer.bias.copy_(torch.tensor([0.3, -0.5, 2.0]))
        if method.startswith("adabin"):
            layer.alpha.fill_(-0.5)
            layer.beta.fill_(0.25)
    return layer


@pytest.mark.parametrize("method", sorted(INPUT_RULES))
def test_saturated_inputs_are_those_where_the_published_gradient_is_zero(method):
    expected = share_without_gradient(*INPUT_RULES[method])
    assert 0.05 < expected < 0.95
    assert binarizer(method).input_saturation(INPUTS).item() == pytest.approx(expected)


def test_at_full_width_cyclebnn_is_not_quantized_before_its_gradient():
    layer = binarizer("cyclebnn")
    set_widths(layer, forward_bits=32, backward_bits=32)
    expected = share_without_gradient(polynomial, standardized(INPUTS))
    assert layer.input_saturation(INPUTS).item() == pytest.approx(expected)
    assert expected != pytest.approx(share_without_gradient(*INPUT_RULES["cyclebnn"]))


def test_measuring_does_not_touch_the_range_cyclebnn_remembers():
    layer = binarizer("cyclebnn")
    layer.binarize_input(INPUTS)
    before = layer.input_range.clone()
    layer.input_saturation(INPUTS * 3)
    assert torch.equal(layer.input_range, before)


@pytest.mark.parametrize("method", ["irnet", "irnet_released"])
@pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
def test_inputs_of_ede_are_saturated_below_a_thousandth_of_its_highest_gradient(method, progress):
    """Its gradient is never 0 on paper; early in a run it reaches everywhere, at the end hardly beyond 0.4."""
    t = LOWEST_T[method] * (10 / LOWEST_T[method]) ** progress
    k = max(1 / t, 1)
    expected = share_without_gradient(lambda x: k * torch.tanh(t * x), INPUTS, below=1e-3 * k * t)
    assert (expected > 0.5) == (progress == 1.0)
    assert binarizer(method, progress=progress).input_saturation(INPUTS).item() == pytest.approx(expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_saturated_weights_are_those_whose_gradient_is_cut(method):
    layer = binarizer(method, progress=0.9)
    found = layer.weight_saturation(WEIGHT)
    rows = WEIGHT.flatten(1)
    if method in ("bnn", "bireal", "bireal_released", "reactnet", "reactnet_released"):
        expected = share_without_gradient(clipped(1.0), WEIGHT)
    elif method == "recu":
        centred = rows - rows.mean(1, keepdim=True)
        values = centred / (torch.sqrt(centred.var(1, keepdim=True) + 1e-5) / 8**0.5)
        tau = 0.85 + 0.14 * (torch.tensor(0.9).exp() - 1) / (torch.tensor(1.0).exp() - 1)
        bound = -values.abs().mean() * torch.log(2 - 2 * tau)
        expected = share_without_gradient(clipped(bound), values)
    elif method in LOWEST_T:
        t = LOWEST_T[method] * (10 / LOWEST_T[method]) ** 0.9
        values = rows - rows.mean(1, keepdim=True)
        values = values / values.std(1, keepdim=True, correction=int(method.startswith("irnet")))
        k = max(1 / t, 1)
        expected = share_without_gradient(lambda x: k * torch.tanh(t * x), values, below=1e-3 * k * t)
    else:
        assert found is None
        leaf = WEIGHT.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer.binarize_weight(leaf).sum(), leaf)
        assert (grad != 0).all()
        return
    assert 0.01 < expected < 0.99
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_signs_say_which_of_its_two_values_a_weight_takes(method):
    """At every width and moment of the run alike; AdaBin's two values may both be positive."""
    layer = BinaryLinear.from_real(nn.Linear(40, 8), method=method)
    with torch.no_grad():
        layer.weight.add_(0.05)
        layer.weight[0, 0] = 2.0
    set_widths(layer, forward_bits=32, backward_bits=32)
    with torch.no_grad():
        values = layer.eval().binarizer.binarize_weight(layer.weight)
    expected = values == values.amax(1, keepdim=True)
    layer.train()
    for bits, progress in ((2, 0.0), (6, 0.5), (32, 1.0)):
        set_widths(layer, forward_bits=bits, backward_bits=8)
        set_progress(layer, progress)
        assert torch.equal(binary_signs(layer), expected)
        assert layer.binarizer.training
        assert layer.binarizer.quantize_forward == (bits < 32)
        assert layer.weight[0, 0] == 2.0, "BNext clamps latent weights in training; a look at them must not"


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000])
def test_a_bit_each_is_enough_to_count_differences(numel):
    one, other = (random_tensor(numel, seed=seed) > 0 for seed in (1, 2))
    assert pack_bits(one).numel() == (numel + 7) // 8
    assert count_differences(pack_bits(one), pack_bits(other)).item() == int((one != other).sum())
    assert count_differences(pack_bits(one), pack_bits(one)).item() == 0


def make_model(method, *, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        BinaryConv2d.from_real(nn.Conv2d(4, 6, 3), method=method),
        nn.BatchNorm2d(6),
        nn.Dropout(dropout),
        nn.Flatten(),
        BinaryLinear.from_real(nn.Linear(54, 5), method=method),
    )


def images(step=0):
    return torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(step))


def observe(health, forward, step):
    health.watching(forward)(images(step))
    return health.measure(step, saturated_inputs=health.take_saturated_inputs())


def test_flip_rate_is_the_share_of_signs_that_changed_between_two_measurements():
    model = make_model("bnn")
    health = Health(model, every=10)
    health.begin(0)
    with torch.no_grad():
        model[2].weight[0, :3].mul_(-1)
        model[6].weight[2].mul_(-1)
    row = observe(health, model, 10)
    assert row["flip_rate/2"] == pytest.approx(27 / 216)
    assert row["flip_rate/6"] == pytest.approx(54 / 270)
    assert row["flip_rate_min"] == row["flip_rate/2"]
    assert row["flip_rate_max"] == row["flip_rate/6"]
    assert row["flip_rate_mean"] == pytest.approx((27 / 216 + 54 / 270) / 2)
    assert row["latent_magnitude/6"] == pytest.approx(model[6].weight.abs().mean().item())
    assert observe(health, model, 20)["flip_rate_max"] == 0.0, (
        "counted from the last measurement, not the first"
    )


def test_the_cycle_of_widths_flips_nothing():
    model = make_model("cyclebnn")
    health = Health(model, every=1)
    health.begin(0)
    for step, bits in enumerate((2, 3, 6, 32), start=1):
        set_widths(model, forward_bits=bits, backward_bits=8)
        assert observe(health, model, step)["flip_rate_max"] == 0.0


def test_a_flip_rate_is_over_exactly_the_steps_between_two_measurements_or_absent():
    """After a restart in between there is none, rather than one over fewer steps."""
    model = make_model("bnn")
    for start, expected in ((0, True), (20, True), (13, False), (10, False)):
        health = Health(model, every=10)
        health.begin(start)
        row = observe(health, model, 30 if start >= 10 else 10)
        assert ("flip_rate/2" in row) == expected, start
        assert "saturated_inputs/2" in row


def test_saturated_inputs_are_those_the_layers_really_see():
    model = make_model("bnn")
    row = observe(Health(model, every=1), model, 1)
    seen = model[1](model[0](images(1)))
    assert row["saturated_inputs/2"] == pytest.approx((seen.abs() > 1).double().mean().item())
    assert "saturated_weights/2" in row


def test_a_layer_that_did_not_run_has_no_share_of_saturated_inputs():
    model = make_model("bnn")
    row = observe(Health(model, every=1), lambda x: model[:3](x), 1)
    assert "saturated_inputs/2" in row
    assert "saturated_inputs/6" not in row
    assert row["saturated_inputs_max"] == row["saturated_inputs/2"]


def test_there_is_nothing_to_measure_in_a_real_model_or_when_it_is_off():
    assert not Health(nn.Linear(2, 2), every=1).due(0)
    assert not Health(make_model("bnn"), every=0).due(0)
    assert [step for step in range(1, 10) if Health(make_model("bnn"), every=4).due(step)] == [4, 8]


def trained(method, *, every, compiled=False):
    """Weights, buffers and random state after six steps with a dropout, and the last row."""
    torch._dynamo.reset()
    model = make_model(method, dropout=0.3)
    if compiled:
        model.compile(backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    health = Health(model, every=every, compiled=compiled)
    health.begin(0)
    row = {}
    for step in range(6):
        set_progress(model, step / 6)
        set_widths(model, forward_bits=2 + step % 3, backward_bits=4, step=step)
        forward = health.watching(model) if health.due(step + 1) else model
        optimizer.zero_grad()
        forward(images(step)).square().sum().backward()
        optimizer.step()
        if health.due(step + 1):
            row = health.measure(step + 1, saturated_inputs=health.take_saturated_inputs())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {**model.state_dict(), **buffers, "random": torch.get_rng_state()}, row, model


@pytest.mark.parametrize("method", sorted(METHODS))
def test_training_is_the_same_bit_for_bit_with_and_without(method):
    expected, nothing, _ = trained(method, every=0)
    found, row, model = trained(method, every=2)
    assert not nothing
    assert row["flip_rate_max"] > 0
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["cyclebnn", "bnext"])
def test_a_compiled_model_is_measured_as_well_and_trains_the_same(method):
    """Compiled code calls no hooks that came later: without a pass of its own the inputs would be missing."""
    expected, _, _ = trained(method, every=0, compiled=True)
    found, row, _ = trained(method, every=2, compiled=True)
    _, eager_row, _ = trained(method, every=2)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert row["saturated_inputs/2"] == pytest.approx(eager_row["saturated_inputs/2"], abs=0.02)


def test_hooks_are_gone_after_a_forward_pass_that_fails():
    model = make_model("bnn")
    with pytest.raises(RuntimeError):
        Health(model, every=1).watching(model)(torch.zeros(1, 5, 7, 7))
    assert not any(module._forward_pre_hooks for module in model.modules())


def warnings_of(model, *, scale=1.0, lr=1e-3, times=PATIENCE, start=0, flip=False, highest=True):
    health = Health(model, every=1)
    health.begin(start)
    told = []
    for step in range(start + 1, start + times + 1):
        if flip:
            with torch.no_grad():
                model[2].weight[0].mul_(-1)
                model[6].weight[0].mul_(-1)
        health.watching(model)(images(step) * scale)
        shares = health.take_saturated_inputs()
        health.measure(step, saturated_inputs=shares, at_highest_width=highest)
        told += health.warnings(lr=lr)
    return told


def test_inputs_that_stay_saturated_are_told_once_by_name():
    model = make_model("bnn")
    del model[1], model[2]  # normalizations, which would keep inputs small
    assert not warnings_of(model, scale=1e5, times=PATIENCE - 1, start=1)
    assert not warnings_of(model, scale=1e5, times=3 * PATIENCE, start=1, highest=False)
    (warning,) = warnings_of(model, scale=1e5, times=3 * PATIENCE, start=1)
    assert "inputs of 1 got no gradient" in warning


def test_weights_that_never_flip_are_told_once_by_name_while_they_should_learn():
    (warning,) = warnings_of(make_model("bnn"), times=3 * PATIENCE)
    assert "no binary weight of 2, 6 has changed its sign" in warning
    assert not warnings_of(make_model("bnn"), lr=0.0)
    assert not warnings_of(make_model("bnn"), flip=True)
    assert not warnings_of(make_model("bnn"), start=1000), (
        "the end of a run is quiet, and nobody saw its beginning"
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_two_valued_where_it_is_evaluated(method):
    model = make_model(method)
    set_progress(model, 0.1)
    with torch.no_grad():
        model[2].weight[1].abs_()  # one value alone is binary too
    before = copy.deepcopy(model.state_dict())
    check_two_valued(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


class AlwaysTempered(Binarizer):
    """What BNext would be if its evaluation kept the temperature, as its authors' code does."""

    def binarize_weight(self, weight):
        return (weight / 0.1).clamp(-1.0, 1.0)


class NotFinite(Binarizer):
    def binarize_weight(self, weight):
        return torch.where(weight >= 0, torch.inf, -1.0)


@pytest.mark.parametrize("rule", [AlwaysTempered, NotFinite])
def test_weights_of_more_than_two_values_are_refused_by_layer_and_filter(rule):
    model = make_model("bnn")
    model[6].binarizer = rule(model[6].weight, channel_dim=-1)
    with torch.no_grad():
        model[6].weight.copy_(torch.where(model[6].weight >= 0, 0.5, -0.5))
        model[6].weight[:3].clamp_(max=-0.1)
        if rule is AlwaysTempered:
            model[6].weight[3, :2] = torch.tensor([0.05, -0.02])
            model[6].weight[4].abs_()
        else:
            model[6].weight[4].abs_().neg_()
    with pytest.raises(RuntimeError, match=rf"6 \({rule.__name__}\): 1 of 5 filters, filter 3 has"):
        check_two_valued(model)
