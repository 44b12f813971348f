"""The precision schedule: CPT's saw-tooth cosine, a pure function of the step."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig
from cyclebnn_dist.precision import Widths, build_schedule


def forward_schedule(total_steps, *, steps_per_epoch=100, **width):
    precision = PrecisionConfig(forward=WidthConfig(**width))
    return build_schedule(precision, total_steps=total_steps, steps_per_epoch=steps_per_epoch)


def forward_bits(total_steps, **width):
    schedule = forward_schedule(total_steps, **width)
    return [schedule.at(step).forward_bits for step in range(total_steps)]


def test_three_to_eight_bits_take_the_published_shares():
    used = Counter(forward_bits(32 * 2000, low=3, high=8, cycles=32))
    shares = [100 * used[bits] / 64000 for bits in range(3, 9)]
    assert shares == pytest.approx([20.5, 16.4, 13.1, 13.1, 16.4, 20.5], abs=0.1)


def test_a_period_follows_the_formula_step_by_step():
    for step, bits in enumerate(forward_bits(300, low=2, high=6, cycles=3)):
        progress = (step % 100) / 100
        exact = 2 + 0.5 * (6 - 2) * (1 + math.cos(math.pi * progress + math.pi))
        assert abs(bits - exact) <= 0.5 + 1e-9


def test_each_cycle_rises_from_low_to_high_and_drops():
    bits = forward_bits(300, low=2, high=6, cycles=3)
    for start in (0, 100, 200):
        cycle = bits[start : start + 100]
        assert cycle[0] == 2
        assert cycle[-1] == 6
        assert cycle == sorted(cycle)


def test_a_run_that_cycles_do_not_divide_ends_at_the_high_width():
    """CPT's formula alone would begin another cycle, and leave the model at its lowest width."""
    bits = forward_bits(107, low=2, high=6, cycles=5)
    assert bits[:105] == bits[:21] * 5
    assert bits[105:] == [6, 6]


def test_warmup_holds_the_high_width_and_the_cycles_share_the_rest():
    bits = forward_bits(350, low=2, high=6, cycles=3, warmup_epochs=0.5)
    assert bits[:50] == [6] * 50
    assert bits[50] == bits[150] == bits[250] == 2
    assert bits[49] == bits[149] == bits[349] == 6


def test_constant_is_always_high():
    assert set(forward_bits(50, schedule="constant", low=2, high=32)) == {32}


def test_channels_follow_their_own_settings():
    precision = PrecisionConfig(
        forward=WidthConfig(low=2, high=6, cycles=2),
        backward=WidthConfig(schedule="constant", low=8, high=8),
        communication=WidthConfig(schedule="constant", low=16, high=16),
    )
    schedule = build_schedule(precision, total_steps=100, steps_per_epoch=10)
    assert schedule.at(0) == Widths(2, 8, 16)
    assert schedule.at(49) == Widths(6, 8, 16)
    assert schedule.at(50) == Widths(2, 8, 16)


def test_more_cycles_than_steps_is_no_error():
    assert forward_bits(3, low=2, high=6, cycles=8) == [2, 2, 2]
    assert forward_bits(1, low=2, high=6, cycles=8, warmup_epochs=1) == [6]


widths = st.builds(
    WidthConfig,
    schedule=st.sampled_from(["cosine", "constant"]),
    low=st.integers(1, 8),
    high=st.integers(8, 16),
    cycles=st.integers(1, 40),
    warmup_epochs=st.floats(0, 3),
)


@given(width=widths, total_steps=st.integers(1, 3000), step=st.integers(0, 4000))
def test_bits_stay_in_bounds_and_depend_on_the_step_alone(width, total_steps, step):
    precision = PrecisionConfig(forward=width)
    one = build_schedule(precision, total_steps=total_steps, steps_per_epoch=50)
    two = build_schedule(precision, total_steps=total_steps, steps_per_epoch=50)
    for earlier in (0, step // 2, step + 1):
        two.at(earlier)
    assert one.at(step) == two.at(step)
    assert width.low <= one.at(step).forward_bits <= width.high
    assert one.digest() == two.digest()


@given(width=widths, total_steps=st.integers(1, 3000))
def test_every_cycle_is_the_same(width, total_steps):
    channel = build_schedule(
        PrecisionConfig(forward=width), total_steps=total_steps, steps_per_epoch=50
    ).forward
    for index in range(channel.cycles * channel.period_steps - channel.period_steps):
        step = channel.hold_steps + index
        assert channel.at(step) == channel.at(step + channel.period_steps)
    assert (
        channel.cycles == 0 or channel.cycles * (channel.period_steps + 1) > total_steps - channel.hold_steps
    )


def test_digest_tells_schedules_apart():
    """Ranks compare it: two that differ anywhere must not be taken for equal."""
    base = PrecisionConfig()
    digests = {build_schedule(base, total_steps=n, steps_per_epoch=10).digest() for n in (100, 101)}
    for channel in ("forward", "backward", "communication"):
        changed = replace(base, **{channel: WidthConfig(low=3, high=7, cycles=3)})
        digests.add(build_schedule(changed, total_steps=100, steps_per_epoch=10).digest())
    assert len(digests) == 5
    assert all(0 <= digest < 2**63 for digest in digests)


def test_digest_is_the_same_in_every_process():
    script = (
        "from cyclebnn_dist.config.recipe import PrecisionConfig;"
        "from cyclebnn_dist.precision.schedule import build_schedule;"
        "print(build_schedule(PrecisionConfig(), total_steps=100, steps_per_epoch=10).digest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{build_schedule(PrecisionConfig(), total_steps=100, steps_per_epoch=10).digest()}\n"}


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="0 steps"):
        build_schedule(PrecisionConfig(), total_steps=0, steps_per_epoch=1)
