"""In live ranks. Without these fp16 under DeepSpeed would train otherwise than under DDP, or lose its scale on the way.

A scale for gradients needs no GPU: these engines are built in fp32 and then given one, and half-precision passes.
"""

import math

import pytest
import torch
from test_deepspeed import STAGES, build, train
from test_hook import same
from worlds import make_world

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import EngineConfig
from cyclebnn_dist.engine import DeepSpeedEngine, zero

START, GROWTH_STEPS = 1024.0, 3


def build_scaled(rank, n, stage, *, half=False, **options):
    engine, reducer = build(rank, n, stage, **options)
    engine._scaler = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=GROWTH_STEPS)
    if half and stage is None:
        engine._autocast_dtype = torch.float16
    elif half:
        zero.autocast_forward(engine._engine, torch.float16)
    return engine, reducer


def train_scaled(rank, n, stage, options, training):
    """Norms, weights, and the scale before each step and after the last one, of seven steps."""
    engine, reducer = build_scaled(rank, n, stage, **options)
    history, scales = [], [engine._scaler.get_scale()]
    for step in range(7):
        history += train(engine, reducer, rank, steps=[step], **training)
        scales.append(engine._scaler.get_scale())
    reducer.close()
    return history, scales


WAYS = {
    "clipped": ({"feedback": True}, {"clip": 0.5}),
    "accumulating": ({}, {"clip": 0.5, "accumulation": 2}),
    "half precision": ({"half": True}, {"clip": 0.5}),
    "an infinite gradient of one rank": ({"feedback": True}, {"overflow": 4}),
    "parts alone": ({"scatter": True}, {"bits": [32]}),
    "parts alone, an infinite gradient": ({"scatter": True}, {"bits": [32], "overflow": 4}),
}


@pytest.mark.parametrize("way", WAYS)
def test_scaled_losses_train_as_under_ddp_to_the_last_bit(ranks, way):
    options, training = WAYS[way]
    expected, scales = ranks(2, train_scaled, None, options, training)[0]
    grown = [START] * 3 + [2 * START] * 3 + [4 * START] * 2
    assert scales == ([START] * 3 + [2 * START] * 2 + [START] * 3 if training.get("overflow") else grown)
    for stage in STAGES:
        for history, found in ranks(2, train_scaled, stage, options, training):
            assert found == scales
            for (norm, _, weights), (norm_found, _, weights_found) in zip(expected, history, strict=True):
                assert math.isfinite(norm) == math.isfinite(norm_found)
                if math.isfinite(norm):
                    assert norm_found == (pytest.approx(norm, rel=1e-6) if options.get("scatter") else norm)
                assert same(weights, weights_found), stage


def carry_over(rank, n, first, second):
    """The scale and its streak of good steps after a change of engine."""
    engine, reducer = build_scaled(rank, n, first)
    train(engine, reducer, rank, steps=range(4))
    state = engine.state_dict()
    reducer.close()
    engine, reducer = build_scaled(rank, n, second)
    engine.load_state_dict(state)
    found = engine.state_dict()
    reducer.close()
    return state["loss_scale"], found["loss_scale"]


@pytest.mark.parametrize(("first", "second"), [(None, 2), (1, None), (0, 1)])
def test_the_scale_outlives_a_change_of_engine(ranks, first, second):
    saved, found = ranks(1, carry_over, first, second)[0]
    assert saved == found
    assert (saved["scale"], saved["_growth_tracker"]) == (2 * START, 1)


def build_in_half_precision(rank, n):
    _, reducer = build(rank, n, None)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = EngineConfig(name="deepspeed")
    try:
        DeepSpeedEngine(model, optimizer, reducer, config=config, amp="fp16", world=make_world(rank, n))
    except RecipeError as error:
        return str(error)
    finally:
        reducer.close()


def test_half_precision_is_refused_on_a_cpu_as_under_ddp(ranks):
    assert "fp16 needs a GPU" in ranks(1, build_in_half_precision)[0]
