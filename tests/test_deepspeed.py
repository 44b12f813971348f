"""In live ranks. Without these a run could train otherwise under DeepSpeed than under DDP, or not go on from it."""

import copy
import json
import logging
import logging.handlers
import math
import signal
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from launching import TINY_RECIPE, Launched
from safetensors.torch import load_file
from test_end_to_end import assert_same_final_state
from test_hook import Net, same
from torch import nn
from worlds import make_world

from cyclebnn_dist import train as train_module
from cyclebnn_dist.comm import build_reducer
from cyclebnn_dist.comm.traffic import sent_bytes_of_step
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.recipe import CommConfig, EngineConfig
from cyclebnn_dist.engine import DDPEngine, DeepSpeedEngine, zero
from cyclebnn_dist.engine.zero_groups import slots_of_optimizer
from cyclebnn_dist.metrics import read_journal
from cyclebnn_dist.optimizer import DECAYS

BITS = [4, 2, 8, 16, 1, 32, 3]
STAGES = [0, 1, 2]


def build(
    rank,
    n,
    stage,
    *,
    optimizer="adamw",
    amp="fp32",
    frozen=(),
    hierarchical=False,
    feedback=False,
    bucket_mb=0.01,
    first_decay=None,
    memory_format=torch.contiguous_format,
    settings=None,
    scatter=False,
    clamp=None,
    kernel=3,
):
    """Engine and reducer of a small net; ``stage`` None is DDP. Without ``scatter`` everyone gets the whole gradient."""
    torch.manual_seed(0)
    model = Net(spare=False)
    if kernel != 3:
        model.body = nn.Conv2d(16, 32, kernel)
    model = model.to(memory_format=memory_format)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if clamp is not None:  # as BNext does with its latent weights

        def clamp_weight(layer, inputs):
            layer.weight.data.clamp_(-clamp, clamp)

        model.body.register_forward_pre_hook(clamp_weight)
    comm = CommConfig(block_size=64, small_numel=500, error_feedback=feedback, hierarchical=hierarchical)
    world = make_world(rank, n)
    place = {"rank": rank, "world_size": n, "seed": 1, "device": world.device}
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim <= 1}
    groups = [
        {"params": list(g.values()), "names": list(g), "lr_scale": scale, "weight_decay": decay}
        for g, scale, decay in [(weights, 1.0, 0.05), (others, 0.5, 0.0)]
    ]
    if first_decay is not None:
        groups[0][DECAYS] = (first_decay, groups[0]["weight_decay"])
    if optimizer == "sgd":
        made = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    else:
        made = torch.optim.AdamW(groups, lr=0.1)
    if scatter and stage:
        place["slots"] = slots_of_optimizer(model, made, bucket_mb=bucket_mb, world_size=n)
    reducer = build_reducer(comm, model.named_parameters(), ranks_per_node=2, **place)
    if stage is None:
        engine = DDPEngine(
            model, made, reducer, config=EngineConfig(bucket_mb=bucket_mb), amp=amp, device=world.device
        )
    else:
        config = EngineConfig(
            name="deepspeed", zero_stage=stage, bucket_mb=bucket_mb, deepspeed=settings or {}
        )
        engine = DeepSpeedEngine(model, made, reducer, config=config, amp=amp, world=world)
    return engine, reducer


def train(
    engine,
    reducer,
    rank,
    *,
    steps,
    bits=BITS,
    accumulation=1,
    clip=0.0,
    lr=0.01,
    overflow=None,
    restart_at=-1,
):
    """Of each step: norm, bytes sent so far, copies of the parameters. What ranks see depends on rank and step alone."""
    history = []
    for step in steps:
        data = torch.Generator().manual_seed(100 * step + rank)
        if step == restart_at:
            engine.restart_optimizer()
        engine.begin_step(
            step, lr=lr, communication_bits=bits[step % len(bits)], first_phase=step < restart_at
        )
        for micro_step in range(accumulation):
            with nullcontext() if micro_step == accumulation - 1 else engine.accumulating():
                images = torch.randn(8, 3, 9, 9, generator=data)
                labels = torch.randint(40, (8,), generator=data)
                loss = nn.functional.cross_entropy(engine.forward(images), labels) / accumulation
                engine.backward(loss * (float("inf") if overflow == step and rank == 1 else 1.0))
        norm = engine.clip(clip)
        engine.step(skip=not bool(torch.isfinite(norm)))
        parameters = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        history.append((norm.item(), reducer.counters.sent_bytes, parameters))
    return history


