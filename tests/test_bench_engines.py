"""`cyclebnn bench engines`: its bytes are those that engines count and keep, and its ratios pair what it says they pair."""

import json

import pytest
from worlds import make_world

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.bench.engine_rounds import Settings, measure_engines
from cyclebnn_dist.bench.engine_variants import CYCLE, all_variants, choose_variants
from cyclebnn_dist.bench.engines import render_engines, summarize
from cyclebnn_dist.bench.rank import read_settings
from cyclebnn_dist.config import RecipeError

MODEL = "test_resnet"
SMALL = {"model": MODEL, "batch": 2, "image_size": 32, "bucket_mb": 0.1, "until": 0.0}
NAMES = tuple(variant.name for variant in all_variants(bucket_mb=1.0))


def launched(rank, n, settings):
    return measure_engines(make_world(rank, n), settings)


@pytest.fixture(scope="module")
def measured(request):
    ranks = request.getfixturevalue("ranks")
    first, second = ranks(2, launched, Settings(variants=NAMES, **SMALL))
    assert first == second
    return first


def test_all_engines_and_gradients_are_measured_in_the_same_rounds(measured):
    assert measured["rounds"] == 3
    assert set(measured["variants"]) == set(NAMES)
    assert len(NAMES) == 8
    for found in measured["variants"].values():
        assert len(found["seconds"]) == 3
        assert found["peak_bytes"] is None


def test_kept_bytes_are_those_of_the_formula(measured):
    """Weights, a gradient, two moments of AdamW; ZeRO halves what it shares out and copies its own part of the weights.

    Rounding up to equal parts, and a counter of steps for each parameter, are what the tolerance is for.
    """
    whole = 4 * measured["parameters"]
    for gradients in ("fp32", "cyclic"):
        held = {
            name: measured["variants"][f"{name}_{gradients}"]["held"]
            for name in ("ddp", "zero0", "zero1", "zero2")
        }
        for name, found in held.items():
            assert found["weights"] == pytest.approx(whole, rel=0.01)
            optimizer = 2 * whole if name in ("ddp", "zero0") else 1.5 * whole
            assert found["optimizer"] == pytest.approx(optimizer, rel=0.01)
        assert held["ddp"]["gradients"] == pytest.approx(whole, rel=0.01)
        assert whole / 2 <= held["zero2"]["gradients"] < 0.9 * whole, (
            "whole storages count, of which parts are used"
        )


def test_sent_bytes_fall_with_the_width_and_weights_come_beside_them(measured):
    whole = 4 * measured["parameters"]
    for name in ("ddp", "zero0", "zero1", "zero2"):
        full, cyclic = (measured["variants"][f"{name}_{gradients}"] for gradients in ("fp32", "cyclic"))
        phases = full["sent_bytes"] / (whole / 2)
        assert phases == pytest.approx(round(phases), rel=0.05), "an all-reduce is two, a reduce-scatter one"
        assert cyclic["sent_bytes"] < 0.5 * full["sent_bytes"]
        expected = whole / 2 if name in ("zero1", "zero2") else 0
        assert full["weight_bytes"] == cyclic["weight_bytes"] == pytest.approx(expected, rel=0.01)


def test_ratios_refer_to_ddp_with_the_same_gradients_and_in_fp32():
    held = {"weights": 1, "gradients": 2, "optimizer": 3}
    found = {"sent_bytes": 1.0, "weight_bytes": 0, "held": held, "peak_bytes": 7}
    seconds = {"ddp_fp32": [1.0, 2.0], "ddp_cyclic": [0.5, 1.0], "zero1_cyclic": [1.5, 3.0]}
    measured = {
        "rounds": 2,
        "parameters": 5,
        "variants": {name: {**found, "seconds": each} for name, each in seconds.items()},
    }
    rows = summarize(measured, choose_variants(["zero1_cyclic"], bucket_mb=1.0))["variants"]
    by_name = {row["variant"]: row for row in rows}
    assert set(by_name) == set(seconds)
    assert by_name["zero1_cyclic"]["time_ratio_to_ddp"]["median"] == 3.0
    assert by_name["zero1_cyclic"]["time_ratio_to_ddp_fp32"]["median"] == 1.5
    machine = {"device": "a GPU", "cores": 1, "torch": "2"}
    facts = {"machine": machine, "model": MODEL, "batch": 2, "image_size": 32, "ranks": 2, "network": "none"}
    text = render_engines({**facts, "rounds": 2, "parameters": 5, "variants": rows})
    assert "peak MB" in text
    assert "zero1_cyclic" in text


def test_a_rank_finds_its_benchmark_by_name():
    settings = Settings(variants=NAMES, **SMALL)
    assert callable(read_settings(Settings.benchmark, json.dumps(vars(settings))))
    assert sum(CYCLE) / len(CYCLE) == 5


def test_the_command_measures_on_this_machine(capsys):
    arguments = [
        "--variants",
        "zero2_cyclic",
        "--model",
        MODEL,
        "--batch",
        "2",
        "--image-size",
        "32",
        "--seconds",
        "0.1",
    ]
    assert main(["bench", "engines", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in result["variants"]] == ["ddp_fp32", "ddp_cyclic", "zero2_cyclic"]
    assert "loopback" in render_engines(result)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--variants", "zero3_fp32"], "--variants"),
        (["--ranks", "1"], "--ranks"),
        (["--batch", "1"], "--batch"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, key, capsys):
    assert main(["bench", "engines", *arguments]) == 2
    assert key in capsys.readouterr().err


def test_an_unknown_variant_is_named():
    with pytest.raises(RecipeError, match="zero1_cyclic"):
        choose_variants(["zero9"], bucket_mb=1.0)
