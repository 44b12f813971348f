"""The break-even: with it wrong, ``comm.mode: auto`` would make a run slower than a plain all-reduce."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclebnn_dist.comm.breakeven import (
    CodecCost,
    Link,
    Load,
    breakeven_bytes_per_second,
    choose,
    exchange_seconds,
    schedule_mean,
    step_seconds,
)
from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig
from cyclebnn_dist.precision import build_schedule


def two_phase_bytes(numel, world_size, bits, *, scale_bits_per_block=0, block_size=256):
    per_element = (bits + scale_bits_per_block / block_size) / 8
    return 2 * (world_size - 1) / world_size * numel * per_element


def test_the_rates_below_which_four_bits_pay_are_those_of_the_notes():
    """N = 4, b = 4, fp32 scales, a codec of (1 + 1/N) * 1.0 + 2 * 0.9 ns and free casts: 13.7 and 5.8 Gb/s."""
    codec = ((1 + 1 / 4) * 1.0 + 2 * 0.9) * 1e-9

    def seconds(bits, rate):
        narrow = two_phase_bytes(1, 4, 4, scale_bits_per_block=32)
        return codec + narrow / rate if bits == 4 else two_phase_bytes(1, 4, bits) / rate

    found = {
        bits: breakeven_bytes_per_second(partial(seconds, 4), partial(seconds, bits)) for bits in (32, 16)
    }
    assert 8e-9 * found[32] == pytest.approx(13.7, abs=0.05)
    assert 8e-9 * found[16] == pytest.approx(5.8, abs=0.05)


LOAD = Load(elements={4: 10**6, 32: 1000}, sent_bytes=900_000, chunks=4)
COSTS = {
    4: CodecCost(3e-9, 1.6e-9, 20e-6),
    32: CodecCost(0.5e-9, 0.0, 10e-6),
    8: CodecCost(9.0, 9.0, 9.0),
}
CODEC = 3e-3 + 0.2e-3 + 0.16e-3 + 0.5e-6 + 0.08e-3
"""Of a million elements at 4 bits and a thousand at 32 among 8 ranks."""


def test_an_exchange_takes_the_sum_of_its_parts_where_nothing_overlaps():
    link = Link(latency_seconds=1e-3, bytes_per_second=1e8)
    alone = {"world_size": 8, "overlap": False}
    assert exchange_seconds(LOAD, COSTS, link, **alone) == pytest.approx(CODEC + 1e-3 + 9e-3)
    assert step_seconds([LOAD, LOAD], COSTS, link, **alone) == pytest.approx(2 * (CODEC + 10e-3))
    without = Load(elements={4: 10**6, 32: 0}, sent_bytes=900_000)
    assert exchange_seconds(without, COSTS, link, **alone) == pytest.approx(3.36e-3 + 10e-3), (
        "nothing is called for elements that are not there"
    )


@pytest.mark.parametrize("rate", [1e8, 1e12])
def test_the_longer_part_hides_the_shorter_but_for_a_chunk(rate):
    wire = 900_000 / rate
    link = Link(latency_seconds=1e-3, bytes_per_second=rate)
    overlapping = {"world_size": 8, "overlap": True}
    one = max(CODEC, wire) + min(CODEC, wire) / 4
    assert exchange_seconds(LOAD, COSTS, link, **overlapping) == pytest.approx(1e-3 + one)
    two = 2 * max(CODEC, wire) + 2 * min(CODEC, wire) / 8
    # Messages are added up once per bucket in the model: two buckets in one have half of their calls.
    calls = 8 * (20e-6 + 10e-6)
    assert step_seconds([LOAD, LOAD], COSTS, link, **overlapping) == pytest.approx(
        1e-3 + two, abs=1.3 * calls
    )


@given(
    st.integers(1, 10**6),
    st.integers(10**3, 10**9),
    st.floats(1e-3, 10.0),
    st.floats(1e-3, 10.0),
    st.floats(0.01, 0.99),
    st.integers(1, 50),
    st.booleans(),
)
def test_below_the_break_even_the_narrow_one_is_faster_and_above_it_the_wide_one(
    narrow_bytes, more_bytes, codec, added, share, chunks, overlap
):
    narrow = Load({4: 1}, narrow_bytes, chunks)
    wide = Load({32: 1}, narrow_bytes + more_bytes, chunks)
    costs = {4: CodecCost(codec + added, 0.0), 32: CodecCost(codec, 0.0)}

    def seconds(load, rate):
        return exchange_seconds(load, costs, Link(0.2, rate), world_size=2, overlap=overlap)

    rate = breakeven_bytes_per_second(partial(seconds, narrow), partial(seconds, wide))
    assert rate is not None
    if rate:
        assert seconds(narrow, share * rate) < seconds(wide, share * rate)
    assert seconds(narrow, max(rate, 1e4) / share) > seconds(wide, max(rate, 1e4) / share)


def test_there_is_no_break_even_where_one_side_wins_always():
    assert breakeven_bytes_per_second(lambda rate: 1 + 1 / rate, lambda rate: 2 + 2 / rate) is None
    assert breakeven_bytes_per_second(lambda rate: 1 + 2 / rate, lambda rate: 1e-9 + 2 / rate) == 0.0


def test_a_width_weighs_as_much_as_the_schedule_uses_it():
    width = WidthConfig(low=2, high=8, cycles=3)
    schedule = build_schedule(PrecisionConfig(communication=width), total_steps=101, steps_per_epoch=10)
    counts = {}
    for step in range(101):
        bits = schedule.at(step).communication_bits
        counts[bits] = counts.get(bits, 0) + 1
    seconds = {bits: 1.0 + 0.3 * bits**2 for bits in counts}
    total = sum(seconds[schedule.at(step).communication_bits] for step in range(101))
    assert schedule_mean(seconds, counts) == pytest.approx(total / 101)
    assert schedule_mean({**seconds, 16: 1e9}, counts) == pytest.approx(total / 101)


@pytest.mark.parametrize(
    ("seconds", "mode"),
    [
        ({"fp32": 8.0, "bf16": 4.0, "quantized": 1.0}, "quantized"),
        ({"fp32": 8.0, "bf16": 4.0, "quantized": 5.0}, "bf16"),
        ({"fp32": 1.0, "bf16": 4.0, "quantized": 5.0}, "fp32"),
        ({"fp32": 1.04, "bf16": 1.0, "quantized": 1.0}, "fp32"),
        ({"fp32": 2.0, "bf16": 1.04, "quantized": 1.0}, "bf16"),
        ({"fp32": 2.0, "bf16": 1.06, "quantized": 1.0}, "quantized"),
    ],
)
def test_the_fastest_is_taken_and_the_more_exact_one_where_it_is_as_fast(seconds, mode):
    assert choose(seconds) == mode


@given(st.fixed_dictionaries({name: st.floats(1e-9, 1e9) for name in ("fp32", "bf16", "quantized")}))
def test_quantized_is_never_taken_where_a_plain_mode_is_predicted_faster(seconds):
    mode = choose(seconds)
    assert seconds[mode] <= 1.05 * min(seconds.values())
    if mode == "quantized":
        assert seconds["quantized"] < min(seconds["fp32"], seconds["bf16"])