def train_all_engines(rank, n, options, training, stages):
    results = {}
    for stage in [None, *stages]:
        engine, reducer = build(rank, n, stage, **options)
        results[stage] = train(engine, reducer, rank, **training)
        reducer.close()
    return results


WAYS = {
    "fp32": ({}, {"bits": [32]}),
    "fp32, sgd": ({"optimizer": "sgd"}, {"bits": [32]}),
    "4 bits": ({}, {"bits": [4]}),
    "cyclic, clipped, feedback": ({"feedback": True}, {"clip": 0.5}),
    "accumulating, clipped": ({"feedback": True}, {"accumulation": 3, "clip": 0.5}),
    "bf16": ({"amp": "bf16"}, {}),
    "bf16, accumulating": ({"amp": "bf16"}, {"accumulation": 3, "bits": [32]}),
    "a frozen head": ({"frozen": ("head.weight", "head.bias")}, {"bits": [4]}),
    "one bucket": ({"bucket_mb": 25.0}, {}),
    "weights clamped in the forward pass": ({"clamp": 0.05}, {}),
    "two phases": ({"first_decay": 0.5}, {"bits": [32], "restart_at": 8}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_stage_trains_as_ddp_to_the_last_bit(ranks, way):
    """The reduced gradient is DDP's, element for element, and what optimizers do with it is elementwise."""
    options, training = WAYS[way]
    for results in ranks(2, train_all_engines, options, {"steps": range(20), **training}, STAGES):
        norms = [norm for norm, _, _ in results[None]]
        for stage in STAGES:
            assert [norm for norm, _, _ in results[stage]] == norms
            for (_, _, expected), (_, _, found) in zip(results[None], results[stage], strict=True):
                assert same(expected, found), stage


EXACT = {
    "accumulating": ({}, {"bits": [32], "accumulation": 2}),
    "clipped, bf16": ({"amp": "bf16"}, {"bits": [32], "clip": 0.5}),
    "sgd, one bucket, a frozen head": (
        {"optimizer": "sgd", "bucket_mb": 25.0, "frozen": ("head.weight", "head.bias")},
        {"bits": [32]},
    ),
}


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("n", [2, 3])
def test_at_32_bits_a_reduce_scatter_trains_as_ddp(ranks, n, way):
    """To the last bit, unless it is clipped: the norm is another sum of the same numbers."""
    options, training = EXACT[way]
    training = {"steps": range(8), **training}
    for results in ranks(n, train_all_engines, {**options, "scatter": True}, training, [1, 2]):
        for stage in (1, 2):
            for (norm, _, expected), (found_norm, _, found) in zip(
                results[None], results[stage], strict=True
            ):
                assert found_norm == pytest.approx(norm, rel=2e-6)
                if "clip" not in training:
                    assert same(expected, found)
                else:
                    for name, tensor in expected.items():
                        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def scatter_in_many_ways(rank, n, feedback):
    ways = [(1, 0.01), (2, 0.01), (2, 0.004), (1, 25.0)]
    training = {"steps": range(7), "accumulation": 2, "clip": 0.5, "overflow": 3}
    results = {}
    for stage, bucket_mb in ways:
        engine, reducer = build(rank, n, stage, scatter=True, bucket_mb=bucket_mb, feedback=feedback)
        results[stage, bucket_mb] = train(engine, reducer, rank, **training)
        reducer.close()
    return results


@pytest.mark.parametrize(("n", "feedback"), [(2, True), (4, False)])
def test_a_quantized_reduce_scatter_is_the_same_at_both_stages_for_any_buckets_and_on_all_ranks(
    ranks, n, feedback
):
    found = ranks(n, scatter_in_many_ways, feedback)
    expected = found[0][1, 0.01]
    assert [math.isfinite(norm) for norm, _, _ in expected] == [step != 3 for step in range(7)]
    assert same(expected[2][2], expected[3][2]), "a step that is skipped changes nothing"
    for results in found:
        for history in results.values():
            for (_, _, weights), (_, _, others) in zip(expected, history, strict=True):
                assert same(weights, others)
            assert [norm for norm, _, _ in history] == pytest.approx(
                [norm for norm, _, _ in expected], rel=1e-6, nan_ok=True
            )


def train_counting_bytes(rank, n, stage, scatter):
    """Bytes of each width from the counters and from the formula; the parameters that were reduced in each step."""
    engine, reducer = build(rank, n, stage, scatter=scatter)
    submit, steps = reducer.reduce_flat, []

    def noted(flat, *, parameters):
        steps[-1] += parameters
        return submit(flat, parameters=parameters)

    reducer.reduce_flat = noted
    found, expected = [], []
    for step, bits in enumerate(BITS):
        steps.append([])
        before = reducer.counters.sent_bytes
        train(engine, reducer, rank, steps=[step], accumulation=2)
        found.append(reducer.counters.sent_bytes - before)
        expected.append(
            sent_bytes_of_step(reducer.layout, bits=bits, codec="hadamard", bucket_mb=0.01, rank=rank)
        )
    reducer.close()
    return found, expected, steps, (reducer.counters.fp32_bytes, reducer.counters.bf16_bytes)


@pytest.mark.parametrize(("stage", "scatter"), [(0, False), (1, False), (1, True), (2, False), (2, True)])
def test_bytes_are_those_of_the_width_of_the_step_once_a_step(ranks, stage, scatter):
    numel = sum(p.numel() for p in Net(spare=False).parameters())
    for found, expected, steps, (fp32_bytes, bf16_bytes) in ranks(2, train_counting_bytes, stage, scatter):
        assert found == expected
        assert all(sorted(indices) == list(range(8)) for indices in steps)
        assert sorted(BITS, key=dict(zip(BITS, found, strict=True)).__getitem__) == sorted(BITS)
        assert fp32_bytes == 2 * bf16_bytes == len(BITS) * (1 if scatter else 2) * numel / 2 * 4


def note_what_leaves_before_the_pass_ends(rank, n, stage):
    """Per pass: the buckets that were handed over before the gradient of the first layer was there, and all of them."""
    engine, reducer = build(rank, n, stage, scatter=True)
    submit, left, early = reducer.reduce_flat, [], []

    def noted(flat, *, parameters):
        left.append(tuple(parameters))
        return submit(flat, parameters=parameters)

    reducer.reduce_flat = noted
    first = engine.module.stem.weight
    first.register_hook(lambda gradient: early.append(list(left)))
    train(engine, reducer, rank, steps=[0], accumulation=2)
    waited = reducer.counters.wait_seconds
    reducer.close()
    return early, left, waited


@pytest.mark.parametrize("stage", STAGES)
def test_buckets_leave_during_the_last_backward_pass_and_in_one_order(ranks, stage):
    found = ranks(2, note_what_leaves_before_the_pass_ends, stage)
    for (accumulating, last), left, waited in found:
        assert accumulating == []
        assert 0 < len(last) < len(left)
        assert left == found[0][1]
        assert left[: len(last)] == last
        assert waited > 0


@pytest.mark.parametrize("hierarchical", [False, True])
def test_four_ranks_train_as_under_ddp_also_in_two_levels(ranks, hierarchical):
    options, training = {"hierarchical": hierarchical}, {"steps": range(7), "clip": 0.5}
    for results in ranks(4, train_all_engines, options, training, STAGES):
        for stage in STAGES:
            assert same(results[None][-1][2], results[stage][-1][2])


def train_in_channels_last(rank, n, kernel):
    options = {"memory_format": torch.channels_last, "kernel": kernel}
    return train_all_engines(rank, n, options, {"steps": range(7)}, [0])


@pytest.mark.parametrize("kernel", [3, 1])
def test_stage_0_keeps_the_memory_layout_and_quantizes_in_it_as_ddp_does(ranks, kernel):
    for results in ranks(2, train_in_channels_last, kernel):
        for (_, _, expected), (_, _, found) in zip(results[None], results[0], strict=True):
            assert same(expected, found)
            assert found["body.weight"].is_contiguous(memory_format=torch.channels_last)


def train_alone(rank, n):
    return train_all_engines(rank, n, {}, {"steps": range(5), "accumulation": 2, "clip": 0.5}, STAGES)


def test_a_world_of_one_trains_as_ddp_does(ranks):
    results = ranks(1, train_alone)[0]
    for stage in STAGES:
        assert same(results[None][-1][2], results[stage][-1][2])
        assert results[stage][-1][1] == 0


def change_engine(rank, n, first, second, options, training):
    """Six steps under one engine; as many with another from the third on, which takes over weights and state."""
    engine, reducer = build(rank, n, first, **options)
    undisturbed = train(engine, reducer, rank, steps=range(6), **training)
    reducer.close()
    engine, reducer = build(rank, n, first, **options)
    train(engine, reducer, rank, steps=range(3), **training)
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    carried = [copy.deepcopy(engine.state_dict())]
    residuals = copy.deepcopy(reducer.state_dict())
    reducer.close()
    dist.broadcast_object_list(carried, src=0)
    engine, reducer = build(rank, n, second, **options)
    train(engine, reducer, rank, steps=[99], **training)
    engine.module.load_state_dict(weights)
    engine.load_state_dict(carried[0])
    reducer.load_state_dict(residuals)
    return undisturbed[3:], train(engine, reducer, rank, steps=range(3, 6), **training), carried[0]


CHANGES = [(None, 0), (0, None), (None, 2), (2, None), (1, 1), (2, 2), (1, 2), (2, 0)]


@pytest.mark.parametrize(("first", "second"), CHANGES)
@pytest.mark.parametrize("n", [2, 3])
def test_another_engine_goes_on_as_if_nothing_had_been(ranks, n, first, second):
    options = {"optimizer": "sgd" if n == 3 else "adamw", "feedback": True}
    for expected, found, carried in ranks(n, change_engine, first, second, options, {"clip": 0.5}):
        assert carried["optimizer"].keys() == expected[0][2].keys()
        for (norm, _, parameters), (norm_after, _, parameters_after) in zip(expected, found, strict=True):
            assert norm == norm_after
            assert same(parameters, parameters_after)


def state_of_another_world(rank, n, stage, carried, weights):
    """The optimizer's state after loading; the weights after a step at learning rate 0, which every owner makes."""
    engine, reducer = build(rank, n, stage, scatter=True)
    engine.module.load_state_dict(weights, strict=False)
    engine.load_state_dict(carried)
    state = copy.deepcopy(engine.state_dict())
    ((_, _, after),) = train(engine, reducer, rank, steps=[0], lr=0.0)
    reducer.close()
    return state["optimizer"], after


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_and_state_outlive_a_change_of_the_number_of_ranks(ranks, stage):
    history, _, expected = ranks(2, change_engine, stage, stage, {}, {})[0]
    weights = history[-1][2]
    for n in (1, 4):
        found, after = ranks(n, state_of_another_world, stage, expected, weights)[0]
        assert found.keys() == expected["optimizer"].keys()
        for name, entries in expected["optimizer"].items():
            assert entries.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(value, found[name][key]) for key, value in entries.items())
        assert same(weights, after)


def train_with_overflow(rank, n, stage):
    engine, reducer = build(rank, n, stage, feedback=True)
    history = train(engine, reducer, rank, steps=range(5), overflow=2)
    reducer.close()
    return history


def test_an_infinite_gradient_of_one_rank_leaves_no_trace_at_any_stage(ranks):
    expected = ranks(2, train_with_overflow, None)[0]
    assert [math.isfinite(norm) for norm, _, _ in expected] == [True, True, False, True, True]
    for stage in STAGES:
        for history in ranks(2, train_with_overflow, stage):
            assert same(history[1][2], history[2][2])
            assert all(same(a[2], b[2]) for a, b in zip(expected, history, strict=True))


def leave_out_a_layer(rank, n, stage):
    engine, _ = build(rank, n, stage)
    engine.begin_step(0, lr=0.1, communication_bits=4)
    body = engine.module.body(torch.relu(engine.module.stem(torch.ones(2, 3, 9, 9))))
    logits = engine.forward(torch.ones(2, 3, 9, 9))
    try:
        engine.backward((logits * 0).sum().detach() + body.sum())
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_without_a_gradient_are_named(ranks, stage):
    for message in ranks(2, leave_out_a_layer, stage):
        assert "take no part in the loss" in message
        assert "head.weight" in message


def test_another_deepspeed_is_refused_by_name(monkeypatch):
    with pytest.raises(RecipeError, match=r"0\.19\.9 is installed.*tested with 0\.19\.8"):
        zero.check_version("0.19.9")
    zero.open_deepspeed(torch.device("cpu"))
    monkeypatch.setitem(zero.SIGNATURES, "DeepSpeedZeroOptimizer.process_gradients", ("self", "param"))
    with pytest.raises(RecipeError, match=r"process_gradients is .*'i'"):
        zero.check_signatures()


def open_with_another_version_on_one_rank(rank, n):
    tested = zero.TESTED_VERSIONS
    if rank == 1:
        zero.TESTED_VERSIONS = ("0.0.0",)
    try:
        build(rank, n, 1)
    except RecipeError as error:
        return str(error)
    finally:
        zero.TESTED_VERSIONS = tested


def test_another_deepspeed_on_one_rank_ends_all_of_them_at_once(ranks):
    for message in ranks(2, open_with_another_version_on_one_rank):
        assert "tested with 0.0.0" in message


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return path


def under(stage, *, scatter=False):
    if stage is None:
        return ["engine.name=ddp"]
    scatters = f"engine.reduce_scatter={str(scatter).lower()}"
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}", scatters]


