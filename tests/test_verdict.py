"""The verdict of ``comm.mode: auto``. Without these a run could be slower than plain, or change its mode over a restart."""

import json
import logging
import shutil
from contextlib import contextmanager

import pytest
import torch
from launching import TINY_RECIPE
from links import slow_link
from safetensors.torch import load_file
from test_train import newest, run, stop_at
from worlds import make_world

from cyclebnn_dist import train
from cyclebnn_dist.checkpoint import read_meta
from cyclebnn_dist.comm import build_layout, build_reducer, measure, verdict
from cyclebnn_dist.comm.breakeven import CodecCost, Link
from cyclebnn_dist.comm.verdict import Verdict, judge, measure_and_judge
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import CommConfig

WIDTHS = {2: 30, 4: 20, 8: 50}
FAST_CAST, SLOW_CODE = CodecCost(1e-10, 1e-10), CodecCost(4e-9, 1e-9)
COSTS = {**dict.fromkeys(WIDTHS, SLOW_CODE), 16: FAST_CAST, 32: FAST_CAST}


def layout(world_size=4):
    return build_layout(
        [("weight", torch.empty(1000, 1024)), ("bias", torch.empty(1000))],
        world_size=world_size,
        block_size=256,
        small_bits=32,
        small_numel=1024,
    )


@pytest.mark.parametrize(
    ("rate", "mode"), [(1.25e7, "quantized"), (1.25e8, "quantized"), (1.25e10, "bf16"), (1.25e12, "fp32")]
)
def test_a_slow_link_is_worth_a_codec_and_a_fast_one_is_not(rate, mode):
    found = judge(
        layout(), WIDTHS, COSTS, Link(1e-4, rate), codec_name="hadamard", bucket_mb=25.0, overlap=False
    )
    assert found.mode == mode
    text = found.explain()
    assert text.startswith(f"{mode}: averaging 1.02 million gradients over 4 ranks")
    assert "Gb/s" in text or "Mb/s" in text


def test_between_break_evens_sixteen_bits_are_taken():
    costs = {**COSTS, 32: CodecCost(1e-9, 0.0), 16: CodecCost(1e-9, 0.0)}
    assert (
        judge(
            layout(), WIDTHS, costs, Link(1e-4, 1.5e9), codec_name="hadamard", bucket_mb=25.0, overlap=False
        ).mode
        == "bf16"
    )


def test_the_break_even_told_is_where_the_verdict_turns():
    told = judge(
        layout(), WIDTHS, COSTS, Link(0.0, 1e9), codec_name="hadamard", bucket_mb=25.0, overlap=False
    ).pays_below
    for plain in ("fp32", "bf16"):
        below, above = (
            judge(
                layout(),
                WIDTHS,
                COSTS,
                Link(0.0, told[plain] * factor),
                codec_name="hadamard",
                bucket_mb=25.0,
                overlap=False,
            ).seconds
            for factor in (0.98, 1.02)
        )
        assert below["quantized"] < below[plain]
        assert above["quantized"] > above[plain]


def test_a_verdict_survives_json():
    found = judge(
        layout(),
        WIDTHS,
        {**COSTS, **dict.fromkeys(WIDTHS, FAST_CAST)},
        Link(0.0, 1e9),
        codec_name="hadamard",
        bucket_mb=1.0,
        overlap=True,
    )
    assert found.pays_below == {"fp32": None, "bf16": None}
    assert "at any rate against fp32" in found.explain()
    assert Verdict.from_state(json.loads(json.dumps(found.state_dict()))) == found


def test_a_verdict_that_cannot_be_read_is_told_and_not_measured_over():
    with pytest.raises(RecipeError, match="in a form this version cannot read"):
        Verdict.from_state({"mode": "bf16", "world_size": 2})


@contextmanager
def slow_codec():
    """Within it, codes take a hundred times what casts do."""
    measured = measure._pass_seconds

    def slow(codec, flat, *, bits):
        parts = measured(codec, flat, bits=bits)
        return parts if bits > 8 else tuple(part + 0.3 for part in parts)

    measure._pass_seconds = slow
    try:
        yield
    finally:
        measure._pass_seconds = measured


def measure_for_real(rank, n, slowed):
    before = torch.get_rng_state()
    world = make_world(rank, n)
    reducer = build_reducer(
        CommConfig(),
        [("weight", torch.empty(1000, 1024))],
        rank=rank,
        world_size=n,
        seed=1,
        device=torch.device("cpu"),
    )
    with slow_link(2e6) if slowed == "link" else slow_codec():
        found = measure_and_judge(reducer, WIDTHS, world=world, bucket_mb=25.0)
    reducer.close()
    return found, torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("slowed", "modes"), [("link", {"quantized"}), ("codec", {"fp32", "bf16"})])
