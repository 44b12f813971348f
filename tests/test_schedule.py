"""The precision schedule: profiles, shapes and pieces, pure functions of the step."""

import hashlib
import json
import logging
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig
from cyclebnn_dist.precision import Widths, build_schedule, profiles, schedule
from cyclebnn_dist.precision.profiles import PROFILES


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


def test_cycles_that_do_not_fit_become_fewer_and_are_told(caplog):
    """Otherwise a short trial of a long recipe would spend every step at its lowest width."""
    with caplog.at_level(logging.WARNING):
        assert forward_bits(5, low=2, high=6, cycles=8) == [2, 4, 2, 4, 6]
    assert "precision.forward.cycles: 8 cycles of at least 2 steps do not fit into 5 steps" in caplog.text
    assert "there will be 2" in caplog.text
    assert forward_bits(1, low=2, high=6, cycles=8) == [6]
    assert forward_bits(1, low=2, high=6, cycles=8, warmup_epochs=1) == [6]


def test_cycles_that_fit_are_not_warned_about_and_one_rank_is_enough(caplog):
    forward_bits(300, low=2, high=6, cycles=8)
    build_schedule(PrecisionConfig(), total_steps=3, steps_per_epoch=1, warn=False)
    assert caplog.text == ""


def nearest(value):
    """Nearest whole number, ties to the even one, of a Fraction or a Decimal."""
    if isinstance(value, Fraction):
        return round(value)
    return int(value.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def plain_level(profile, z):
    """The equations of CPT and of arXiv 2403.02243, exactly or to 28 digits; z is a Fraction."""
    if profile == "linear":
        return z
    if profile == "demon":
        return 1 - (1 - z) / (Fraction(1, 10) + Fraction(9, 10) * (1 - z))
    if profile == "exponential":
        return 1 - (Decimal(-4) * z.numerator / z.denominator).exp()
    exact = {(0, 1): (0, 1), (1, 3): (1, 4), (1, 2): (1, 2), (2, 3): (3, 4)}.get(z.as_integer_ratio())
    return Fraction(*exact) if exact else Decimal((1 - math.cos(math.pi * z)) / 2)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", ["repeated", "triangular", "reversed"])
@pytest.mark.parametrize("mirror", ["vertical", "horizontal"])
@pytest.mark.parametrize(("low", "high", "period"), [(2, 6, 60), (1, 8, 97), (2, 16, 12), (4, 5, 84)])
def test_every_step_follows_its_equation(profile, shape, mirror, low, high, period):
    """By these numbers a recipe is compared to the papers'."""
    found = forward_bits(
        4 * period, schedule=profile, shape=shape, mirror=mirror, low=low, high=high, cycles=4
    )
    for step, bits in enumerate(found):
        cycle, place = divmod(step, period)
        z = Fraction(place, period)
        falls = shape == "reversed" or (shape == "triangular" and cycle in (0, 2))
        if not falls:
            share = plain_level(profile, z)
        elif mirror == "vertical":
            share = 1 - plain_level(profile, z)
        elif z == 0:
            share = {"exponential": 1 - Decimal(-4).exp()}.get(profile, Fraction(1))
        else:
            share = plain_level(profile, 1 - z)
        assert bits == nearest(low + (high - low) * share), step


def test_falling_is_a_mirror_image():
    for profile in PROFILES:
        rising = forward_bits(101, schedule=profile, low=2, high=9, cycles=1)
        swapped = forward_bits(101, schedule=profile, shape="reversed", low=2, high=9, cycles=1)
        backwards = forward_bits(
            101, schedule=profile, shape="reversed", mirror="horizontal", low=2, high=9, cycles=1
        )
        assert [2 + 9 - bits for bits in rising] == swapped
        assert backwards[1:] == rising[:0:-1]


def test_triangular_turns_and_ends_high_whatever_the_number_of_cycles():
    even = forward_bits(400, shape="triangular", low=2, high=6, cycles=4)
    odd = forward_bits(300, shape="triangular", low=2, high=6, cycles=3)
    assert (even[0], even[99], even[100], even[199], even[200]) == (6, 2, 2, 6, 6)
    assert (odd[0], odd[99], odd[100]) == (2, 6, 6)
    assert even[-1] == odd[-1] == 6
    assert max(abs(a - b) for a, b in pairwise(even)) == 1, "it jumps nowhere"


def test_reversed_ends_low_as_asked_even_where_cycles_do_not_divide_the_run():
    assert forward_bits(107, shape="reversed", low=2, high=6, cycles=5)[-3:] == [2, 2, 2]


def test_pieces_begin_at_their_epochs():
    pieces = ((0.0, 8), (0.5, 3), (2.0, 6))
    bits = forward_bits(300, schedule="piecewise", low=3, high=8, pieces=pieces)
    assert bits == [8] * 50 + [3] * 150 + [6] * 100
    assert (
        forward_schedule(30, schedule="piecewise", low=3, high=8, pieces=pieces).at(10**6).forward_bits == 6
    )


pieces_of = st.lists(st.tuples(st.floats(0.01, 40), st.integers(2, 16)), max_size=5)
widths = st.builds(
    lambda pieces, ends, **fields: WidthConfig(
        low=ends[0],
        high=ends[1],
        pieces=((0.0, ends[1]), *((at, min(max(b, ends[0]), ends[1])) for at, b in sorted(pieces)))
        if fields["schedule"] == "piecewise"
        else (),
        **fields,
    ),
    pieces=pieces_of,
    ends=st.tuples(st.integers(1, 16), st.integers(1, 16)).map(sorted),
    schedule=st.sampled_from([*PROFILES, "constant", "piecewise"]),
    shape=st.sampled_from(["repeated", "triangular", "reversed"]),
    mirror=st.sampled_from(["vertical", "horizontal"]),
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
def test_cycles_are_alike_and_share_the_run(width, total_steps):
    channel = forward_schedule(total_steps, steps_per_epoch=50, **vars(width)).forward
    after = 2 * channel.period_steps if width.shape == "triangular" else channel.period_steps
    for since in range(channel.cycles * channel.period_steps - after):
        step = channel.hold_steps + since
        assert channel.at(step) == channel.at(step + after)
    cycled = channel.cycles * channel.period_steps
    assert channel.cycles == 0 or 0 <= total_steps - channel.hold_steps - cycled < channel.cycles


@given(width=widths, total_steps=st.integers(1, 3000), cuts=st.lists(st.integers(0, 3000), max_size=5))
def test_a_run_is_the_same_however_it_is_cut(width, total_steps, cuts):
    """What is planned at once must be what a run does step by step, also when it is resumed."""
    one = forward_schedule(total_steps, steps_per_epoch=50, **vars(width))
    whole = one.forward.first(total_steps)
    assert list(whole) == [one.at(step).forward_bits for step in range(total_steps)]
    for cut in cuts:
        part = one.forward.first(min(cut, total_steps))
        assert part == whole[: len(part)]
    assert one.counts() == Counter(map(one.at, range(total_steps)))


@given(width=widths, total_steps=st.integers(1, 3000))
def test_only_what_asks_for_it_ends_at_its_lowest_width(width, total_steps):
    channel = forward_schedule(total_steps, steps_per_epoch=50, **vars(width)).forward
    if width.low < width.high and width.schedule in PROFILES and width.shape != "reversed":
        assert channel.at(total_steps - 1) > width.low


@given(width=widths, total_steps=st.integers(1, 3000))
def test_warmup_is_never_below_high(width, total_steps):
    channel = forward_schedule(total_steps, steps_per_epoch=50, **vars(width)).forward
    if width.schedule != "piecewise":
        warmup = min(total_steps, round(50 * width.warmup_epochs))
        assert set(channel.first(warmup)) <= {width.high}


def test_digest_tells_schedules_apart():
    """Ranks compare it: two that differ anywhere must not be taken for equal."""
    base = PrecisionConfig()
    digests = {build_schedule(base, total_steps=n, steps_per_epoch=10).digest() for n in (100, 101)}
    for channel in ("forward", "backward", "communication"):
        changed = replace(base, **{channel: WidthConfig(low=3, high=7, cycles=3)})
        digests.add(build_schedule(changed, total_steps=100, steps_per_epoch=10).digest())
    assert len(digests) == 5
    assert all(0 <= digest < 2**63 for digest in digests)


def test_digest_changes_with_a_formula(monkeypatch):
    """A rank with other code must not be taken for one of these."""
    before = forward_schedule(100).digest()
    monkeypatch.setattr(profiles, "EXPONENTIAL_RATE", 4.001)
    assert forward_schedule(100).digest() != before


def test_what_a_step_gets_is_pinned():
    """Where this fails on purpose, raise ``_FORMULA``: ranks and runs of two versions must not be mixed."""
    bits = []
    for name in PROFILES:
        for shape in ("repeated", "triangular", "reversed"):
            for mirror in ("vertical", "horizontal"):
                for total_steps in (7, 100, 1001):
                    fields = {"schedule": name, "shape": shape, "mirror": mirror, "low": 2, "high": 7}
                    bits.append(forward_bits(total_steps, cycles=3, warmup_epochs=0.02, **fields))
    found = hashlib.sha256(json.dumps(bits).encode()).hexdigest()[:16]
    assert (schedule._FORMULA, found) == (2, "1feca3565c5d434a")


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