def run(rank, size, path, overrides, stop_after=None):
    """Train as the command does; rank 1 is signalled after ``stop_after`` backward passes, as a cluster would."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    backward, calls = DeepSpeedEngine.backward, []

    def counted(self, loss):
        backward(self, loss)
        calls.append(loss)
        if len(calls) == stop_after and rank == 1:
            signal.raise_signal(signal.SIGTERM)

    DeepSpeedEngine.backward = counted
    try:
        recipe = load_recipe(path, [*overrides, "wandb.mode=disabled"])
        return train_module.run_recipe(recipe, make_world(rank, size))
    finally:
        DeepSpeedEngine.backward = backward


def checkpoint(run_dir, *names):
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return {name: load_file(newest / f"{name}.safetensors") for name in names}


EVERYTHING = ("model", "ema", "shared", "rank_0", "rank_1")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_the_same_as_under_ddp_also_when_it_is_stopped_on_the_way(ranks, recipe_file, stage):
    """Weights, averaged weights, optimizer, residuals, random states: a binary network, clipped, cyclic, accumulating."""
    overrides = ["train.accumulation=2"]
    ddp, stopped = recipe_file.parent / "ddp", recipe_file.parent / "run"
    assert ranks(2, run, recipe_file, [*overrides, f"run.dir={ddp}"]) == [0, 0]
    overrides += under(stage)
    assert ranks(2, run, recipe_file, overrides, 6) == [train_module.PREEMPTED] * 2
    assert ranks(2, run, recipe_file, overrides) == [0, 0]
    expected, found = checkpoint(ddp, *EVERYTHING), checkpoint(stopped, *EVERYTHING)
    for name in ("model", "ema", "rank_0", "rank_1"):
        assert expected[name].keys() == found[name].keys()
        for key, tensor in expected[name].items():
            assert torch.equal(tensor, found[name][key]) or "counters" in key, (name, key)
    for key, tensor in expected["shared"].items():
        if key.startswith("engine/"):
            assert torch.equal(tensor, found["shared"][key]), key
    rows = [[r for r in read_journal(f) if r["event"] == "train"] for f in (ddp, stopped)]
    for ours, theirs in zip(*rows, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


def run_noting_warnings(rank, size, path, overrides, stop_after):
    """Exit status, and what is warned of when the checkpoint is read."""
    notes = logging.handlers.BufferingHandler(capacity=100)
    logger = logging.getLogger("cyclebnn_dist.resume")
    logger.addHandler(notes)
    try:
        status = run(rank, size, path, overrides, stop_after)
    finally:
        logger.removeHandler(notes)
    return status, " ".join(record.getMessage() for record in notes.buffer)


def test_a_run_changes_engine_between_lives_and_says_so(ranks, recipe_file):
    """In one run folder, as a user does it: the same command with another engine.name or engine.zero_stage."""
    ddp, changing = recipe_file.parent / "ddp", recipe_file.parent / "run"
    assert ranks(2, run, recipe_file, [f"run.dir={ddp}"]) == [0, 0]
    names = {None: "DDP", **{stage: f"DeepSpeed at stage {stage}" for stage in STAGES}}
    before = None
    for stage, stop_after in [(2, 2), (0, 2), (1, 2), (None, None)]:
        results = ranks(2, run_noting_warnings, recipe_file, under(stage), stop_after)
        for rank, (status, warned) in enumerate(results):
            assert status == (train_module.FINISHED if stage is None else train_module.PREEMPTED)
            told = rank == 0 and before not in (None, stage)
            assert (f"written under {names[before]}, this run goes on under {names[stage]}" in warned) == told
        before = stage
    expected, found = checkpoint(ddp, "model", "ema"), checkpoint(changing, "model", "ema")
    for name in expected:
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in expected[name].items())


def test_killed_under_zero_and_resumed_equals_the_undisturbed_run(tmp_path, tiny_data):
    """Reduce-scattered at cyclic widths, with residuals; a rank is killed by the system."""
    launched = []

    def start(name):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(TINY_RECIPE.format(run_dir=tmp_path / name, data=tiny_data))
        launched.append(Launched(recipe, tmp_path / name, ranks=2, overrides=tuple(under(2, scatter=True))))
        return launched[-1]

    try:
        undisturbed, killed = start("undisturbed"), start("killed")
        killed.wait_for_step(3, seconds=240)
        killed.kill_rank(1)
        assert killed.wait(seconds=120)[0] == 1
        assert undisturbed.wait(seconds=240)[0] == 0
        status, output = start("killed").wait(seconds=240)
        assert status == 0, output
        assert "resuming from the checkpoint of step" in output
    finally:
        for one in launched:
            if not one.ended:
                one.end()
    assert_same_final_state(tmp_path / "undisturbed", tmp_path / "killed")
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("undisturbed", "killed")
    ]
    for key in ("steps", "bits", "sent_bytes", "fp32_bytes", "eval_top1"):
        assert summaries[0][key] == summaries[1][key], key


def test_another_number_of_ranks_goes_on_under_zero(ranks, recipe_file):
    assert ranks(4, run, recipe_file, under(2, scatter=True), 3) == [train_module.PREEMPTED] * 4
    assert ranks(2, run, recipe_file, under(1), 3) == [train_module.PREEMPTED] * 2
    assert ranks(2, run, recipe_file, under(1, scatter=True)) == [0, 0]
    starts = [row for row in read_journal(recipe_file.parent / "run") if row["event"] == "start"]
    assert [row["ranks"] for row in starts] == [4, 2, 2]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["engine.zero_stage=1"], "engine.zero_stage", "shares out nothing"),
        (under(3), "engine.zero_stage", "whole weights"),
        ([*under(1), "optim.name=lamb"], "optim.name", "whole parameter"),
        (
            [*under(2, scatter=True), "comm.hierarchical=true", "comm.error_feedback=false"],
            "comm.hierarchical",
            "no rank but its owner",
        ),
        (
            [*under(1, scatter=True), "comm.second_phase_extra_bits=1"],
            "comm.second_phase_extra_bits",
            "no rank but its owner",
        ),
        ([*under(2), "model.channels_last=true"], "model.channels_last", "flat tensor"),
        ([*under(0), "model.compile=true"], "model.compile", "DeepSpeed"),
        ([*under(0), "engine.find_unused_parameters=true"], "engine.find_unused_parameters", "DeepSpeed"),
    ],
)
def test_what_deepspeed_does_not_do_is_refused_with_the_reason(recipe_file, overrides, key, words):
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(recipe_file, overrides)
    assert caught.value.key == key
    assert caught.value.cure
