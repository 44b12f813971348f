"""`cyclebnn bench layers`: what it prints is measured, and its comparisons are between layers that compute the same."""

import json
import re

import pytest
import torch

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.bench.composed import ComposedCycleBNNConv2d
from cyclebnn_dist.bench.paired import ratio_to, time_in_turn
from cyclebnn_dist.binary import BinaryConv2d, set_widths

TINY = ["--image-size", "32", "--batch", "2", "--seconds", "0.5", "--methods", "bnn"]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_composed_layer_computes_what_ours_does(bits):
    """Beaten is not a straw man: same outputs, and the same input gradient where nothing is rounded at random."""
    torch.manual_seed(0)
    composed = ComposedCycleBNNConv2d(6, forward_bits=bits, backward_bits=30)
    x = torch.randn(3, 6, 8, 8)
    ours = BinaryConv2d.from_real(torch.nn.Conv2d(6, 6, 3, padding=1, bias=False), method="cyclebnn")
    with torch.no_grad():
        ours.weight.copy_(composed.weight)
        composed.alpha.copy_(ours.binarizer.alpha * ours.binarizer.gain)
    set_widths(ours, forward_bits=bits, backward_bits=32)
    results = []
    for layer in (ours, composed):
        images = x.clone().requires_grad_()
        y = layer(images)
        y.square().sum().backward()
        results.append((y.detach(), images.grad, layer.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_table_and_json_tell_the_same_measurements(capsys):
    assert main(["bench", "layers", *TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    real, bnn, recompute = result["variants"]
    assert [row["variant"] for row in (real, bnn, recompute)] == ["real", "bnn", "bnn, recompute"]
    assert real["time_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert recompute["activation_bytes"] < bnn["activation_bytes"]
    assert bnn["bytes_ratio"] == pytest.approx(bnn["activation_bytes"] / real["activation_bytes"])
    assert all(row["times_leaner"] > 4 for row in result["layers"])
    assert main(["bench", "layers", *TINY]) == 0
    table = capsys.readouterr().out
    assert re.search(rf"^bnn, recompute .* {recompute['bytes_ratio']:.3f}$", table, flags=re.M)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--methods", "bn"], "--methods: there is no method 'bn'"),
        (["--batch", "1"], "--batch: 1 is too small"),
        (["--seconds", "0"], "--seconds: 0 is no time"),
        (["--model", "resnet19"], "model.name: timm has no model 'resnet19'"),
    ],
)
def test_bad_arguments_are_refused(arguments, problem, capsys):
    assert main(["bench", "layers", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_variants_run_equally_often_and_are_compared_within_a_round():
    calls = []
    times = time_in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, least_rounds=4
    )
    assert len(times["a"]) == len(times["b"]) == 4
    assert calls.count("a") == calls.count("b") == 5
    drifting = [1.0, 2.0, 4.0, 8.0]
    ratio = ratio_to([1.5 * each for each in drifting], drifting)
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 1.5, 1.5)
