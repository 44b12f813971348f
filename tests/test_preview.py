"""The preview: without these a user would plan by bytes, steps or widths that a run then does not have."""

import pytest
import torch
from launching import TINY_RECIPE

from cyclebnn_dist.comm import build_layout, build_reducer
from cyclebnn_dist.comm.traffic import count_step
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.recipe import CommConfig, PrecisionConfig, WidthConfig
from cyclebnn_dist.engine.buckets import Buckets
from cyclebnn_dist.precision import build_schedule
from cyclebnn_dist.preview import Length, expected_traffic, preview, run_length

SHAPES = {"stem": (16, 3, 3, 3), "conv": (40, 30, 3, 3), "bias": (40,), "odd": (37, 53), "scale": (1,)}
BUCKETS = [("conv", "scale"), ("odd", "stem", "bias")]


@pytest.fixture
def recipe(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return load_recipe(path)


def settings(comm):
    return CommConfig(**{"block_size": 64, "small_numel": 500, **comm})


def send(rank, n, comm, steps):
    """Counters of a real reducer after a step of each number of bits in ``steps``."""
    named = [(name, torch.empty(shape)) for name, shape in SHAPES.items()]
    reducer = build_reducer(
        settings(comm), named, rank=rank, world_size=n, seed=1, device=torch.device("cpu")
    )
    for step, bits in enumerate(steps):
        for bucket in BUCKETS if step else [tuple(SHAPES)]:
            tensors = {name: torch.randn(SHAPES[name]) for name in bucket}
            reducer.reduce(tensors, step=step, bits=bits).wait()
    reducer.close()
    return reducer.counters


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    "comm",
    [
        {},
        {"codec": "absmax", "small_bits": 16, "error_feedback": True},
        {"codec": "minmax", "second_phase_extra_bits": 2},
    ],
)
def test_bytes_foretold_are_the_bytes_that_ranks_count(ranks, n, comm):
    width = WidthConfig(
        schedule="piecewise",
        low=1,
        high=32,
        pieces=tuple((float(i), b) for i, b in enumerate([32, 16, 8, 5, 1])),
    )
    schedule = build_schedule(PrecisionConfig(communication=width), total_steps=7, steps_per_epoch=1)
    steps = list(schedule.communication.first(7))
    assert steps == [32, 16, 8, 5, 1, 1, 1]
    counted = ranks(n, send, comm, steps)

    used = settings(comm)
    layout = build_layout(
        [(name, torch.empty(shape)) for name, shape in SHAPES.items()],
        world_size=n,
        block_size=used.block_size,
        small_bits=used.small_bits,
        small_numel=used.small_numel,
        second_phase_extra_bits=used.second_phase_extra_bits,
    )
    places = {name: place for place, name in enumerate(SHAPES)}
    buckets = Buckets(
        first_step=(tuple(places.values()),),
        later_steps=tuple(tuple(places[name] for name in bucket) for bucket in BUCKETS),
    )
    foretold = expected_traffic(schedule, layout, buckets, codec=used.codec)
    assert foretold.sent_bytes == counted[0].sent_bytes
    assert foretold.fp32_bytes == pytest.approx(counted[0].fp32_bytes, rel=1e-12)
    assert foretold.bf16_bytes == pytest.approx(counted[0].bf16_bytes, rel=1e-12)
    for rank, counters in enumerate(counted):
        parts = [
            count_step(
                layout,
                buckets.later_steps if step else buckets.first_step,
                bits=bits,
                codec=used.codec,
                rank=rank,
            )
            for step, bits in enumerate(steps)
        ]
        assert sum(part.sent_bytes for part in parts) == counters.sent_bytes


def test_one_rank_sends_nothing_and_does_not_quantize(recipe):
    _, described = preview(recipe, length=Length(10, 5, "given"), ranks=1)
    assert described["sent_bytes"] == 0
    assert described["bits"]["communication"]["histogram"] == {32: 10}


def test_widths_that_a_model_does_not_follow_are_told_as_off(tmp_path, recipe):
    other = load_recipe(tmp_path / "tiny.yaml", ["binary.method=bireal"])
    _, described = preview(other, length=Length(10, 5, "given"), ranks=1)
    assert described["bits"]["forward"]["schedule"] == "off"
    assert described["bits"]["forward"]["histogram"] == {32: 10}
    assert described["training_saving_model"] == 0


def test_runs_and_histogram_tell_the_same_as_the_schedule(recipe):
    schedule, described = preview(recipe, length=Length(300, 100, "given"), ranks=1)
    used = described["bits"]["forward"]
    found = [schedule.at(step).forward_bits for step in range(300)]
    ends = [step for step, _ in used["runs"][1:]] + [300]
    rebuilt = [bits for (start, bits), end in zip(used["runs"], ends, strict=True) for _ in range(start, end)]
    assert rebuilt == found
    assert used["histogram"] == {bits: found.count(bits) for bits in sorted(set(found))}
    assert used["mean"] == pytest.approx(sum(found) / 300)


def test_the_length_comes_from_what_is_given_else_from_the_images(recipe):
    """80 training images in batches of 16, twice."""
    assert run_length(recipe) == Length(10, 5, f"80 images in {recipe.data.path}")
    assert run_length(recipe, images=1000)[:2] == (124, 62)
    assert run_length(recipe, epoch_steps=7)[:2] == (14, 7)
    assert run_length(recipe, steps=9)[:2] == (9, 4)
    assert run_length(recipe, steps=9, epoch_steps=3)[:2] == (9, 3)
    with pytest.raises(RecipeError, match="more than the 15 training images"):
        run_length(recipe, images=15)