@pytest.mark.parametrize("n", [2, 3])
def test_real_ranks_measure_what_is_slow_and_agree(ranks, n, slowed, modes):
    """A link of two ranks that sleeps for every byte, and codes that sleep: what they cost cannot be missed."""
    found = ranks(n, measure_for_real, slowed)
    assert len({repr(one) for one, _ in found}) == 1
    assert found[0][0].mode in modes
    assert all(undrawn for _, undrawn in found), "measuring must not change what a run draws"


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    text = TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data)
    path.write_text(text.replace("mode: quantized", "mode: auto"))
    return path


def with_link(rank, n, path, rate, function, *args):
    """Run ``function`` where a measurement would find a link of ``rate``; with what it returns, what was logged."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger, link, codec = verdict.log, verdict.measure_link, verdict.measure_codec
    level = logger.level
    verdict.measure_link = lambda *_, **__: Link(1e-5, rate)
    verdict.measure_codec = lambda _, widths, **__: {
        bits: FAST_CAST if bits > 8 else SLOW_CODE for bits in widths
    }
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return function(rank, n, path, *args), records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        verdict.measure_link, verdict.measure_codec = link, codec


SLOW, FAST = 1e7, 1e13


def used(run_dir):
    return json.loads((run_dir / "summary.json").read_text())["comm_mode_used"]


def test_a_verdict_is_kept_over_a_restart_even_where_a_measurement_would_now_say_otherwise(
    ranks, recipe_file
):
    """The restarted run must be, bit for bit, the one that a recipe with the verdict's mode would have been."""
    undisturbed, stopped = recipe_file.parent / "undisturbed", recipe_file.parent / "run"
    overrides = [f"run.dir={undisturbed}", "comm.mode=quantized"]
    assert ranks(2, run, recipe_file, overrides) == [0, 0]

    answers = ranks(2, with_link, recipe_file, SLOW, stop_at, 3)
    assert [status for status, _ in answers] == [train.PREEMPTED] * 2
    (line,) = answers[0][1]
    assert line.startswith("comm.mode=auto takes quantized: ")
    kept = json.loads((stopped / "comm.json").read_text())
    assert read_meta(newest(stopped))["comm_verdict"] == kept
    assert (kept["mode"], kept["world_size"]) == ("quantized", 2)

    (stopped / "comm.json").unlink()
    answers = ranks(2, with_link, recipe_file, FAST, run, [])
    assert [status for status, _ in answers] == [0, 0]
    (line,) = answers[0][1]
    assert line.startswith("comm.mode=auto stays with what this run began with. quantized: ")
    assert used(stopped) == "quantized"
    for name in ("model", "ema", "rank_0", "rank_1"):
        expected = load_file(newest(undisturbed) / f"{name}.safetensors")
        found = load_file(newest(stopped) / f"{name}.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name


def test_another_number_of_ranks_measures_anew_and_says_so(ranks, recipe_file):
    run_dir = recipe_file.parent / "run"
    statuses = ranks(2, with_link, recipe_file, SLOW, run, ["train.epochs=1"])
    assert [status for status, _ in statuses] == [0, 0]
    assert used(run_dir) == "quantized"
    longer = ["train.epochs=1.2", "run.extend_epochs=true", "train.accumulation=1"]
    answers = ranks(4, with_link, recipe_file, FAST, run, longer)
    assert [status for status, _ in answers] == [0] * 4
    again, taken = answers[0][1]
    assert again == "comm.mode=auto measures anew: its verdict was for 2 ranks, now there are 4"
    assert taken.startswith("comm.mode=auto takes fp32: ")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["comm_mode_used"] == "fp32"
    assert summary["bits"]["communication"]["max"] == 32
    assert "comm.mode=auto took fp32" in (run_dir / "summary.txt").read_text()


def test_a_run_that_ended_before_its_first_checkpoint_takes_the_same_again(ranks, recipe_file):
    run_dir = recipe_file.parent / "run"
    assert [s for s, _ in ranks(2, with_link, recipe_file, SLOW, run, ["train.epochs=0.4"])] == [0, 0]
    for written in ("summary.json", "summary.txt"):
        (run_dir / written).unlink()
    shutil.rmtree(run_dir / "checkpoints")
    answers = ranks(2, with_link, recipe_file, FAST, run, ["train.epochs=0.4"])
    assert answers[0] == (0, answers[0][1])
    assert answers[0][1][0].startswith("comm.mode=auto stays with what this run began with. quantized: ")


def test_one_rank_measures_nothing(ranks, recipe_file):
    ((status, lines),) = ranks(1, with_link, recipe_file, SLOW, run, ["train.epochs=0.4"])
    assert (status, lines) == (0, [])
    assert not (recipe_file.parent / "run" / "comm.json").exists()
