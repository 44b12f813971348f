"""Binary layers in the place of real ones: geometry, ownership, widths, compilation, saved state."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cyclebnn_dist.binary import (
    METHODS,
    BinaryConv2d,
    BinaryLinear,
    binary_modules,
    cpu_kernels,
    parameter_kinds,
    set_widths,
)
from cyclebnn_dist.binary.rebuild import keep_less_
from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig
from cyclebnn_dist.precision import build_schedule


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1), "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2, "padding_mode": "reflect"},
    {"kernel_size": 1, "groups": 4, "padding": "valid"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_keeps_the_geometry_it_takes_over(geometry):
    real = nn.Conv2d(4, 8, **geometry)
    x = torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        expected = copy.deepcopy(real)
        expected.weight.copy_(signs(real.weight))
        layer = BinaryConv2d.from_real(real, method="bnn")
        torch.testing.assert_close(layer(x), expected(signs(x)))


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_takes_any_number_of_dimensions(shape, bias):
    real = nn.Linear(6, 4, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        layer = BinaryLinear.from_real(copy.deepcopy(real), method="bireal")
        scale = real.weight.abs().mean(1, keepdim=True)
        expected = nn.functional.linear(signs(x), scale * signs(real.weight), real.bias)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("real", [nn.Conv2d(3, 4, 3), nn.Linear(5, 4)])
def test_layer_takes_over_parameters_mode_and_dtype(real):
    """An optimizer, a hook or a tied weight that knows the parameter goes on knowing it."""
    weight, bias = real.weight, real.bias
    real = real.double().eval()
    real.weight.requires_grad_(False)
    kind = BinaryConv2d if isinstance(real, nn.Conv2d) else BinaryLinear
    layer = kind.from_real(real, method="cyclebnn")
    assert layer.weight is weight
    assert layer.bias is bias
    assert not layer.training
    assert not layer.binarizer.training
    assert not layer.weight.requires_grad
    assert layer.binarizer.alpha.dtype == torch.float64
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "binarizer.alpha"}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_both_kinds_of_layer_under_autocast(method):
    model = small_model(method)
    set_widths(model, forward_bits=3, backward_bits=4, step=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(4, 3, 8, 8)).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


def small_model(method="cyclebnn", *, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Hardtanh(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
    )
    model.append(nn.Linear(6 * 16, 5))
    model[3] = BinaryConv2d.from_real(model[3], method=method)
    model[6] = BinaryLinear.from_real(model[6], method=method)
    return model


def test_saved_state_is_the_trained_one_and_no_more():
    """Widths follow the step: they are set, not saved. Ranges are trained: they are saved."""
    model = small_model()
    set_widths(model, forward_bits=2, backward_bits=8, step=3)
    model(torch.randn(4, 3, 8, 8))
    state = model.state_dict()
    assert {key for key in state if "binarizer" in key} == {
        f"{layer}.binarizer.{name}" for layer in (3, 6) for name in ("alpha", "input_range")
    }
    other = small_model(seed=1)
    other.load_state_dict(state)
    set_widths(other, forward_bits=2, backward_bits=8, step=3)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_a_copy_has_widths_of_its_own():
    """The averaged model is evaluated at its own width while training goes on at the schedule's."""
    model = small_model()
    average = copy.deepcopy(model)
    set_widths(model, forward_bits=2, backward_bits=8)
    set_widths(average, forward_bits=6, backward_bits=32)
    assert [module.binarizer.widths[0].item() for _, module in binary_modules(model)] == [2, 2]
    assert [module.binarizer.widths[0].item() for _, module in binary_modules(average)] == [6, 6]


def test_gradients_repeat_bit_for_bit():
    def gradients():
        model = small_model()
        set_widths(model, forward_bits=3, backward_bits=3, step=11, seed=2)
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    first = gradients()
    torch.rand(3)
    assert all(map(torch.equal, first, gradients()))


def test_evaluation_changes_no_state():
    model = small_model().eval()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_compiled_model_is_one_graph_for_a_whole_cycle(monkeypatch):
    """Recompiling at each of a cycle's changes would cost minutes a run, a break in the graph much of the speed."""
    monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors, **kwargs: False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = small_model(), small_model()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    images = torch.randn(4, 3, 8, 8)
    for each in (model, plain):
        keep_less_(each, recompute=False, input_size=(3, 8, 8))
    cycle = WidthConfig(low=2, high=6, cycles=1)
    precision = PrecisionConfig(forward=cycle, backward=cycle)
    schedule = build_schedule(precision, total_steps=12, steps_per_epoch=12)
    widths = [schedule.at(step).forward_bits for step in range(12)]
    assert set(widths) == {2, 3, 4, 5, 6}
    for step, bits in enumerate([*widths, widths[0]]):
        for each in (model, plain):
            each.zero_grad()
            set_widths(each, forward_bits=bits, backward_bits=bits, step=step)
        compiled(images).square().sum().backward()
        plain(images).square().sum().backward()
        torch.testing.assert_close(model[3].weight.grad, plain[3].weight.grad)
    assert counter.frame_count == 1


def test_parameters_are_sorted_into_what_decays_how():
    kinds = parameter_kinds(small_model())
    assert {name for name, kind in kinds.items() if kind == "binary"} == {"3.weight", "6.weight"}
    assert {name for name, kind in kinds.items() if kind == "real"} == {"0.weight"}
    assert kinds["3.binarizer.alpha"] == kinds["1.weight"] == kinds["0.bias"] == "other"
